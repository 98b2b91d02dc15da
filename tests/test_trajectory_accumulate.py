"""Accumulation of readouts on a trajectory: units, order, dimensions, what is missing and what is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ismrmrd
import ismrmrd.xsd as xsd
import numpy as np
import pytest
import torch
from line_factory import LAST, noise, numbered, recut
from readout_factory import context, fingerprint, images, readouts, spirals, whole_scan

from quantitron.gadgets import trajectory_store
from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, make_header
from quantitron.gadgets.prepare import CompressCoils, NoiseAdjust, RemoveOversampling
from quantitron.gadgets.trajectory_store import SampleStore

CALIBRATION = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION
CALIBRATION_AND_IMAGING = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
NOISE = ismrmrd.ACQ_IS_NOISE_MEASUREMENT


def accumulate(blocks, scan, **settings):
    (result,) = Accumulate(**settings)(blocks, scan)
    return result


def flat(lines: AcquisitionBlock) -> np.ndarray:
    """(c, n) samples, readout after readout."""
    return np.concatenate(list(lines.data), axis=1)


# ---- what is handed on


def test_readouts_stand_in_the_order_in_which_they_came():
    lines = whole_scan(points=6)
    order = np.array([3, 1, 5, 0, 2, 4])
    lines = lines.where(np.ones(6, bool))
    lines = AcquisitionBlock(lines.head[order], lines.data[order], lines.trajectory[order])
    scan = context()
    kspace = accumulate(numbered(lines), scan).kspace
    np.testing.assert_array_equal(kspace.samples.numpy(), flat(lines))
    np.testing.assert_array_equal(kspace.trajectory.numpy(), lines.trajectory.reshape(-1, 2))
    assert kspace.time_point.tolist() == [3, 1, 5, 0, 2, 4]
    assert not any("never came" in note for note in scan.notes)


def test_what_a_scan_becomes():
    lines = whole_scan(points=6)
    scan = context()
    result = accumulate(numbered(lines), scan)
    kspace = result.kspace
    np.testing.assert_array_equal(kspace.samples.numpy(), flat(lines))
    assert kspace.samples.dtype == torch.complex64
    assert kspace.samples.is_contiguous()
    np.testing.assert_array_equal(kspace.trajectory.numpy(), lines.trajectory.reshape(-1, 2))
    assert kspace.readout_length.tolist() == [20] * 6
    assert kspace.time_point.tolist() == list(range(6))
    assert kspace.slice.tolist() == [0] * 6
    assert (kspace.density, kspace.time_points, kspace.grid) == (None, 6, (1, 1, 16, 16))
    assert kspace.energy == pytest.approx(np.sum(np.abs(lines.data) ** 2), rel=1e-6)
    assert result.energy == (kspace.energy,)
    assert (result.reduced, result.navigator, result.calibration) == (None, None, None)
    assert scan.geometry[0] == lines.head[0]
    assert scan.notes == []


def test_readouts_may_differ_in_length():
    short, long = (
        readouts(spirals(3, 11), repetition=range(3)),
        readouts(spirals(3, 17), repetition=[3, 4, 5]),
    )
    kspace = accumulate(numbered(short, long), context()).kspace
    assert kspace.readout_length.tolist() == [11] * 3 + [17] * 3
    np.testing.assert_array_equal(kspace.samples.numpy(), np.hstack([flat(short), flat(long)]))


def test_slices_keep_their_number_and_energy():
    lines = whole_scan(points=4, slices=3)
    scan = context(fingerprint(4), images(slices=3))
    result = accumulate(numbered(lines), scan)
    assert result.kspace.slice.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for index in range(3):
        part = lines.data[4 * index : 4 * index + 4]
        assert result.energy[index] == pytest.approx(np.sum(np.abs(part) ** 2), rel=1e-6)
        assert result.kspace.of_slice(index).energy == pytest.approx(result.energy[index], rel=1e-6)
    assert sorted(scan.geometry) == [0, 1, 2]


def test_slices_that_the_header_does_not_announce():
    header = make_header(images(), fingerprint(4))
    header.encoding[0].encodingLimits.slice = None
    scan = make_context(header)
    assert accumulate(numbered(whole_scan(points=4, slices=3)), scan).kspace.grid == (3, 1, 16, 16)
    assert scan.encoding.slices == 3


def test_the_cut_into_blocks_changes_no_bit(monkeypatch):
    lines = whole_scan(points=6, slices=30, columns=3)
    lines.trajectory[..., 2] = np.abs(lines.trajectory[..., 2])
    results = []
    for length, size in ((1, 1000), (7, 16 << 20), (128, 4096)):
        monkeypatch.setattr(trajectory_store, "PIECE_BYTES", size)
        results.append(accumulate(recut(lines, length), context(grid=images(slices=30))))
    for result in results[1:]:
        assert result.energy == results[0].energy
        for name in ("samples", "trajectory", "density", "time_point", "slice", "readout_length"):
            assert torch.equal(getattr(result.kspace, name), getattr(results[0].kspace, name))
    np.testing.assert_array_equal(results[0].kspace.samples.numpy(), flat(lines))


@pytest.mark.parametrize("expected", [0, 1, 139, 700, 701, 5000])
def test_samples_stand_in_order_however_many_were_expected(monkeypatch, expected):
    monkeypatch.setattr(trajectory_store, "PIECE_BYTES", 800)
    store = SampleStore(3, expected)
    data = noise((10, 3, 70))
    for part in np.split(data, 5):
        store.extend(part)
    result = store.finish()
    np.testing.assert_array_equal(result, np.concatenate(list(data), axis=1))
    assert result.flags.c_contiguous


@pytest.mark.parametrize("expected", [1 << 45, 1 << 60, 1 << 90])
def test_a_header_may_announce_anything(expected):
    data = noise((3, 2, 7))
    store = SampleStore(2, expected)
    store.extend(data)
    np.testing.assert_array_equal(store.finish(), np.concatenate(list(data), axis=1))


def test_a_header_that_announces_more_than_there_is_memory(monkeypatch):
    def no_memory(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(trajectory_store.mmap, "mmap", no_memory)
    store = SampleStore(2, 1 << 20)
    monkeypatch.undo()
    data = noise((3, 2, 7))
    store.extend(data)
    np.testing.assert_array_equal(store.finish(), np.concatenate(list(data), axis=1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_samples_never_stand_in_memory_twice():
    """The most memory that a process of its own ever took, in MB, for 156 MB of samples: of which none
    were expected, all, or three times as many."""
    program = """
