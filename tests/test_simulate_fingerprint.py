"""Simulated fingerprints: k-space, signals, noise, order, truth, and the ISMRMRD contract."""

import math
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from quantitron.gadgets.b1_map import read_b1_map
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, parse_header
from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.map_volume import map_volumes
from quantitron.phantoms import simulate_fingerprint as simulation
from quantitron.phantoms.acquisition_order import flag
from quantitron.phantoms.file import read_anatomy
from quantitron.phantoms.fingerprint_order import acquired_interleaves, interleaf_order
from quantitron.phantoms.nist import reference_values, sphere_number
from quantitron.phantoms.scene import FieldSettings, make_scene, scan_mask
from quantitron.phantoms.schedules import make_schedule
from quantitron.phantoms.signal_table import signal_basis, tabulate
from quantitron.phantoms.simulate_fingerprint import simulate_fingerprint
from quantitron.recon.signal.models import CONTRAST_SIGNALS

ACQ_IS_NOISE_MEASUREMENT = 19
ACQ_IS_PARALLEL_CALIBRATION = 20
ACQ_LAST_IN_MEASUREMENT = 25


def write_phantom(path, shape=(8, 24, 20), voxel=(0.004, 0.002, 0.002), **more):
    """An ellipsoid of two tissues with smooth variation, no T2*: a fingerprint does not need it."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2) for n in shape], indexing="ij")
    inside = (z**2 + y**2 + x**2) < 0.8
    inner = (y + 0.2) ** 2 + x**2 < 0.2
    ripple = 1 + 0.05 * np.sin(5 * x + 3 * y + 2 * z)
    content = {
        "t1": np.where(inner, 0.8, 1.4) * ripple,
        "t2": np.where(inner, 0.06, 0.09) * ripple,
        "pd": np.where(inside, np.where(inner, 0.7, 0.85) * ripple, 0),
        "labels": np.where(inside, np.where(inner, 3, 2), 0),
        "voxel_size": np.array(voxel),
    }
    np.savez(path, **(content | more))
    return path


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "phantom.npz")


SMALL = {
    "matrix": (20, 24, 1),
    "fov": (40.0, 48.0, 4.0),
    "points": 40,
    "interleaves": 7,
    "coils": 3,
}


def scan(tmp_path, phantom, **more):
    arguments = SMALL | {"output": tmp_path / "raw.h5", "phantom": phantom, "snr": None} | more
    made = simulate_fingerprint(**arguments)
    with h5py.File(made.output) as file:
        rows = file["dataset/data"][()]
        header = parse_header(file["dataset/xml"][0])
    head = rows["head"]
    noise = (head["flags"] & flag(ACQ_IS_NOISE_MEASUREMENT)) != 0
    shapes = [
        (int(h["active_channels"]), int(h["number_of_samples"]), int(h["trajectory_dimensions"]))
        for h in head
    ]
    samples = [d.view(np.complex64).reshape(c, m) for d, (c, m, _) in zip(rows["data"], shapes, strict=True)]
    places = [t.reshape(m, d) for t, (_, m, d) in zip(rows["traj"], shapes, strict=True)]
    return made, header, head, noise, samples, places


def scene_of(phantom, protocol, grid, fov, coils, supersampling=(2, 2, 2), height=0.0, seed=0, b1=0.0):
    extent = tuple(1e-3 * length for length in fov[::-1])
    return make_scene(
        read_anatomy(phantom),
        protocol,
        grid[::-1],
        extent,
        coils=coils,
        supersampling=supersampling,
        height=height,
        fields=FieldSettings(b1=b1),
        seed=seed,
    )


def exact_sample(scene, protocol, trajectory, time_point, partition=0):
    """(c, m) by the sum over all fine voxels in double precision, each with its own simulated fingerprint."""
    signal = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol, scene.b1)[:, time_point]
    index = np.unravel_index(scene.index, scene.fine_matrix)
    places = [
        (i - q * (n // 2) - (q - 1) / 2) / q
        for i, q, n in zip(index, scene.supersampling, scene.matrix, strict=True)
    ]
    nz = scene.matrix[0]
    columns = trajectory.astype(np.float64).T
    kx, ky = columns[:2]
    kz = columns[2] if len(columns) == 3 else np.full(len(kx), (partition - nz // 2) / nz)
    phase = kx[:, None] * places[2] + ky[:, None] * places[1] + kz[:, None] * places[0]
    weighted = scene.coils.numpy() * (scene.pd * signal).to(torch.complex128).numpy()
    scale = math.prod(scene.supersampling) * math.sqrt(math.prod(scene.matrix))
    return weighted @ np.exp(-2j * np.pi * phase).T / scale


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"slices": 2, "order": "shuffled"},
        {"matrix": (20, 24, 5), "fov": (40.0, 48.0, 20.0), "points": 14},
        {"supersampling": (3, 1, 2), "schedule": "tgas", "b1": 0.3},
        {"matrix": (21, 19, 1), "fov": (42.0, 38.0, 4.0), "height": 3.0},
        {"matrix": (20, 24, 5), "fov": (40.0, 48.0, 20.0), "points": 14, "volume": "tilted", "trains": 2},
    ],
    ids=["one slice", "two slices", "stack of spirals", "transmit field", "odd matrix", "tilted"],
)
def test_samples_are_the_fourier_sum_of_the_fine_object(tmp_path, phantom, more):
    _, _, head, _, samples, places = scan(tmp_path, phantom, **more)
    settings = SMALL | {"slices": 1, "height": 0.0, "supersampling": 2, "b1": 0.0, "schedule": "jiang"} | more
    protocol = make_schedule(settings["schedule"], settings["points"])
    q = settings["supersampling"]
    thickness = settings["fov"][2]
    # The basis keeps 1 - 1e-9 of the energy of the scan: 3e-5 of its root mean square, in weak readouts too.
    largest = max(np.abs(part).max() for part in samples)
    for row in (0, len(head) // 2 - 1, len(head) - 1):
        counters = {
            name: int(head["idx"][name][row]) for name in ("slice", "repetition", "kspace_encode_step_2")
        }
        scene = scene_of(
            phantom,
            protocol,
            settings["matrix"],
            settings["fov"],
            3,
            supersampling=(q, q, q) if isinstance(q, int) else q[::-1],
            height=1e-3 * (settings["height"] + thickness * (counters["slice"] - settings["slices"] // 2)),
            b1=settings["b1"],
        )
        expected = exact_sample(
            scene, protocol, places[row], counters["repetition"], counters["kspace_encode_step_2"]
        )
        assert np.abs(samples[row] - expected).max() < 5e-5 * largest


def test_point_spread_average_is_the_fourier_sum_of_the_mean_of_each_voxel(tmp_path, phantom):
    _, _, _, _, samples, places = scan(tmp_path, phantom, point_spread="average")
    protocol = make_schedule("jiang", 40)
    scene = scene_of(phantom, protocol, SMALL["matrix"], SMALL["fov"], 3)
    signal = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol)[:, 25]
    image = np.stack([scene.block_mean(scene.embed(part))[0] for part in scene.coils * scene.pd * signal])
    ny, nx = image.shape[1:]
    kx, ky = places[25].astype(np.float64).T
    along_x = np.exp(-2j * np.pi * kx[:, None] * (np.arange(nx) - nx // 2))
    along_y = np.exp(-2j * np.pi * ky[:, None] * (np.arange(ny) - ny // 2))
    expected = np.einsum("cyx,my,mx->cm", image, along_y, along_x) / math.sqrt(ny * nx)
    assert np.abs(samples[25] - expected).max() < 1e-4 * np.abs(expected).max()


def voxels(count, seed=0, b1=None):
    random = np.random.default_rng(seed)
    t1 = np.exp(random.uniform(np.log(0.1), np.log(4.5), count))
    t2 = np.minimum(np.exp(random.uniform(np.log(0.005), np.log(0.3), count)), t1)
    flip = None if b1 is None else torch.tensor(random.uniform(*b1, count), dtype=torch.float32)
    return SimpleNamespace(
        parameters={"t1": torch.tensor(t1).float(), "t2": torch.tensor(t2).float()},
        b1=flip,
        index=np.arange(count),
        pd=torch.ones(count, dtype=torch.complex64),
    )


@pytest.mark.parametrize("b1", [None, (0.95, 1.05)])
def test_tabulated_fingerprints_are_the_simulated_ones(b1):
    scene, protocol = voxels(100, b1=b1), make_schedule("jiang", 120)
    table = tabulate([scene], protocol)[0]
    exact = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol, scene.b1).numpy()
    found = table.combine(table.signals.double().numpy())
    error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert len(table.signals) > 64  # or nothing was interpolated
    assert error.max() < 2e-5


def test_few_values_are_tabulated_exactly():
    scene, protocol = voxels(20), make_schedule("tgas", 60)
    table = tabulate([scene], protocol)[0]
    exact = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol).numpy()
    assert np.abs(table.combine(table.signals.double().numpy()) - exact).max() < 1e-6


def test_scenes_share_their_table():
    both, protocol = [voxels(50, 1), voxels(70, 2)], make_schedule("tgas", 30)
    tables = tabulate(both, protocol)
    assert [table.voxels for table in tables] == [50, 70]
    for scene, table in zip(both, tables, strict=True):
        exact = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol).numpy()
        assert np.abs(table.combine(table.signals.double().numpy()) - exact).max() < 2e-5


def test_basis_keeps_the_energy_that_it_promises():
    scene, protocol = voxels(200), make_schedule("jiang", 120)
    table = tabulate([scene], protocol)[0]
    signal = table.combine(table.signals.double().numpy())
    for lost in (1e-3, 1e-6):
        basis = signal_basis([table], [scene.pd], lost)
        axes = basis.axes.double().numpy()
        assert np.allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-5)
        left = signal - (axes @ basis.coefficients[0].double().numpy()).T
        assert (left**2).sum() < lost * (signal**2).sum()
    assert basis.axes.shape[1] < 40


def test_noise_has_the_level_and_the_correlation_that_are_stated(tmp_path, phantom):
    made, _, _, noise, noisy, _ = scan(tmp_path, phantom, snr=5.0)
    _, _, _, _, clean, _ = scan(tmp_path, phantom, output=tmp_path / "clean.h5")
    lines = np.concatenate([noisy[row] for row in np.flatnonzero(noise)], axis=1)
    assert lines.shape[1] >= 20000
    measured = lines @ lines.conj().T / lines.shape[1]
    assert np.abs(measured - made.noise_covariance).max() < 0.05 * made.noise_deviation**2
    imaging = [noisy[row] for row in np.flatnonzero(~noise)]
    difference = np.concatenate([a - b for a, b in zip(imaging, clean, strict=True)], axis=1)
    measured = difference @ difference.conj().T / difference.shape[1]
    assert np.abs(measured - made.noise_covariance).max() < 0.1 * made.noise_deviation**2


def test_snr_is_the_rms_over_time_in_the_mask_over_the_noise(tmp_path, phantom):
    made, *_ = scan(tmp_path, phantom, snr=5.0)
    protocol = make_schedule("jiang", 40)
    scene = scene_of(phantom, protocol, SMALL["matrix"], SMALL["fov"], 3)
    signal = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, protocol) * scene.pd[:, None]
    images = np.stack([scene.block_mean(scene.embed(part)) for part in signal.T])
    level = np.sqrt((np.abs(images) ** 2).mean(axis=0))[scan_mask(scene)].mean()
    assert made.noise_deviation == pytest.approx(level / 5.0, rel=1e-4)
    assert np.trace(made.noise_covariance).real / 3 == pytest.approx(made.noise_deviation**2)
    energy = (np.abs(images[:, scan_mask(scene)]) ** 2).sum(axis=1)
    assert made.calibration_frame == np.argmax(energy)


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path, phantom):
    contents = []
    for number, seed in enumerate((3, 3, 4)):
        made = scan(
            tmp_path, phantom, seed=seed, snr=5.0, order="shuffled", output=tmp_path / f"{number}.h5"
        )[0]
        contents.append(made.output.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_lines_at_once_change_nothing(tmp_path, phantom, monkeypatch):
    whole = scan(tmp_path, phantom, snr=5.0)[4]
    monkeypatch.setattr(simulation, "LINES_AT_ONCE", 3)
    parts = scan(tmp_path, phantom, snr=5.0, output=tmp_path / "parts.h5")[4]
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_header_tells_the_protocol(tmp_path, phantom):
    _, header, *_ = scan(tmp_path, phantom, slices=2, inversion_efficiency=0.95, inversion_time=0.015)
    context = make_context(header)
    protocol = make_schedule("jiang", 40, inversion_time=0.015, inversion_efficiency=0.95)
    assert context.protocol.sequence == "fisp_mrf"
    for name in ("flip_angle", "repetition_time", "echo_time", "inversion_time"):
        assert np.allclose(getattr(context.protocol, name), getattr(protocol, name), rtol=1e-9)
    assert context.protocol.inversion_efficiency == 0.95
    assert context.encoding.trajectory == "spiral"
    assert context.encoding.matrix == (1, 24, 20) == context.encoding.delivered_matrix
    assert np.allclose(context.encoding.field_of_view, (0.004, 0.048, 0.040))
    assert (context.encoding.slices, context.encoding.coils) == (2, 3)
    assert header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth == 1.0
    limits = header.encoding[0].encodingLimits
    assert limits.repetition.maximum == 39
    assert limits.kspace_encoding_step_1.maximum == 6


def test_acquisitions_follow_the_contract(tmp_path, phantom):
    _, _, head, noise, _, places = scan(tmp_path, phantom, slices=2, snr=10.0)
    assert noise[: noise.sum()].all()
    assert (head["trajectory_dimensions"][noise] == 0).all()
    rows = np.flatnonzero(~noise)
    counters, flags = head["idx"][rows], head["flags"][rows]
    assert np.array_equal(counters["slice"], np.repeat([0, 1], 40))
    assert np.array_equal(counters["repetition"], np.tile(np.arange(40), 2))
    assert np.array_equal(counters["kspace_encode_step_1"], np.tile(np.arange(40) % 7, 2))
    assert (head["trajectory_dimensions"][rows] == 2).all()
    assert (head["center_sample"][rows] == 0).all()
    assert np.allclose(head["sample_time_us"], 2.5)
    last = (flags & flag(ACQ_LAST_IN_MEASUREMENT)) != 0
    assert last[-1]
    assert last.sum() == 1
    assert np.allclose(head["position"][rows][:, 2], np.repeat([-4.0, 0.0], 40))
    time = head["acquisition_time_stamp"][rows].astype(np.int64)
    assert (np.diff(time) > 0).all()
    for row in rows:
        radius = np.hypot(*places[row].T)
        assert radius[0] == 0
        assert radius[-1] == pytest.approx(0.5, abs=1e-6)
        assert radius.max() < 0.50001
    first, same = places[rows[0]], places[rows[7]]
    assert np.array_equal(first, same)  # bitwise, so that repeats can be summed before any transform
    turned = (first[:, 0] + 1j * first[:, 1]) * np.exp(2j * np.pi / 7)
    assert np.allclose(places[rows[1]] @ [1, 1j], turned, atol=1e-6)


def test_partitions_play_the_whole_train(tmp_path, phantom):
    made, header, head, _, _, _ = scan(
        tmp_path, phantom, matrix=(20, 24, 4), fov=(40.0, 48.0, 16.0), points=9, order="shuffled"
    )
    counters = head["idx"]
    assert np.array_equal(counters["kspace_encode_step_2"], np.repeat(np.arange(4), 9))
    assert np.array_equal(counters["repetition"], np.tile(np.arange(9), 4))
    limit = header.encoding[0].encodingLimits.kspace_encoding_step_2
    assert (limit.maximum, limit.center) == (3, 2)
    assert made.lines == 36
    truth = map_volumes(read_images(made.output, "truth"))
    assert truth["T1"].values.shape == (4, 24, 20)


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_tilted_spirals_lie_in_planes_about_kz(tmp_path, phantom, order):
    made, header, head, _, _, places = scan(
        tmp_path,
        phantom,
        matrix=(20, 24, 6),
        fov=(40.0, 48.0, 24.0),
        volume="tilted",
        trains=3,
        slices=2,
        order=order,
    )
    planes = math.ceil(math.pi / 2 * 24)
    assert made.lines == len(head) == 2 * 3 * 40
    assert (head["trajectory_dimensions"] == 3).all()
    assert np.array_equal(head["idx"]["repetition"], np.tile(np.arange(40), 6))
    assert np.array_equal(head["idx"]["slice"], np.repeat([0, 1], 120))
    plane, interleaf = (head["idx"][f"kspace_encode_step_{number}"].astype(int) for number in (2, 1))
    limits = header.encoding[0].encodingLimits
    assert limits.kspace_encoding_step_2 is None  # not every plane comes at every time point
    assert limits.average.maximum == 2
    assert np.array_equal(head["idx"]["average"], np.tile(np.repeat(np.arange(3), 40), 2))
    first = {}
    for row, place in enumerate(places):
        angle = np.pi * plane[row] / planes
        assert np.abs(place[:, 0] * np.sin(angle) - place[:, 1] * np.cos(angle)).max() < 1e-6
        assert np.linalg.norm(place, axis=1)[-1] == pytest.approx(0.5, abs=1e-6)
        same = first.setdefault((plane[row], interleaf[row]), place)
        assert np.array_equal(place, same)  # bitwise
    assert len(set(plane[:40])) >= 30  # planes come evenly
    assert len(set(zip(plane[:120], interleaf[:120], strict=True))) > 90
    for time in range(40):  # a time point sees another plane in each train
        assert len({*plane[time:120:40]}) > 1 or order == "shuffled"


def test_tilted_average_is_the_scan_grid_seen_by_the_same_spirals(tmp_path, phantom):
    more = {"matrix": (20, 24, 6), "fov": (40.0, 48.0, 24.0), "volume": "tilted", "trains": 1, "points": 9}
    fine = scan(tmp_path, phantom, point_spread="average", supersampling=2, **more)[4]
    scene = scene_of(phantom, make_schedule("jiang", 9), more["matrix"], more["fov"], 3)
    signal = CONTRAST_SIGNALS["fisp_mrf"](scene.parameters, make_schedule("jiang", 9))[:, 4]
    centre = [part[:, 0] for part in fine]  # k = 0 sees the sum of all voxels
    expected = (scene.coils * scene.pd * signal).sum(dim=1).numpy() / 8 / math.sqrt(20 * 24 * 6)
    assert np.abs(centre[4] - expected).max() < 5e-5 * np.abs(expected).max()


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
@pytest.mark.parametrize("partitions", [1, 3])
def test_an_undersampled_scan_plays_fewer_spirals_of_the_same_design(tmp_path, phantom, order, partitions):
    grid = {"matrix": (20, 24, partitions), "fov": (40.0, 48.0, 4.0 * partitions)}
    whole, _, all_heads, _, _, all_places = scan(
        tmp_path, phantom, order=order, interleaves=12, points=24, output=tmp_path / "whole.h5", **grid
    )
    part, header, head, _, _, places = scan(
        tmp_path, phantom, order=order, interleaves=12, acquired=3, points=24, **grid
    )
    assert (part.lines, part.acceleration) == (whole.lines, whole.acceleration)
    assert header.encoding[0].encodingLimits.kspace_encoding_step_1.maximum == 11
    curves = {
        int(number): place
        for number, place in zip(all_heads["idx"]["kspace_encode_step_1"], all_places, strict=True)
    }
    number = head["idx"]["kspace_encode_step_1"].reshape(-1, 3)  # passes
    assert all(sorted(passed) == [0, 4, 8] for passed in number.tolist())
    if order == "sequential":
        assert (number == [0, 4, 8]).all()
    else:
        assert len({*map(tuple, number.tolist())}) > 1
    for interleaf, place in zip(number.ravel(), places, strict=True):
        assert np.array_equal(place, curves[int(interleaf)])


def test_acquired_interleaves_are_evenly_spread():
    assert np.array_equal(acquired_interleaves(48, 6), [0, 8, 16, 24, 32, 40])
    assert np.array_equal(acquired_interleaves(7), np.arange(7))
    uneven = acquired_interleaves(48, 7)
    assert set(np.diff([*uneven, 48])) == {6, 7}


def test_orders_of_interleaves():
    assert np.array_equal(interleaf_order("sequential", 6, 4, 1, [0]), [0, 1, 2, 3, 0, 1])
    assert np.array_equal(interleaf_order("sequential", 4, 48, 17, [0]), [0, 17, 34, 3])
    shuffled = interleaf_order("shuffled", 100, 48, 1, [0])
    assert sorted(shuffled[:48]) == sorted(shuffled[48:96]) == list(range(48))
    assert not np.array_equal(shuffled[:48], shuffled[48:96])
    assert (np.diff(shuffled[:48]) != 1).any()
    assert not np.array_equal(shuffled, interleaf_order("shuffled", 100, 48, 1, [1]))


def test_calibration_comes_first_at_low_resolution(tmp_path, phantom):
    made, header, head, _, samples, places = scan(
        tmp_path, phantom, calibration="separate", calibration_radius=0.2, slices=2
    )
    calibrating = (head["flags"] & flag(ACQ_IS_PARALLEL_CALIBRATION)) != 0
    assert np.array_equal(np.flatnonzero(calibrating), [*range(7), *range(47, 54)])
    assert (head["idx"]["repetition"][calibrating] == made.calibration_frame).all()
    assert header.encoding[0].parallelImaging.calibrationMode.value == "separate"
    protocol = make_schedule("jiang", 40)
    for row in (0, 50):
        radius = np.hypot(*places[row].T)
        assert radius[-1] >= 0.2 > radius[-2]
        scene = scene_of(
            phantom,
            protocol,
            SMALL["matrix"],
            SMALL["fov"],
            3,
            height=4e-3 * (int(head["idx"]["slice"][row]) - 1),
        )
        expected = exact_sample(scene, protocol, places[row], made.calibration_frame)
        assert np.abs(samples[row] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("phases", [180.0 * (np.arange(10) % 2), 10.0 * np.arange(10) ** 2 % 360])
def test_phases_of_the_pulses_are_told_and_played(tmp_path, phantom, phases):
    schedule = tmp_path / "schedule.csv"
    lines = [f"{20 + number},12,{phase}" for number, phase in enumerate(phases)]
    schedule.write_text("\n".join(["flip_angle_deg,tr_ms,phase_deg", *lines]))
    _, header, _, _, samples, places = scan(tmp_path, phantom, schedule=schedule, points=None)
    protocol = make_context(header).protocol
    assert np.allclose(protocol.rf_phase, np.radians(phases))
    scene = scene_of(phantom, protocol, SMALL["matrix"], SMALL["fov"], 3)
    for row in (2, 9):
        expected = exact_sample(scene, protocol, places[row], row)
        assert np.abs(samples[row] - expected).max() < 1e-4 * np.abs(expected).max()


def test_truth_holds_the_maps_of_a_fingerprint(tmp_path, phantom):
    made, *_ = scan(tmp_path, phantom, supersampling=1, snr=20.0)
    truth = map_volumes(read_images(made.output, "truth"))
    assert set(truth) == {"T1", "T2", "PD", "MASK", "WM", "GM", "CSF"}
    scene = scene_of(phantom, make_schedule("jiang", 40), SMALL["matrix"], SMALL["fov"], 3, (1, 1, 1))
    inside = scan_mask(scene)
    for role, name in (("T1", "t1"), ("T2", "t2")):
        expected = 1e3 * getattr(scene.fine, name)
        assert np.allclose(truth[role].values[inside], expected[inside], rtol=1e-5)


def test_the_true_transmit_field_is_written_where_asked(tmp_path, phantom):
    path = tmp_path / "b1.npz"
    made, header, *_ = scan(tmp_path, phantom, b1=0.3, slices=2, b1_map=path, supersampling=1)
    found = np.load(path)["b1"]
    assert found.shape == (2, 1, 24, 20)
    protocol = make_schedule("jiang", 40)
    scene = scene_of(
        phantom, protocol, SMALL["matrix"], SMALL["fov"], 3, (1, 1, 1), b1=0.3
    )  # slice 1 is at 0
    assert np.allclose(found[1].ravel()[scene.index], scene.b1)
    assert found.std() > 0.01
    assert (np.delete(found[1].ravel(), scene.index) == 1).all()
    assert np.allclose(read_b1_map(str(path), make_context(header)), found)
    with pytest.raises(ScanError, match=r"b1\.npz exists"):
        scan(tmp_path, phantom, b1_map=path, output=tmp_path / "other.h5")
    with pytest.raises(ScanError, match=r"cannot write .*nowhere/b1.npz: No such file"):
        scan(tmp_path, phantom, b1_map=tmp_path / "nowhere" / "b1.npz", output=tmp_path / "other.h5")
    assert made.output.exists()


@pytest.mark.parametrize(("height", "plate"), [(0.0, "t2"), (20.0, "t1")])
def test_a_slice_through_a_plate_of_the_nist_phantom(tmp_path, height, plate):
    made = simulate_fingerprint(
        output=tmp_path / "raw.h5",
        phantom="nist",
        height=height,
        points=8,
        matrix=(112, 112, 1),
        coils=1,
        supersampling=1,
        snr=None,
    )
    truth = map_volumes(read_images(made.output, "truth"))
    found, reference = truth["SPHERES"].values, reference_values(plate)
    for sphere in range(14):
        inside = found == sphere_number(plate, sphere + 1)
        assert inside.sum() > 20
        for role, name in (("T1", "t1"), ("T2", "t2")):
            assert np.allclose(truth[role].values[inside], 1e3 * reference[name][sphere], rtol=1e-5)
    assert set(np.unique(found)) == {0, *(sphere_number(plate, sphere + 1) for sphere in range(14))}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"order": "random"}, "order is 'random'"),
        ({"interleaves": 0}, "interleaves is 0"),
        ({"interleaves": 48, "step": 6}, "not all of 48 interleaves"),
        ({"interleaves": 48, "acquired": 6, "step": 3}, "not all of 6 interleaves"),
        ({"acquired": 0}, "acquired is 0; of 7 interleaves it must be 1..7"),
        ({"acquired": 8}, "acquired is 8; of 7 interleaves it must be 1..7"),
        (
            {"matrix": (20, 24, 4), "fov": (40.0, 48.0, 16.0), "volume": "tilted", "acquired": 3},
            "undersampled by fewer trains",
        ),
        ({"order": "shuffled", "step": 5}, "belongs to the order sequential"),
        ({"points": 1}, "points is 1"),
        ({"points": 2}, "2 time points; fisp_mrf needs three or more to tell T1, T2 and PD"),
        ({"inversion_time": 1e-4}, "no header can say this inversion time: TI of 0.1 makes no sense in ms"),
        ({"volume": "ball"}, "volume is 'ball'"),
        ({"volume": "tilted"}, "the matrix has one partition"),
        ({"trains": 2}, "belongs to tilted"),
        ({"volume": "tilted", "trains": 0, "matrix": (20, 24, 4)}, "trains is 0"),
        ({"volume": "tilted", "calibration": "separate", "matrix": (20, 24, 4)}, "not with tilted"),
        ({"schedule": "yang"}, "neither jiang, tgas nor a FILE.csv"),
        ({"calibration": "embedded"}, "calibration is 'embedded'"),
        ({"calibration_radius": 0.7}, "calibration_radius is 0.7"),
        ({"point_spread": "box"}, "point spread is 'box'"),
        ({"matrix": (20, 20, 1)}, "not square"),
        ({"echo_time": 0.02}, "echo time 20 ms"),
        ({"inversion_time": -1.0}, "inversion time -1000 ms"),
        ({"inversion_efficiency": 1.5}, "inversion_efficiency is 1.5"),
        ({"height": 500.0}, "inside the field of view"),
        ({"height": math.nan}, "height is nan"),
        ({"snr": 1e30}, r"snr is 1e\+30"),
        ({"b1": 5.0}, "b1 is 5"),
        ({"snr": -1.0}, "snr is -1"),
        ({"interleaves": 1, "matrix": (400, 480, 1)}, "use more interleaves"),
    ],
)
def test_arguments_that_make_no_scan_are_refused(tmp_path, phantom, more, sentence):
    with pytest.raises(ScanError, match=sentence):
        scan(tmp_path, phantom, **more)
    assert not list(tmp_path.glob("raw*"))


def test_a_phantom_without_t2_is_refused(tmp_path):
    with np.load(write_phantom(tmp_path / "whole.npz")) as whole:
        np.savez(tmp_path / "less.npz", **{name: whole[name] for name in whole if name != "t2"})
    with pytest.raises(ScanError, match="no 't2', which fisp_mrf needs"):
        scan(tmp_path, tmp_path / "less.npz")


def test_an_existing_file_is_kept(tmp_path, phantom):
    (tmp_path / "raw.h5").write_text("mine")
    with pytest.raises(ScanError, match="exists"):
        scan(tmp_path, phantom)
    assert (tmp_path / "raw.h5").read_text() == "mine"
