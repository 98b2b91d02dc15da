"""Simulated scans: the Fourier sum, noise, acceleration, SNR, truth, and the ISMRMRD contract."""

import dataclasses
import math

import h5py
import ismrmrd
import numpy as np
import pytest
import torch

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, parse_header
from quantitron.gadgets.image_file import read_images
from quantitron.phantoms import simulate as simulation
from quantitron.phantoms.acquisition_order import flag
from quantitron.phantoms.anatomy import Anatomy
from quantitron.phantoms.encode import contrast_parts, encode
from quantitron.phantoms.protocols import make_protocol
from quantitron.phantoms.scene import FieldSettings, brightest_frame, make_scene
from quantitron.phantoms.simulate import simulate
from quantitron.phantoms.truth import truth_maps
from quantitron.recon.signal.models import signal

SHORT = {
    "vfa_gre": {"flip_angles": (math.radians(5), math.radians(25)), "echo_times": (2e-3, 6e-3, 12e-3)},
    "t2ir_gre": {"excitations": 5, "echo_times": (3e-3, 9e-3), "preparation_times": (0.02, 0.06, 0.09)},
    "megre": {"echo_times": (4e-3, 9e-3, 14e-3)},
}


def write_phantom(path, shape=(8, 24, 20), voxel=(0.004, 0.002, 0.002), **more):
    """An ellipsoid of two tissues with smooth variation."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2) for n in shape], indexing="ij")
    inside = (z**2 + y**2 + x**2) < 0.8
    inner = (y + 0.2) ** 2 + x**2 < 0.2
    ripple = 1 + 0.05 * np.sin(5 * x + 3 * y + 2 * z)
    content = {
        "t1": np.where(inner, 0.8, 1.4) * ripple,
        "t2": np.where(inner, 0.06, 0.09) * ripple,
        "t2star": np.where(inner, 0.045, 0.06) * ripple,
        "pd": np.where(inside, np.where(inner, 0.7, 0.85) * ripple, 0),
        "labels": np.where(inside, np.where(inner, 3, 2), 0),
        "voxel_size": np.array(voxel),
    }
    np.savez(path, **(content | more))
    return path


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "phantom.npz")


SMALL = {"matrix": (20, 24, 8), "fov": (40.0, 48.0, 32.0), "supersampling": 1}


def read_raw(path):
    with h5py.File(path) as file:
        rows = file["dataset/data"][()]
        header = parse_header(file["dataset/xml"][0])
    heads = rows["head"]
    channels, points = int(heads["active_channels"][0]), int(heads["number_of_samples"][0])
    data = np.stack(rows["data"]).view(np.complex64).reshape(len(rows), channels, points)
    return header, heads, data


def has(heads, bit):
    return (heads["flags"] & flag(bit)) != 0


def images_of(path, slice_index=0):
    """Coil images (w, e, c, z, y, x) of a fully sampled file, and its protocol."""
    header, heads, data = read_raw(path)
    context = make_context(header)
    keep = ~has(heads, ismrmrd.ACQ_IS_NOISE_MEASUREMENT) & ~has(heads, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
    keep &= heads["idx"]["slice"] == slice_index
    heads, data = heads[keep], data[keep]
    _, taus, echoes = context.protocol.contrast_shape
    index = heads["idx"]
    ti = index[context.axes["ti"]].astype(int) if "ti" in context.axes else 0
    tau = index[context.axes["tau"]].astype(int) if "tau" in context.axes else 0
    nz, ny, nx = context.encoding.matrix
    grid = np.zeros(
        (context.protocol.contrasts, echoes, data.shape[1], nz, ny, data.shape[2]), dtype=np.complex64
    )
    grid[
        ti * taus + tau,
        index["contrast"],
        :,
        index["kspace_encode_step_2"],
        index["kspace_encode_step_1"],
    ] = data
    axes = (3, 4, 5)
    image = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(grid, axes), axes=axes, norm="ortho"), axes)
    start = data.shape[2] // 2 - nx // 2
    return image[..., start : start + nx], context.protocol


def truth_of(path):
    return {image.meta["GADGETRON_DataRole"]: image.data[0] for image in read_images(path, "truth")}


# ------------------------------------------------------------------------------------------------ Fourier sum


def lone_voxel(shape, place, value=1.0):
    pd = np.zeros(shape, dtype=np.complex64)
    pd[place] = value
    mask = pd != 0
    long = np.full(shape, 1e6, dtype=np.float32)
    return Anatomy(
        pd=pd, voxel_size=(1e-3,) * 3, mask=mask, labels=mask.astype(int), t2star=long, b0=np.zeros(shape)
    )


@pytest.mark.parametrize("matrix", [(4, 6, 8), (1, 7, 5)])
def test_a_point_gives_the_phase_of_the_contract(matrix):
    """s(k) = sum_r I(r) exp(-2 pi i k.r), voxel i at i - n // 2, unitary; readout oversampled twice."""
    nz, ny, nx = matrix
    place = (nz - 1, 1, nx - 2)
    protocol = make_protocol("megre")
    extent = (1e-3 * nz, 1e-3 * ny, 1e-3 * nx)
    scene = make_scene(
        lone_voxel(matrix, place, 2 - 1j), protocol, matrix, extent, coils=1, supersampling=(1, 1, 1)
    )
    encoded = encode(scene, protocol, [0], [0], 2 * nx)
    kz, ky = (part.ravel() for part in np.meshgrid(np.arange(nz), np.arange(ny), indexing="ij"))
    zero = torch.zeros(nz * ny, dtype=torch.int64)
    lines = encoded.lines(zero, zero, torch.from_numpy(kz), torch.from_numpy(ky)).numpy()[:, 0]
    kx = np.arange(2 * nx)
    turns = ((kz - nz // 2) / nz * (place[0] - nz // 2) + (ky - ny // 2) / ny * (place[1] - ny // 2))[
        :, None
    ] + ((kx - nx) / (2 * nx) * (place[2] - nx // 2))[None, :]
    expected = (2 - 1j) * np.exp(-2j * np.pi * turns) / np.sqrt(nz * ny * 2 * nx)
    assert np.abs(lines - expected).max() < 1e-6


@pytest.mark.parametrize("supersampling", [2, (2, 3, 1)])
def test_averaging_gives_the_mean_of_each_voxel_and_truncation_rings(tmp_path, phantom, supersampling):
    """Full and noise-free: every coil image is the block mean of the fine images, or only near it."""
    matrix, fov = (11, 12, 4), (44.0, 48.0, 32.0)
    q = (supersampling,) * 3 if isinstance(supersampling, int) else supersampling
    arguments = SHORT["t2ir_gre"] | {"matrix": matrix, "fov": fov, "coils": 2, "snr": None}
    protocol = make_protocol("t2ir_gre", **SHORT["t2ir_gre"])
    scene = make_scene(
        simulation.load_anatomy(phantom), protocol, matrix[::-1], (0.032, 0.048, 0.044), coils=2,
        supersampling=q[::-1],
    )  # fmt: skip
    expected = np.stack(
        [
            scene.block_mean(scene.embed(scene.contrast(protocol)[:, w] * scene.echo(protocol, e) * coil))
            for w in range(protocol.contrasts)
            for e in range(protocol.echoes)
            for coil in scene.coils
        ]
    )
    errors = {}
    for spread in ("average", "truncation"):
        output = tmp_path / f"{spread}.h5"
        simulate(
            sequence="t2ir_gre", output=output, phantom=phantom, supersampling=supersampling,
            point_spread=spread, **arguments,
        )  # fmt: skip
        image = images_of(output)[0].reshape(expected.shape)
        errors[spread] = np.abs(image - expected).max() / np.abs(expected).max()
    assert errors["average"] < 1e-5
    assert errors["truncation"] > 0.02


def test_fine_voxels_fill_their_scan_voxel_symmetrically():
    """A scan voxel filled by 2 x 2 x 2 equal fine ones has the phase of its centre and the mean as its DC."""
    matrix = (4, 4, 6)
    pd = np.zeros((8, 8, 12), dtype=np.complex64)
    pd[2:4, 4:6, 8:10] = 3.0  # scan voxel (1, 2, 4)
    anatomy = dataclasses.replace(lone_voxel(pd.shape, (2, 4, 8)), pd=pd)
    protocol = make_protocol("megre")
    scene = make_scene(anatomy, protocol, matrix, (8e-3, 8e-3, 12e-3), coils=1, supersampling=(2, 2, 2))
    encoded = encode(scene, protocol, [0], [0], 6)
    kz, ky = (part.ravel() for part in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))
    zero = torch.zeros(16, dtype=torch.int64)
    lines = encoded.lines(zero, zero, torch.from_numpy(kz), torch.from_numpy(ky)).numpy()[:, 0]
    k = [(kz - 2)[:, None] / 4, (ky - 2)[:, None] / 4, (np.arange(6) - 3)[None, :] / 6]
    centre = np.exp(-2j * np.pi * (k[0] * (1 - 2) + k[1] * (2 - 2) + k[2] * (4 - 3)))
    blur = np.prod(np.broadcast_arrays(*[np.cos(np.pi * part / 2) for part in k]), axis=0)
    assert np.abs(lines - 3.0 * centre * blur / np.sqrt(96)).max() < 1e-6


def test_off_resonance_within_a_voxel_dephases_it():
    """Fine voxels at +-f Hz beside each other: the mean signal is cos(2 pi f TE)."""
    shape, frequency = (2, 8, 8), 15.0
    pd = np.ones(shape, dtype=np.complex64)
    b0 = np.tile([frequency, -frequency], (2, 8, 4)).astype(np.float32)
    anatomy = dataclasses.replace(lone_voxel(shape, (0, 0, 0)), pd=pd, b0=b0)
    protocol = make_protocol("megre", echo_times=(5e-3, 20e-3))
    scene = make_scene(anatomy, protocol, (2, 8, 4), (2e-3, 8e-3, 8e-3), coils=1, supersampling=(1, 1, 2))
    encoded = encode(scene, protocol, [0], [0, 1], 4)
    index = torch.tensor([0, 1])
    centre = torch.tensor([1, 1]), torch.tensor([4, 4])
    dc = encoded.lines(torch.zeros(2, dtype=torch.int64), index, *centre)[:, 0, 2].numpy() / np.sqrt(64)
    assert np.allclose(dc, np.cos(2 * np.pi * frequency * np.array([5e-3, 20e-3])), atol=1e-5)


def test_contrasts_are_factored_without_loss(phantom):
    protocol = make_protocol("t2ir_gre", excitations=40)
    anatomy = simulation.load_anatomy(phantom)
    scene = make_scene(anatomy, protocol, (8, 24, 20), (0.032, 0.048, 0.04), coils=2)
    contrasts = list(range(0, 160, 4))
    basis, parts = contrast_parts(scene, protocol, contrasts)
    exact = scene.contrast(protocol)[:, contrasts]
    assert basis.shape[1] < 12
    assert torch.linalg.norm(parts.T @ basis.T - exact) < 3e-6 * torch.linalg.norm(exact)


# -------------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre", "megre"])
def test_full_noise_free_scan_holds_the_truth(tmp_path, phantom, sequence):
    """An inverse transform of the file gives the signal model of the truth, in every frame and voxel."""
    output = tmp_path / "raw.h5"
    simulate(sequence=sequence, output=output, phantom=phantom, coils=1, snr=None, **SMALL, **SHORT[sequence])
    image, protocol = images_of(output)
    truth = truth_of(output)
    known = np.isfinite(truth["T2STAR"])
    parameters = {
        "t1": truth.get("T1", truth["T2STAR"]) / 1e3,
        "t2": truth.get("T2", truth["T2STAR"]) / 1e3,
        "t2star": truth["T2STAR"] / 1e3,
        "b0": truth["FREQMAP"],
        "inversion": truth.get("INVERSION", truth["T2STAR"]),
    }
    tensors = {name: torch.from_numpy(values[known]) for name, values in parameters.items()}
    pd = (truth["PD"] * np.exp(1j * truth["PHASE"]))[known]
    expected = (signal(tensors, protocol).numpy() * pd[:, None]).T  # (t, v)
    found = image[:, :, 0].reshape(protocol.frames, *known.shape)[:, known]
    scale = np.vdot(expected, found) / np.vdot(expected, expected)  # PD is relative
    assert abs(scale.imag) < 1e-5 * abs(scale.real)
    assert np.abs(found - scale * expected).max() < 1e-4 * np.abs(found).max()
    # By a straight line through the logarithms, T2* of every voxel.
    time = np.array(protocol.echo_time)
    decay = np.linalg.norm(found.reshape(protocol.contrasts, protocol.echoes, -1), axis=0)
    rate = -np.polyfit(time, np.log(decay), 1)[0]
    assert np.allclose(1e3 / rate, truth["T2STAR"][known], rtol=1e-3)
    assert np.abs(image[:, :, 0][..., ~known]).max() < 1e-5 * np.abs(image).max()


def test_coil_images_combine_to_the_object(tmp_path, phantom):
    arguments = {"sequence": "megre", "phantom": phantom, "snr": None, **SMALL, **SHORT["megre"]}
    simulate(output=tmp_path / "one.h5", coils=1, **arguments)
    simulate(output=tmp_path / "eight.h5", coils=8, **arguments)
    one, eight = images_of(tmp_path / "one.h5")[0], images_of(tmp_path / "eight.h5")[0]
    combined = np.sqrt(np.sum(np.abs(eight) ** 2, axis=2))
    assert np.allclose(combined, np.abs(one[:, :, 0]), atol=1e-5 * np.abs(one).max())


def test_truth_of_a_coarser_scan_averages(tmp_path, phantom):
    output = tmp_path / "raw.h5"
    simulate(
        sequence="megre",
        output=output,
        phantom=phantom,
        matrix=(10, 12, 4),
        fov=(40.0, 48.0, 32.0),
        snr=None,
        **SHORT["megre"],
    )
    with np.load(phantom) as fine:
        weight = (fine["pd"] > 0) * 1.0
        inside = fine["labels"] > 0
        log = np.where(inside, np.log(fine["t2star"]), 0)
    truth = truth_of(output)

    def blocks(values):
        return values.reshape(4, 2, 12, 2, 10, 2).mean(axis=(1, 3, 5))

    full = blocks(inside) == 1
    assert full.sum() > 50
    # Steady-state weighting varies PD within a block by a few per cent only.
    expected = 1e3 * np.exp(blocks(log * weight))
    assert np.allclose(truth["T2STAR"][full], expected[full], rtol=0.01)
    assert np.array_equal(truth["MASK"] > 0, blocks(inside) >= 0.5)
    assert np.isnan(truth["T2STAR"][blocks(inside) == 0]).all()
    assert np.allclose(truth["WM"] + truth["GM"], blocks(inside), atol=1e-6)
    assert np.percentile(truth["PD"][truth["MASK"] > 0], 99) == pytest.approx(1000, rel=1e-3)


def test_nist_truth_numbers_the_spheres(tmp_path):
    output = tmp_path / "nist.h5"
    simulate(sequence="megre", output=output, phantom="nist", matrix=(56, 56, 16), coils=2, acceleration=6)
    truth = truth_of(output)
    spheres = truth["SPHERES"]
    assert set(np.unique(spheres)) == set(range(43))
    # 2 ms of T2 plate sphere 14 to 470 ms: relative to the object's own values, spheres are homogeneous.
    assert truth["T2STAR"][spheres == 28] == pytest.approx(1e3 / (1e3 / 5.59 + 2), rel=1e-4)
    assert truth["T2STAR"][spheres == 1] == pytest.approx(1e3 / (1e3 / 1465 + 2), rel=1e-4)
    assert "WM" not in truth


# ---------------------------------------------------------------------------------------------- noise and SNR


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, phantom):
    """The same scan with and without noise."""
    folder = tmp_path_factory.mktemp("noisy")
    arguments = {
        "sequence": "vfa_gre",
        "phantom": phantom,
        "coils": 6,
        "seed": 3,
        **SMALL,
        **SHORT["vfa_gre"],
    }
    with_noise = simulate(output=folder / "noisy.h5", snr=25.0, **arguments)
    simulate(output=folder / "clean.h5", snr=None, **arguments)
    return folder, with_noise


def test_noise_has_the_covariance_that_is_reported(noisy):
    folder, result = noisy
    _, heads, data = read_raw(folder / "noisy.h5")
    noise_only = has(heads, ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    count = int(noise_only.sum())
    assert count == result.noise_lines > 0
    assert noise_only[:count].all()  # the noise scan comes first
    _, clean_heads, clean = read_raw(folder / "clean.h5")
    assert not has(clean_heads, ismrmrd.ACQ_IS_NOISE_MEASUREMENT).any()
    expected = result.noise_covariance
    assert np.trace(expected).real / 6 == pytest.approx(result.noise_deviation**2)
    for samples in (data[:count], data[count:] - clean):
        flat = samples.transpose(1, 0, 2).reshape(6, -1)
        found = flat @ flat.conj().T / flat.shape[1]
        assert np.abs(found - expected).max() < 0.04 * np.abs(expected).max()
        # Circular: no correlation without conjugation.
        assert np.abs(flat @ flat.T / flat.shape[1]).max() < 0.04 * np.abs(expected).max()
    # White over the whole oversampled readout, in image space too.
    difference = np.fft.ifft(data[count:] - clean, axis=-1, norm="ortho")
    power = np.mean(np.abs(difference) ** 2, axis=(0, 1))
    assert np.allclose(power, result.noise_deviation**2, rtol=0.12)


def test_truth_of_pd_is_that_of_whitened_channels(phantom):
    """PD times the root-sum-of-squares of the coil maps once the noise has unit covariance."""
    protocol = make_protocol("megre", **SHORT["megre"])
    scene = make_scene(
        simulation.load_anatomy(phantom),
        protocol,
        (8, 24, 20),
        (0.032, 0.048, 0.04),
        coils=3,
        supersampling=(1, 1, 1),
    )
    covariance = np.array([[2.0, 0.3j, 0], [-0.3j, 1.0, 0.1], [0, 0.1, 0.5]], dtype=complex)
    plain, whitened = truth_maps(scene, "megre"), truth_maps(scene, "megre", covariance)
    coils = scene.coils.numpy().astype(complex)
    profile = np.sqrt(np.einsum("cv,cd,dv->v", coils.conj(), np.linalg.inv(covariance), coils).real)
    inside = plain["mask"] > 0
    np.testing.assert_allclose(
        whitened["pd"][inside], (plain["pd"] * scene.block_mean(scene.embed(profile)))[inside], rtol=1e-4
    )
    np.testing.assert_array_equal(whitened["t2star"][inside], plain["t2star"][inside])
    assert profile.std() > 0.01 * profile.mean()


def test_snr_is_that_of_the_contract(noisy):
    """Mean over the mask of the combined brightest frame over the noise of an average channel."""
    folder, result = noisy
    image, protocol = images_of(folder / "clean.h5")
    combined = np.sqrt(np.sum(np.abs(image) ** 2, axis=2))
    mask = truth_of(folder / "clean.h5")["MASK"] > 0
    levels = combined[..., mask].mean(axis=-1)
    assert levels.max() / result.noise_deviation == pytest.approx(25.0, rel=1e-3)
    assert np.argmax(levels.ravel()) == result.calibration_frame
    assert protocol.frames == 6


def test_snr_holds_for_a_finer_object(tmp_path, phantom):
    arguments = {"sequence": "megre", "phantom": phantom, "matrix": (10, 12, 4), "fov": (40.0, 48.0, 32.0)}
    result = simulate(output=tmp_path / "noisy.h5", snr=10.0, **arguments)
    simulate(output=tmp_path / "clean.h5", snr=math.inf, **arguments)
    image, _ = images_of(tmp_path / "clean.h5")
    mask = truth_of(tmp_path / "clean.h5")["MASK"] > 0
    level = np.sqrt(np.sum(np.abs(image[0, 0]) ** 2, axis=0))[mask].mean()
    assert level / result.noise_deviation == pytest.approx(10.0, rel=0.05)  # truncation alone differs


def test_brightest_frame_of_an_inversion_is_not_the_first(phantom):
    protocol = make_protocol("t2ir_gre", excitations=60)
    scene = make_scene(simulation.load_anatomy(phantom), protocol, (8, 24, 20), (0.032, 0.048, 0.04), coils=1)
    contrast, echo, level = brightest_frame([scene], protocol)
    assert echo == 0
    assert contrast // 4 in (0, 59)
    assert level > 0


# ----------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre", "megre"])
@pytest.mark.parametrize("calibration", ["embedded", "separate", "none"])
def test_file_keeps_the_contract(tmp_path, phantom, sequence, calibration):
    output = tmp_path / "raw.h5"
    result = simulate(
        sequence=sequence,
        output=output,
        phantom=phantom,
        coils=3,
        acceleration=4.0,
        calibration=calibration,
        calibration_lines=(6, 4),
        **SMALL,
        **SHORT[sequence],
    )
    header, heads, data = read_raw(output)
    context = make_context(header)
    protocol = make_protocol(sequence, **SHORT[sequence])
    assert context.protocol.sequence == sequence
    assert np.allclose(context.protocol.echo_time, protocol.echo_time)
    assert np.allclose(context.protocol.flip_angle, protocol.flip_angle)
    assert context.protocol.contrast_shape == protocol.contrast_shape
    assert context.protocol.inversion_efficiency is None
    assert context.encoding.matrix == (8, 24, 20)
    assert header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth == 1.0
    assert header.subjectInformation is None
    assert header.studyInformation is None
    assert data.shape[1:] == (3, 40)
    assert (heads["center_sample"] == 20).all()
    assert np.array_equal(heads["scan_counter"], np.arange(len(heads)))

    noise = has(heads, ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    lines = heads[~noise]
    assert len(lines) == result.lines == round(protocol.frames * 192 / 4.0)
    separate = has(lines, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION)
    embedded = has(lines, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    assert separate.sum() == (24 if calibration == "separate" else 0)
    assert embedded.sum() == (24 if calibration == "embedded" else 0)
    assert np.flatnonzero(has(heads, ismrmrd.ACQ_LAST_IN_MEASUREMENT)).tolist() == [len(heads) - 1]
    index = lines["idx"]
    ti, tau, te = protocol.contrast_shape
    for axis, length in (("ti", ti), ("tau", tau), ("te", te)):
        if axis in context.axes:
            assert np.unique(index[context.axes[axis]]).tolist() == list(range(length))
    for bit, count in (
        (ismrmrd.ACQ_FIRST_IN_SLICE, 1),
        (ismrmrd.ACQ_LAST_IN_SLICE, 1),
        (ismrmrd.ACQ_FIRST_IN_CONTRAST, te),
        (ismrmrd.ACQ_LAST_IN_CONTRAST, te),
    ):
        assert has(lines, bit).sum() == count
    # Time runs forward, within a shot echo after echo.
    imaging = lines[~separate]
    stamps = imaging["acquisition_time_stamp"].astype(int)
    assert (np.diff(stamps) >= 0).all()
    assert np.allclose(lines["slice_dir"], (0, 0, 1))


def test_inversion_efficiency_is_stated_only_if_asked(tmp_path, phantom):
    arguments = {"sequence": "t2ir_gre", "phantom": phantom, "coils": 1, "inversion_efficiency": 0.9, **SMALL}
    for name, state in (("silent", False), ("stated", True)):
        output = tmp_path / f"{name}.h5"
        simulate(output=output, acceleration=3.0, state_efficiency=state, **arguments, **SHORT["t2ir_gre"])
        found = make_context(read_raw(output)[0]).protocol.inversion_efficiency
        assert found == (0.9 if state else None)
        truth = truth_of(output)["INVERSION"]
        assert np.allclose(truth[np.isfinite(truth)], 0.9)


def test_same_seed_same_bytes(tmp_path, phantom):
    arguments = {"sequence": "vfa_gre", "phantom": phantom, "coils": 2, "acceleration": 3.0, **SMALL}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        simulate(output=tmp_path / f"{name}.h5", seed=seed, **arguments, **SHORT["vfa_gre"])
    a, b, c = ((tmp_path / f"{name}.h5").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_batch_size_changes_nothing(tmp_path, phantom, monkeypatch):
    arguments = {"sequence": "t2ir_gre", "phantom": phantom, "coils": 2, "acceleration": 3.0, **SMALL}
    simulate(output=tmp_path / "a.h5", **arguments, **SHORT["t2ir_gre"])
    monkeypatch.setattr(simulation, "LINES_AT_ONCE", 37)
    simulate(output=tmp_path / "b.h5", **arguments, **SHORT["t2ir_gre"])
    (_, heads_a, a), (_, heads_b, b) = read_raw(tmp_path / "a.h5"), read_raw(tmp_path / "b.h5")
    assert np.array_equal(heads_a, heads_b)
    assert np.abs(a - b).max() < 1e-6 * np.abs(a).max()


def test_slices_lie_beside_each_other(tmp_path, phantom):
    output = tmp_path / "raw.h5"
    arguments = {"sequence": "megre", "phantom": phantom, "coils": 1, "snr": None, "supersampling": 1}
    simulate(
        output=output, matrix=(20, 24, 1), fov=(40.0, 48.0, 4.0), slices=3, **arguments, **SHORT["megre"]
    )
    _, heads, _ = read_raw(output)
    for number in range(3):
        position = np.unique(heads["position"][heads["idx"]["slice"] == number], axis=0)
        assert np.allclose(position, [[0, 0, 4.0 * (number - 1)]])
    # Each slice is one plane of the object: the fields and PD of a 3D scan of the same planes.
    simulate(
        output=tmp_path / "slab.h5",
        **SMALL,
        **{k: v for k, v in arguments.items() if k != "supersampling"},
        **SHORT["megre"],
    )
    slab, slices = truth_of(tmp_path / "slab.h5"), truth_of(output)
    assert slices["T2STAR"].shape == (3, 24, 20)
    for role in ("T2STAR", "FREQMAP", "PHASE"):
        assert np.allclose(slices[role], slab[role][3:6], rtol=1e-4, atol=1e-3, equal_nan=True)


def test_transmit_field_changes_the_flip_angle(phantom):
    anatomy = simulation.load_anatomy(phantom)
    protocol = make_protocol("vfa_gre")
    grid = ((8, 24, 20), (0.032, 0.048, 0.04))
    plain = make_scene(anatomy, protocol, *grid, coils=1, supersampling=(1, 1, 1))
    stronger = dataclasses.replace(anatomy, b1=np.full(anatomy.shape, 1.1, np.float32))
    scaled = make_scene(stronger, protocol, *grid, coils=1, supersampling=(1, 1, 1))
    at_11 = make_protocol("vfa_gre", flip_angles=tuple(1.1 * angle for angle in protocol.flip_angle))
    assert plain.b1 is None
    assert torch.allclose(scaled.contrast(protocol), plain.contrast(at_11), rtol=1e-5)
    varied = make_scene(
        anatomy, protocol, *grid, coils=1, supersampling=(1, 1, 1), fields=FieldSettings(b1=0.2)
    )
    assert varied.b1.std() > 0


def test_susceptibility_makes_the_field(phantom):
    anatomy = simulation.load_anatomy(phantom)
    chi = np.zeros(anatomy.shape, np.float32)
    chi[3:5, 10:14, 8:12] = 0.3
    protocol = make_protocol("megre")
    grid = ((8, 24, 20), (0.032, 0.048, 0.04))
    calm = FieldSettings(b0=0.0)
    scene = make_scene(
        dataclasses.replace(anatomy, chi=chi), protocol, *grid, coils=1, supersampling=(1, 1, 1), fields=calm
    )
    field = scene.embed(scene.parameters["b0"])
    assert field[6, 12, 10] > 1  # above the block, along the main field
    assert field[4, 17, 10] < -0.5  # beside it
    plain = make_scene(anatomy, protocol, *grid, coils=1, supersampling=(1, 1, 1), fields=calm)
    assert not plain.parameters["b0"].any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sequence": "epi"}, "no sequence 'epi'"),
        ({"sequence": "fisp_mrf"}, "no sequence 'fisp_mrf'"),
        ({"matrix": (1, 8, 8)}, "matrix is"),
        ({"matrix": (20, 24, 0)}, "matrix is"),
        ({"fov": (40.0, -1.0, 32.0)}, "fov is"),
        ({"coils": 0}, "coils is 0"),
        ({"snr": 0.0}, "snr is 0"),
        ({"snr": 1e30}, r"snr is 1e\+30; it must be at most"),
        ({"b1": -1.0}, "b1 is -1; it must be at least 0 and below 1"),
        ({"b1": 5.0}, "b1 is 5"),
        ({"b0": math.nan}, "b0 is nan"),
        ({"receive_phase": math.inf}, "receive_phase is inf"),
        ({"supersampling": 0}, "supersampling is"),
        ({"point_spread": "gauss"}, "point spread is 'gauss'; it must be one of truncation, average"),
        ({"slices": 0}, "slices is 0"),
        ({"readout_oversampling": 0.5}, "readout_oversampling is 0.5"),
        ({"inversion_efficiency": 1.5}, "inversion_efficiency is 1.5"),
        ({"acceleration": 0.5}, "acceleration is 0.5"),
        ({"excitations": 5}, "has no excitations"),
        ({"echo_times": (5e-3, 4e-3)}, "ascending"),
        ({"echo_times": (5e-3, 60e-3)}, "not shorter than the TR"),
        ({"flip_angles": (0.2,)}, "two flip angles or more"),
        ({"slices": 9}, "nothing of the phantom lies inside"),
    ],
)
def test_impossible_scans_are_refused(tmp_path, phantom, arguments, sentence):
    output = tmp_path / "raw.h5"
    with pytest.raises(ScanError, match=sentence):
        simulate(**({"sequence": "vfa_gre", "output": output, "phantom": phantom, **SMALL} | arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sequence": "vfa_gre", "flip_angles": (0.1, 0.1)}, "vfa_gre needs two that differ to tell T1"),
        (
            {"sequence": "vfa_gre", "flip_angles": (math.pi, 0.2)},
            r"flip angles of 11\.46, 180 degrees .* of this vfa_gre scan do not tell T1: even noise of",
        ),
        ({"sequence": "megre", "echo_times": (2e-3, 2.0000000001e-3)}, "not positive and ascending"),
        ({"sequence": "t2ir_gre", "excitations": 1}, "1 excitation after each preparation"),
        (
            {"sequence": "t2ir_gre", "excitations": 8, "preparation_times": (0.02,)},
            "two that differ to tell T2",
        ),
        (
            {"sequence": "t2ir_gre", "excitations": 8, "inversion_efficiency": 0.0, "state_efficiency": True},
            "without an inversion nothing",
        ),
        (
            {"sequence": "megre", "echo_times": (1e-4, 2e-4), "repetition_time": 5e-4},
            "no header can say this echo time: TE of 0.1, 0.2 makes no sense in ms",
        ),
        (
            {"sequence": "t2ir_gre", "excitations": 8, "preparation_times": (0.0, 4e-4)},
            "no header can say this preparation time",
        ),
    ],
)
def test_scans_that_no_reconstruction_would_take_are_refused(tmp_path, phantom, arguments, sentence):
    """By the check of the reconstruction, before anything is written."""
    with pytest.raises(ScanError, match=sentence):
        simulate(output=tmp_path / "raw.h5", phantom=phantom, **SMALL, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_map_is_named(tmp_path):
    path = write_phantom(tmp_path / "phantom.npz")
    with np.load(path) as content:
        np.savez(tmp_path / "no_t2.npz", **{name: content[name] for name in content.files if name != "t2"})
    with pytest.raises(ScanError, match="no 't2', which t2ir_gre needs"):
        simulate(sequence="t2ir_gre", output=tmp_path / "raw.h5", phantom=tmp_path / "no_t2.npz", **SMALL)
    simulate(
        sequence="megre",
        output=tmp_path / "raw.h5",
        phantom=tmp_path / "no_t2.npz",
        **SMALL,
        **SHORT["megre"],
    )


def test_output_is_whole_or_not_there(tmp_path, phantom, monkeypatch):
    output = tmp_path / "raw.h5"
    arguments = {"sequence": "megre", "output": output, "phantom": phantom, **SMALL, **SHORT["megre"]}
    output.write_text("precious")
    with pytest.raises(ScanError, match="exists"):
        simulate(**arguments)
    assert output.read_text() == "precious"

    def full(self, head, samples):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(simulation.RawFile, "append", full)
        with pytest.raises(ScanError, match="No space left"):
            simulate(overwrite=True, **arguments)
    assert output.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["raw.h5"]
    with pytest.raises(ScanError, match="cannot write"):
        simulate(**(arguments | {"output": tmp_path / "nowhere" / "raw.h5"}))
    with pytest.raises(ScanError, match=r"cannot write .*raw.h5/inside.h5: Not a directory"):
        simulate(**(arguments | {"output": output / "inside.h5"}))
    simulate(overwrite=True, **arguments)
    assert ismrmrd.Dataset(str(output), "dataset", False).read_acquisition(0).active_channels == 8