import numpy as np
from pathlib import Path
from quantitron.gadgets.trajectory_store import SampleStore
def peak():
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one]
    return int(line.split()[1]) / 1024
before, part = peak(), np.ones((128, 8, 1000), np.complex64)
for expected in (0, 2_560_000, 7_680_000):
    store = SampleStore(8, expected)
    for _ in range(20):
        store.extend(part)
    result = store.finish()
    assert result.shape == (8, 2_560_000) and result.all()
    del result
    print(peak() - before)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(140 < float(line) < 240 for line in told.stdout.split())


# ---- columns


@pytest.mark.parametrize(("matrix", "columns"), [((1, 16, 16), 3), ((6, 16, 16), 4)])
def test_one_more_column_carries_the_density(matrix, columns):
    lines = whole_scan(columns=columns)
    lines.trajectory[..., -1] = np.abs(lines.trajectory[..., -1]) + 7
    kspace = accumulate(numbered(lines), context(grid=images(matrix))).kspace
    np.testing.assert_array_equal(kspace.density.numpy(), lines.trajectory[..., -1].ravel())
    np.testing.assert_array_equal(
        kspace.trajectory.numpy(), lines.trajectory[..., :-1].reshape(-1, columns - 1)
    )


def test_density_weights_that_are_all_zero_are_none():
    lines = whole_scan(columns=3)
    lines.trajectory[..., 2] = 0
    scan = context()
    assert accumulate(numbered(lines), scan).kspace.density is None
    assert scan.notes == ["the scan's density weights are all zero; they are computed"]


def test_negative_density_weights_are_named():
    lines = whole_scan(columns=3)
    lines.trajectory[..., 2] = 1
    lines.trajectory[3, 4, 2] = -1
    with pytest.raises(ScanError, match="acquisition 3 has negative density weights"):
        accumulate(numbered(lines), context())


def test_in_3d_a_third_column_is_kz_whatever_the_counter_says():
    lines = whole_scan(columns=3, kspace_encode_step_2=5)
    kspace = accumulate(numbered(lines), context(grid=images((6, 16, 16)))).kspace
    np.testing.assert_array_equal(kspace.trajectory.numpy(), lines.trajectory.reshape(-1, 3))
    assert kspace.density is None


@pytest.mark.parametrize("scale", [1, 16])
@pytest.mark.parametrize(("matrix", "centre"), [(6, None), (5, None), (6, 2)])
def test_in_3d_two_columns_leave_kz_to_the_partition_counter(matrix, centre, scale):
    partition = np.arange(6) % (matrix if centre is None else 5)
    lines = whole_scan(kspace_encode_step_2=partition)
    in_voxels = lines.trajectory.copy()
    lines.trajectory[:] *= scale
    options = {} if centre is None else {"centre": (centre, 0), "last": (4, 0)}
    scan = context(grid=images((matrix, 16, 16)), **options)
    kspace = accumulate(numbered(lines), scan).kspace
    middle = matrix // 2 if centre is None else centre
    expected = np.repeat((partition - middle) / matrix, 20)
    np.testing.assert_allclose(kspace.trajectory[:, 2].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(kspace.trajectory[:, :2].numpy(), in_voxels.reshape(-1, 2), rtol=2e-7)


def test_a_partition_beyond_the_matrix_is_named():
    lines = whole_scan(kspace_encode_step_2=[0, 1, 2, 3, 6, 5])
    with pytest.raises(ScanError, match="acquisition 4 has kspace_encode_step_2 = 6"):
        accumulate(numbered(lines), context(grid=images((6, 16, 16))))


@pytest.mark.parametrize(
    ("matrix", "columns", "words"),
    [
        ((1, 16, 16), 0, "acquisition 0 has no trajectory"),
        ((1, 16, 16), 1, r"trajectory of 1 column; a 2D scan has 2 or 3 \(kx, ky, density\)"),
        ((1, 16, 16), 4, "trajectory of 4 columns; a 2D scan has 2 or 3"),
        ((6, 16, 16), 0, "acquisition 0 has no trajectory"),
        ((6, 16, 16), 1, "trajectory of 1 column; a 3D scan has 2, 3 or 4"),
        ((6, 16, 16), 5, "trajectory of 5 columns; a 3D scan has 2, 3 or 4"),
    ],
)
def test_wrong_dimensions_are_one_sentence(matrix, columns, words):
    lines = readouts(np.zeros((6, 20, columns)), repetition=range(6))
    with pytest.raises(ScanError, match=words):
        accumulate(numbered(lines), context(grid=images(matrix)))


def test_a_readout_that_lost_its_trajectory_is_named():
    lines, bare = whole_scan(), readouts(np.zeros((2, 20, 0)), first=6)
    lines.head["flags"] = 0
    with pytest.raises(ScanError, match="acquisition 6 has no trajectory"):
        accumulate(numbered(lines, bare), context())


def test_changing_columns_are_named():
    lines, weighted = whole_scan(), readouts(np.ones((2, 20, 3)))
    lines.head["flags"] = 0
    with pytest.raises(ScanError, match="acquisition 6 has a trajectory of 3 columns, the ones before"):
        accumulate(numbered(lines, weighted), context())


# ---- values


def test_values_that_are_not_finite_are_named():
    lines = whole_scan()
    lines.data[3, 1, 5] = np.nan
    with pytest.raises(ScanError, match="acquisition 3 has samples that are not finite"):
        accumulate(numbered(lines), context())
    lines = whole_scan()
    lines.trajectory[2, 5, 0] = np.inf
    with pytest.raises(ScanError, match="acquisition 2 has trajectory values that are not finite"):
        accumulate(numbered(lines), context())


def test_counters_beyond_their_limits_are_named():
    lines = whole_scan()
    lines.head["idx"]["repetition"][4] = 6
    with pytest.raises(
        ScanError, match="acquisition 4 has repetition = 6, beyond the 6 time points of the schedule"
    ):
        accumulate(numbered(lines), context())
    lines = whole_scan()
    lines.head["idx"]["slice"][5] = 2
    with pytest.raises(ScanError, match="acquisition 5 has slice = 2, beyond its limit of 0"):
        accumulate(numbered(lines), context())


def test_a_changing_number_of_channels_is_named():
    lines, others = whole_scan(), readouts(spirals(2), coils=3)
    lines.head["flags"] = 0
    with pytest.raises(ScanError, match="acquisition 6 has 3 channels, the ones before have 2"):
        accumulate(numbered(lines, others), context())


def test_a_readout_without_samples_is_named():
    lines, empty = whole_scan(), readouts(np.zeros((1, 0, 2)))
    lines.head["flags"] = 0
    with pytest.raises(ScanError, match="acquisition 6 has no samples"):
        accumulate(numbered(lines, empty), context())


def test_a_scan_of_nothing_is_an_error():
    silence = readouts(spirals(3), flags=[NOISE])
    with pytest.raises(ScanError, match="without a single imaging line"):
        accumulate(numbered(silence), context())
    separate = readouts(spirals(3), flags=[CALIBRATION])
    with pytest.raises(ScanError, match="without a single imaging line"):
        accumulate(numbered(separate), context())


def test_the_reduced_form_is_for_cartesian_scans():
    with pytest.raises(ScanError, match="storage is 'reduced', which is for Cartesian scans"):
        accumulate(numbered(whole_scan()), context(), storage="reduced")


# ---- what is repeated, missing or something else


def test_repeated_time_points_are_kept_as_they_are():
    lines = whole_scan()
    again = readouts(lines.trajectory, seed=9, repetition=range(6), average=1)
    lines.head["flags"] = 0
    scan = context()
    again.head["flags"][-1] = 1 << (LAST - 1)
    kspace = accumulate(numbered(lines, again), scan).kspace
    assert kspace.time_point.tolist() == [*range(6), *range(6)]
    np.testing.assert_array_equal(kspace.samples.numpy(), np.hstack([flat(lines), flat(again)]))
    assert scan.notes == []


def test_dropped_time_points_are_counted():
    lines = whole_scan(points=6, slices=2)
    kept = np.ones(12, bool)
    kept[[2, 3, 9]] = False
    scan = context(grid=images(slices=2))
    assert len(accumulate(numbered(lines.where(kept)), scan).kspace.time_point) == 9
    assert scan.notes == [
        "2 of 6 time points of slice 0 never came",
        "1 of 6 time points of slice 1 never came",
    ]


def test_a_truncated_stream_says_how_much_is_missing():
    lines = whole_scan(points=6).where(np.arange(6) < 4)
    scan = context()
    assert len(accumulate(numbered(lines), scan).kspace.time_point) == 4
    assert scan.notes[0] == (
        "the end of the measurement was not flagged; 4 of the 6 readouts that the header announces (by slice "
        "and time point) came"
    )
    with pytest.raises(ScanError, match=r"4 of the 6 readouts .* less than the minimum_fraction of 0\.7"):
        accumulate(numbered(lines), context(), minimum_fraction=0.7)
    assert accumulate(numbered(lines), context(), minimum_fraction=0.6).kspace is not None


def test_partitions_count_in_a_truncated_stack():
    partition, time_point = (axis.ravel() for axis in np.meshgrid(range(4), range(6), indexing="ij"))
    lines = readouts(spirals(24), repetition=time_point, kspace_encode_step_2=partition)
    scan = context(grid=images((4, 16, 16)))
    with pytest.raises(ScanError, match=r"12 of the 24 readouts .* time point and partition"):
        accumulate(numbered(lines.where(partition < 2)), scan, minimum_fraction=0.6)


def test_a_slice_of_which_nothing_came_is_an_error():
    lines = whole_scan(points=6, slices=3)
    with pytest.raises(ScanError, match="no readout of slice 1 came; 12 of the 18 readouts"):
        accumulate(numbered(lines.where(lines.head["idx"]["slice"] != 1)), context(grid=images(slices=3)))


def test_calibration_readouts_stand_apart_and_may_count_twice():
    separate = readouts(spirals(4, 9), flags=[CALIBRATION], slice=[0, 0, 1, 1], repetition=[0, 99, 0, 1])
    lines = whole_scan(points=6, slices=2)
    lines.head["flags"][[2, 7]] |= np.uint64(1 << (CALIBRATION_AND_IMAGING - 1))
    scan = context(grid=images(slices=2))
    result = accumulate(numbered(separate, lines), scan)
    assert len(result.kspace.time_point) == 12
    calibration = result.calibration
    assert calibration.readout_length.tolist() == [9] * 4 + [20] * 2
    assert calibration.slice.tolist() == [0, 0, 1, 1, 0, 1]
    assert calibration.time_point.tolist() == [0, 5, 0, 1, 2, 1]
    assert calibration.grid == result.kspace.grid
    expected = np.hstack([flat(separate), lines.data[2], lines.data[7]])
    np.testing.assert_array_equal(calibration.samples.numpy(), expected)
    assert result.energy[0] == pytest.approx(np.sum(np.abs(lines.data[:6]) ** 2), rel=1e-6)
    assert scan.notes == []


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_hole_in_the_centre_of_k_space_is_said(calibrated):
    """Of a slice whose coil maps must come from around it; readouts for calibration fill it."""
    lines = whole_scan(points=6, slices=2)
    lines.trajectory[6:, :8] = lines.trajectory[6:, 8:9]
    hole = float(np.linalg.norm(lines.trajectory[6:] * 16, axis=2).min())
    separate = [readouts(spirals(2, 9), flags=[CALIBRATION], slice=1)] if calibrated else []
    scan = context(grid=images(slices=2))
    accumulate(numbered(*separate, lines), scan)
    found = [note for note in scan.notes if "centre" in note]
    assert len(found) == (0 if calibrated else 1)
    if found:
        assert (
            f"the k-space centre of slice 1 was not sampled, the nearest sample lies {hole:.3g} " in found[0]
        )


@pytest.mark.parametrize(
    "flag",
    [NOISE, ismrmrd.ACQ_IS_DUMMYSCAN_DATA, ismrmrd.ACQ_IS_PHASECORR_DATA, ismrmrd.ACQ_IS_NAVIGATION_DATA],
)
def test_other_readouts_are_not_imaging_data(flag):
    others = readouts(np.zeros((3, 20, 0)), flags=[flag], repetition=77)
    scan = context()
    assert len(accumulate(numbered(others, whole_scan()), scan).kspace.time_point) == 6
    assert all("navigator" in note for note in scan.notes)


def test_later_echoes_are_left_out_and_said():
    lines, later = whole_scan(), readouts(spirals(6), repetition=range(6), contrast=1)
    scan = context()
    assert len(accumulate(numbered(later, lines), scan).kspace.time_point) == 6
    assert "later echoes" in scan.notes[0]


# ---- the gadgets before


def prepared(lines, scan, *gadgets):
    blocks = numbered(*lines)
    for gadget in (*gadgets, RemoveOversampling()):
        blocks = gadget(blocks, scan)
    return blocks


def test_discarded_samples_go_with_their_positions():
    whole = whole_scan()
    lines = replace(whole, head=whole.head.copy())
    lines.head["discard_pre"] = [0, 2, 2, 0, 5, 0]
    lines.head["discard_post"] = [0, 3, 3, 0, 0, 1]
    kspace = accumulate(prepared([lines], context()), context()).kspace
    assert kspace.readout_length.tolist() == [20, 15, 15, 20, 15, 19]
    cuts = [(0, 20), (2, 17), (2, 17), (0, 20), (5, 20), (0, 19)]
    samples = [whole.data[row][:, start:end] for row, (start, end) in enumerate(cuts)]
    positions = [whole.trajectory[row, start:end] for row, (start, end) in enumerate(cuts)]
    np.testing.assert_array_equal(kspace.samples.numpy(), np.concatenate(samples, axis=1))
    np.testing.assert_array_equal(kspace.trajectory.numpy(), np.concatenate(positions))


def test_discarding_and_whitening_together():
    silence = readouts(np.zeros((40, 64, 0)), flags=[NOISE], seed=5)
    whole = whole_scan()
    lines = replace(whole, head=whole.head.copy())
    lines.head["discard_pre"][2:4] = 4
    scan, scan_of_all = context(), context()
    cut = accumulate(prepared([silence, lines], scan, NoiseAdjust()), scan).kspace
    everything = accumulate(prepared([silence, whole], scan_of_all, NoiseAdjust()), scan_of_all).kspace
    kept = np.ones(120, bool)
    kept[40:44] = kept[60:64] = False
    np.testing.assert_allclose(cut.samples.numpy(), everything.samples.numpy()[:, kept], rtol=1e-6)
    np.testing.assert_array_equal(cut.trajectory.numpy(), everything.trajectory.numpy()[kept])


def test_nothing_left_of_a_readout_is_an_error():
    lines = whole_scan()
    lines.head["discard_pre"][3] = 20
    with pytest.raises(ScanError, match="acquisition 3 keeps none of its 20 samples"):
        accumulate(prepared([lines], context()), context())


def test_readouts_must_have_been_prepared():
    lines = whole_scan()
    lines.head["discard_post"][3] = 2
    with pytest.raises(ScanError, match="needs the gadget remove_oversampling"):
        accumulate(numbered(lines), context())
    scan = context()
    silence = readouts(np.zeros((40, 64, 0)), flags=[NOISE])
    blocks = NoiseAdjust()(numbered(silence, whole_scan()), scan)
    with pytest.raises(ScanError, match="needs the gadget remove_oversampling"):
        accumulate(blocks, scan)


def test_noise_of_spirals_is_whitened():
    """Readouts of nothing but noise, in correlated channels: E n n^H is the unit matrix afterwards."""
    mixing = np.array([[3, 0], [1 + 2j, 0.5]])
    silence = readouts(np.zeros((60, 200, 0)), flags=[NOISE], seed=5)
    lines = readouts(spirals(240, 200), seed=6, repetition=np.arange(240) % 6)
    for part in (silence, lines):
        part.data[:] = np.einsum("kc,ncx->nkx", mixing, part.data)
    scan = context()
    result = accumulate(prepared([silence, lines], scan, NoiseAdjust()), scan)
    samples = result.kspace.samples.numpy()
    covariance = samples @ samples.conj().T / samples.shape[1]
    assert np.abs(covariance - np.eye(2)).max() < 0.03
    assert result.noise_known


@pytest.mark.parametrize("scale", [1, 16])
def test_coils_of_spirals_are_compressed_from_readouts_through_the_centre(scale):
    """Readouts at the edge hold only noise in channels that the signal at the centre does not use."""
    signal = np.einsum("cr,nrx->ncx", noise((4, 1), 50), noise((40, 1, 20), 51))
    lines = readouts(scale * spirals(40), coils=4, repetition=np.arange(40) % 6)
    lines.data[:] = signal
    lines.data[:30] = 1e-3 * noise((30, 4, 20))
    lines.trajectory[:30] = np.where(lines.trajectory[:30] < 0, -0.45, 0.45) * scale
    scan = context(grid=images(coils=4))
    kspace = accumulate(prepared([lines], scan, CompressCoils(coils=1, lines=4)), scan).kspace
    assert kspace.samples.shape == (1, 800)
    kept = np.linalg.norm(kspace.samples[:, 600:].numpy()) / np.linalg.norm(signal[30:])
    assert kept == pytest.approx(1, rel=1e-5)
    assert scan.encoding.coils == 1


def test_partitions_at_the_edge_wait_for_the_centre():
    lines = readouts(spirals(12), coils=4, repetition=np.arange(12) % 6)
    lines.head["idx"]["kspace_encode_step_2"] = np.repeat([0, 8], 6)
    lines.data[:6] = 1e-3 * noise((6, 4, 20))
    signal = np.einsum("cr,nrx->ncx", noise((4, 1), 50), noise((6, 1, 20), 51))
    lines.data[6:] = signal
    scan = context(grid=images((16, 16, 16), coils=4))
    kspace = accumulate(prepared([lines], scan, CompressCoils(coils=1, lines=4)), scan).kspace
    kept = np.linalg.norm(kspace.samples[:, 120:].numpy()) / np.linalg.norm(signal)
    assert kept == pytest.approx(1, rel=1e-5)


def test_a_reader_that_announces_nothing_about_partitions():
    header = make_header(images((6, 16, 16)), fingerprint())
    limits = header.encoding[0].encodingLimits
    header.encoding[0].encodingLimits = xsd.encodingLimitsType(repetition=limits.repetition)
    lines = whole_scan(kspace_encode_step_2=np.arange(6))
    scan = make_context(header)
    kspace = accumulate(numbered(lines), scan).kspace
    np.testing.assert_allclose(kspace.trajectory[::20, 2].numpy(), (np.arange(6) - 3) / 6, rtol=1e-6)
    assert scan.notes == []
