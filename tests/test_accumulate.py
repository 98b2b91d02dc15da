"""Accumulation of lines into k-space or its reduced form, and the temporal basis."""

from __future__ import annotations

from dataclasses import replace

import ismrmrd
import numpy as np
import pytest
import torch
from line_factory import (
    LAST,
    block,
    context,
    encoding,
    full_scan,
    hybrid,
    joined,
    megre,
    noise,
    numbered,
    recut,
    shuffled,
    t2ir,
    vfa,
)

from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_context, make_header
from quantitron.recon.gram import reduce_kspace

NX = 16
CALIBRATION = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION
CALIBRATION_AND_IMAGING = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
NAVIGATOR = ismrmrd.ACQ_IS_NAVIGATION_DATA


def accumulate(blocks, scan, basis=None, **settings):
    """The ScanData of blocks; with ``basis`` settings the basis is known beforehand."""
    if basis is not None:
        BasisGadget(**basis).prepare(scan)
    (result,) = Accumulate(**settings)(map(hybrid, blocks), scan)
    return result


def scan_of(protocol, grid=None, **options):
    return context(protocol, grid or encoding(), **options)


def table(kspace):
    """(slice, contrast, echo, kz, ky) -> (samples, count) of every line."""
    keys = zip(
        *(getattr(kspace, name).tolist() for name in ("slice", "contrast", "echo", "kz", "ky")), strict=True
    )
    return {
        key: (samples, count)
        for key, samples, count in zip(keys, kspace.samples.numpy(), kspace.count.tolist(), strict=True)
    }


# ---- where lines land


@pytest.mark.parametrize("protocol", [megre(3), vfa(), t2ir()])
def test_every_line_lands_where_its_counters_say(protocol):
    grid = encoding((3, 8, NX), slices=2)
    lines = full_scan(protocol, grid, NX)
    scan = scan_of(protocol, grid)
    result = accumulate(numbered(shuffled(lines)), scan)
    found = table(result.kspace)
    assert len(found) == len(lines) == protocol.frames * 2 * 3 * 8
    order = np.random.default_rng(1).permutation(len(lines))
    index = lines.head["idx"]
    taus = max(1, len(protocol.preparation_time))
    for row in order[:200]:
        ti = index[row]["segment" if protocol.sequence == "t2ir_gre" else "set"]
        tau = index[row]["set"] if protocol.sequence == "t2ir_gre" else 0
        key = (
            index[row]["slice"],
            ti * taus + tau,
            index[row]["contrast"],
            index[row]["kspace_encode_step_2"],
            index[row]["kspace_encode_step_1"],
        )
        samples, count = found[tuple(int(value) for value in key)]
        np.testing.assert_array_equal(samples, lines.data[row])
        assert count == 1
    assert result.kspace.grid == (2, 3, 8, NX)
    assert result.kspace.contrast_shape == protocol.contrast_shape
    assert scan.notes == []


def test_other_counters_for_the_axes():
    axes = "ti=repetition,tau=user_2,te=set"
    protocol = t2ir(2)
    scan = make_context(make_header(encoding(), protocol, readout_oversampling=1, axes=axes), axes=axes)
    n = 2 * 3 * 2 * 8
    ti, tau, te, ky = (
        axis.ravel() for axis in np.meshgrid(range(2), range(3), range(2), range(8), indexing="ij")
    )
    lines = block(noise((n, 2, NX)), repetition=ti, user_2=tau, set=te, kspace_encode_step_1=ky)
    found = table(accumulate(numbered(lines), scan).kspace)
    for row in range(n):
        samples, _ = found[0, ti[row] * 3 + tau[row], te[row], 0, ky[row]]
        np.testing.assert_array_equal(samples, lines.data[row])


def test_partial_fourier_is_placed_by_its_centre():
    grid = encoding((1, 16, NX))
    scan = scan_of(megre(), grid, centre=(0, 3), last=(0, 10))
    rows = np.repeat(np.arange(11), 2)
    lines = block(noise((22, 2, NX)), [LAST], kspace_encode_step_1=rows, contrast=np.arange(22) % 2)
    lines.head["flags"][:-1] = 0
    kspace = accumulate(numbered(lines), scan).kspace
    assert sorted(set(kspace.ky.tolist())) == list(range(5, 16))  # centre 3 lies at 8
    assert scan.notes == []


def without_limits(header, vendor=None):
    header.encoding[0].encodingLimits = type(header.encoding[0].encodingLimits)()
    header.acquisitionSystemInformation.systemVendor = vendor
    return make_context(header)


def test_without_limits_the_centre_is_the_middle():
    scan = without_limits(make_header(encoding((3, 8, NX)), megre()))
    kspace = accumulate(numbered(full_scan(megre(), encoding((3, 8, NX)), NX)), scan).kspace
    assert sorted(set(kspace.ky.tolist())) == list(range(8))
    assert sorted(set(kspace.kz.tolist())) == list(range(3))


@pytest.mark.parametrize(("vendor", "expected"), [("SIEMENS", range(5, 16)), ("other", range(11))])
def test_without_limits_siemens_tells_the_centre_in_user_counters(vendor, expected):
    scan = without_limits(make_header(encoding((4, 16, NX)), megre()), vendor)
    rows = np.repeat(np.arange(11), 2)
    lines = block(
        noise((22, 2, NX)),
        kspace_encode_step_1=rows,
        contrast=np.arange(22) % 2,
        kspace_encode_step_2=1,
        user_5=3,
        user_6=1,
    )
    kspace = accumulate(numbered(lines), scan).kspace
    assert sorted(set(kspace.ky.tolist())) == list(expected)
    assert set(kspace.kz.tolist()) == ({2} if vendor == "SIEMENS" else {1})


def test_slices_that_no_limit_announces():
    grid = encoding((1, 8, NX), slices=3)
    scan = without_limits(make_header(grid, megre()))
    assert scan.encoding.slices == 1
    calibrated = full_scan(megre(), grid, NX)
    calibrated.head["flags"][calibrated.head["idx"]["kspace_encode_step_1"] == 4] |= np.uint64(
        1 << (CALIBRATION_AND_IMAGING - 1)
    )
    result = accumulate(numbered(calibrated), scan, basis={})
    assert result.reduced is None  # the size of the problem was not known
    assert result.kspace.grid == (3, 1, 8, NX)
    assert scan.encoding.slices == 3
    assert result.calibration.count[:, 0, 4].tolist() == [1, 1, 1]


def test_order_of_lines_changes_rounding_only():
    grid = encoding((2, 8, NX))
    lines = full_scan(vfa(), grid, NX)
    lines.head["flags"][-1] = 0
    lines = joined(
        lines, full_scan(vfa(), grid, NX, 5), full_scan(vfa(), grid, NX, 6).where(np.arange(96) < 9)
    )
    lines.head["flags"] = 0
    one = accumulate(numbered(lines), scan_of(vfa(), grid), {"rank": 2}).reduced
    scale = float(one.projected.abs().max())
    for seed in (1, 2):
        other = accumulate(numbered(shuffled(lines, seed)), scan_of(vfa(), grid), {"rank": 2}).reduced
        torch.testing.assert_close(other.projected, one.projected, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(other.gram, one.gram)
        assert torch.equal(other.count, one.count)
        assert other.energy == pytest.approx(one.energy, rel=1e-12)
        assert other.samples == one.samples == len(lines) * 2 * NX


@pytest.mark.parametrize("length", [1, 13, 128])
def test_the_cut_into_blocks_changes_no_bit(length):
    grid = encoding((2, 8, NX), slices=2)
    lines = full_scan(vfa(), grid, NX)
    lines.head["flags"][-1] = 0
    lines = shuffled(joined(lines, full_scan(vfa(), grid, NX, 3)))

    def run(step):
        scan = scan_of(vfa(), grid)
        scan.needs_lines = True
        return accumulate(recut(lines, step), scan, basis={"rank": 2})

    one, other = run(length), run(77)
    for name in ("gram", "projected", "count"):
        assert torch.equal(getattr(one.reduced, name), getattr(other.reduced, name))
    for name in ("samples", "contrast", "echo", "slice", "kz", "ky", "count"):
        assert torch.equal(getattr(one.kspace, name), getattr(other.kspace, name))
    assert one.energy == other.energy
    assert one.reduced.energy == other.reduced.energy == one.kspace.energy


# ---- repeats and averages


def test_the_same_line_twice_counts_twice_and_averages():
    lines = full_scan(megre(), encoding(), NX)
    again = block(lines.data[:1] + 2, average=1, contrast=0)
    kspace = accumulate(numbered(again, lines), scan_of(megre())).kspace
    samples, count = table(kspace)[0, 0, 0, 0, 0]
    assert count == 2
    np.testing.assert_allclose(samples, lines.data[0] + 1, atol=1e-6)
    assert len(kspace.count) == len(lines)
    energy = np.sum(np.abs(lines.data) ** 2) + np.sum(np.abs(again.data) ** 2)
    assert kspace.energy == pytest.approx(energy, rel=1e-6)
    assert kspace.acquired_samples == (len(lines) + 1) * 2 * NX


def test_repeats_inside_one_block_and_across_blocks_are_the_same():
    lines = full_scan(megre(), encoding(), NX)
    lines.head["flags"][-1] = 0
    many = joined(*(block(noise((16, 2, NX), i)) for i in range(6)))
    many.head["idx"] = np.tile(lines.head["idx"], 6)
    many.head["idx"]["average"] = np.repeat(np.arange(6), 16)
    whole = accumulate([many], scan_of(megre())).kspace
    parts = accumulate(recut(many, 5), scan_of(megre())).kspace
    assert torch.equal(whole.samples, parts.samples)
    assert whole.count.unique().tolist() == [6]
    expected = many.data.reshape(6, 16, 2, NX).mean(axis=0)
    found = table(whole)
    for row, index in enumerate(lines.head["idx"]):
        samples, _ = found[0, 0, int(index["contrast"]), 0, int(index["kspace_encode_step_1"])]
        np.testing.assert_allclose(samples, expected[row], atol=1e-6)


def test_counters_without_a_contrast_are_averaged_and_said_so():
    lines = full_scan(megre(), encoding(), NX)
    lines.head["flags"][-1] = 0
    again = block(lines.data, repetition=1)
    again.head["idx"]["contrast"] = lines.head["idx"]["contrast"]
    again.head["idx"]["kspace_encode_step_1"] = lines.head["idx"]["kspace_encode_step_1"]
    again.head["flags"][-1] = 1 << (LAST - 1)
    scan = scan_of(megre())
    kspace = accumulate(numbered(lines, again), scan).kspace
    assert kspace.count.unique().tolist() == [2]
    assert scan.notes == ["the counter 'repetition' carries no contrast here; its values are averaged"]


def test_missing_lines_are_no_error_where_the_scan_came_to_its_end():
    lines = full_scan(megre(), encoding(), NX)
    kept = np.arange(len(lines)) % 8 != 1
    thinned = lines.where(kept)
    scan = scan_of(megre())
    kspace = accumulate(numbered(thinned), scan).kspace
    assert len(kspace.count) == kept.sum()
    assert scan.notes == []


# ---- the reduced form


@pytest.mark.parametrize("protocol", [megre(), vfa(), t2ir()])
def test_summing_while_lines_arrive_equals_reducing_them_afterwards(protocol):
    grid = encoding((2, 8, NX), slices=2)
    lines = full_scan(protocol, grid, NX)
    lines.head["flags"][-1] = 0
    twice = shuffled(joined(lines, full_scan(protocol, grid, NX, 8)))
    scan = scan_of(protocol, grid)
    scan.needs_lines = True
    result = accumulate(numbered(twice), scan, basis={})
    later = reduce_kspace(result.kspace, scan.basis)
    scale = result.reduced.projected.abs().max()
    torch.testing.assert_close(result.reduced.projected, later.projected, rtol=0, atol=1e-5 * float(scale))
    torch.testing.assert_close(result.reduced.gram, later.gram)
    assert torch.equal(result.reduced.count, later.count)
    assert result.reduced.energy == pytest.approx(later.energy, rel=1e-6)
    assert result.reduced.samples == later.samples == len(twice) * 2 * NX


def test_storage_follows_the_solver():
    lines = full_scan(vfa(), encoding(), NX)

    def stored(needs_lines, basis, **settings):
        scan = scan_of(vfa())
        scan.needs_lines = needs_lines
        result = accumulate(numbered(lines), scan, basis, **settings)
        return result.kspace is not None, result.reduced is not None

    assert stored(False, {}) == (False, True)
    assert stored(True, {}) == (True, True)
    assert stored(False, None) == (True, False)
    assert stored(False, {}, storage="lines") == (True, False)
    with pytest.raises(ScanError, match="storage is 'reduced', which needs a basis"):
        stored(False, None, storage="reduced")


# ---- navigators, calibration, the rest


def test_navigators_are_kept_apart():
    lines = full_scan(vfa(), encoding(), NX)
    navigators = block(noise((6, 2, NX), 9), [NAVIGATOR], contrast=np.arange(6) % 2, set=np.arange(6) // 2)
    scan = scan_of(vfa())
    scan.needs_navigators = True
    result = accumulate(numbered(navigators, lines), scan)
    np.testing.assert_array_equal(result.navigator.samples.numpy(), navigators.data)
    assert result.navigator.contrast.tolist() == [0, 0, 1, 1, 2, 2]
    assert result.navigator.echo.tolist() == [0, 1, 0, 1, 0, 1]
    assert len(result.kspace.count) == len(lines)
    assert accumulate(numbered(lines), scan_of(vfa())).navigator is None


def test_navigators_elsewhere_are_not_used():
    lines = full_scan(megre(), encoding(), NX)
    navigators = block(
        noise((4, 2, NX), 9), [NAVIGATOR], kspace_encode_step_1=[2, 2, 5, 2], contrast=[0, 1, 0, 7]
    )
    scan = scan_of(megre())
    scan.needs_navigators = True
    assert len(accumulate(numbered(navigators, lines), scan).navigator.echo) == 2
    assert any("navigator lines of other positions" in note for note in scan.notes)


def test_calibration_only_lines_stay_out_of_the_image():
    lines = full_scan(megre(), encoding(), NX)
    data = noise((5, 2, NX), 9)
    extra = block(data, [CALIBRATION], kspace_encode_step_1=[3, 4, 5, 4, 4], contrast=[1, 1, 1, 1, 0])
    scan = scan_of(megre())
    result = accumulate(numbered(extra, lines), scan)
    assert result.kspace.count.unique().tolist() == [1]
    assert len(result.kspace.count) == len(lines)
    count = result.calibration.count[0, 0]
    assert count.tolist() == [0, 0, 0, 1, 2, 1, 0, 0]  # the frame of the first one only
    np.testing.assert_allclose(result.calibration.samples[0, 0, 4], (data[1] + data[3]) / 2, atol=1e-6)
    np.testing.assert_array_equal(result.calibration.samples[0, 0, 3], data[0])
    assert not result.calibration.samples[0, 0, 6].any()


def test_calibration_and_imaging_lines_count_in_both():
    lines = full_scan(megre(), encoding(), NX)
    chosen = np.isin(lines.head["idx"]["kspace_encode_step_1"], [3, 4, 5])
    lines.head["flags"][chosen] |= np.uint64(1 << (CALIBRATION_AND_IMAGING - 1))
    lines.head["flags"][chosen] |= np.uint64(1 << (CALIBRATION - 1))  # some converters set both
    result = accumulate(numbered(lines), scan_of(megre()))
    assert len(result.kspace.count) == len(lines)
    assert result.calibration.count[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(result.calibration.samples[0, 0, 3], lines.data[3])


def test_calibration_lines_off_the_grid_are_not_used():
    lines = full_scan(megre(), encoding(), NX)
    extra = block(noise((2, 2, NX), 9), [CALIBRATION], kspace_encode_step_1=[4, 20])
    scan = scan_of(megre())
    assert accumulate(numbered(extra, lines), scan).calibration.count.sum() == 1
    assert scan.notes == ["calibration lines outside the matrix were not used"]


@pytest.mark.parametrize(
    "flag",
    [
        ismrmrd.ACQ_IS_NOISE_MEASUREMENT,
        ismrmrd.ACQ_IS_PHASECORR_DATA,
        ismrmrd.ACQ_IS_DUMMYSCAN_DATA,
        ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
        ismrmrd.ACQ_IS_RTFEEDBACK_DATA,
        ismrmrd.ACQ_IS_PHASE_STABILIZATION,
        ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
    ],
)
def test_lines_of_no_use_are_dropped_whatever_they_hold(flag):
    lines = full_scan(megre(), encoding(), NX)
    useless = block(np.full((3, 2, NX), np.nan), [flag], kspace_encode_step_1=60000, contrast=60000)
    result = accumulate(numbered(useless, lines), scan_of(megre()))
    plain = accumulate(numbered(lines), scan_of(megre()))
    assert torch.equal(result.kspace.samples, plain.kspace.samples)


def test_other_encoding_spaces_are_left_out_and_said_so():
    lines = full_scan(megre(), encoding(), NX)
    other = block(noise((3, 2, NX)), encoding_space_ref=1)
    scan = scan_of(megre())
    assert accumulate(numbered(other, lines), scan).kspace.count.max() == 1
    assert scan.notes == ["lines of other encoding spaces than the first are not used"]


def test_geometry_is_that_of_the_first_line_of_each_slice():
    grid = encoding(slices=3)
    lines = full_scan(megre(), grid, NX)
    lines.head["position"][:, 2] = 10 * lines.head["idx"]["slice"] + 0.01 * np.arange(len(lines))
    extra = block(noise((1, 2, NX)), [CALIBRATION], position=-7, contrast=0)
    scan = scan_of(megre(), grid)
    accumulate(numbered(extra, lines), scan)
    assert sorted(scan.geometry) == [0, 1, 2]
    for index in range(3):
        assert scan.geometry[index]["position"][2] == pytest.approx(10 * index + 0.16 * index)


# ---- the end of the scan


def test_end_of_a_repetition_ends_nothing():
    lines = full_scan(megre(), encoding(), NX)
    lines.head["flags"][3] = 1 << (ismrmrd.ACQ_LAST_IN_REPETITION - 1)
    assert len(accumulate(numbered(lines), scan_of(megre())).kspace.count) == len(lines)


def test_early_close_that_is_enough_is_reconstructed_and_says_what_is_missing():
    lines = shuffled(full_scan(vfa(), encoding((1, 32, NX)), NX))
    scan = scan_of(vfa(), encoding((1, 32, NX)))
    kspace = accumulate(numbered(lines.where(np.arange(len(lines)) < 120)), scan).kspace
    assert len(kspace.count) == 120
    assert scan.notes == [
        "the end of the measurement was not flagged; 120 of the 192 lines that the encoding limits span came"
    ]


def test_complete_scan_without_the_flag_needs_no_remark():
    lines = full_scan(megre(), encoding(), NX)
    lines.head["flags"] = 0
    scan = scan_of(megre())
    accumulate(numbered(lines), scan)
    assert scan.notes == []


def test_early_close_without_some_contrast_is_an_error():
    lines = full_scan(vfa(), encoding(), NX)  # the flip angles come one after another
    with pytest.raises(
        ScanError, match=r"no line has set = 2 \(1 of 3 values never came\); 30 of the 48 lines"
    ):
        accumulate(numbered(lines.where(np.arange(48) < 30)), scan_of(vfa()))


def test_flagged_end_without_some_contrast_is_only_noted():
    lines = full_scan(vfa(), encoding(), NX)
    lines = lines.where(lines.head["idx"]["set"] != 1)
    scan = scan_of(vfa())
    accumulate(numbered(lines), scan)
    assert scan.notes == ["no line has set = 1 (1 of 3 values never came)"]


def test_missing_echo_is_always_an_error():
    lines = full_scan(megre(), encoding(), NX)
    lines.head["idx"]["contrast"] = 0
    with pytest.raises(ScanError, match="no line has contrast = 1"):
        accumulate(numbered(lines), scan_of(megre()))


def test_missing_centre_is_an_error():
    grid = encoding((1, 32, NX))
    lines = full_scan(megre(), grid, NX)
    edge = lines.where(lines.head["idx"]["kspace_encode_step_1"] < 10)
    with pytest.raises(
        ScanError, match="k-space centre never came; 20 of the 64 lines that the encoding limits span came"
    ):
        accumulate(numbered(edge), scan_of(megre(), grid))


def test_missing_slice_is_an_error():
    grid = encoding(slices=3)
    lines = full_scan(megre(), grid, NX)
    with pytest.raises(ScanError, match="no line of slice 2 came"):
        accumulate(numbered(lines.where(lines.head["idx"]["slice"] < 2)), scan_of(megre(), grid))


def test_minimum_fraction():
    lines = full_scan(megre(), encoding(), NX)
    half = lines.where(np.arange(len(lines)) % 2 == 0)
    accumulate(numbered(half), scan_of(megre()), minimum_fraction=0.5)
    with pytest.raises(
        ScanError,
        match=r"8 of the 16 lines that the encoding limits span came, less than the minimum_fraction",
    ):
        accumulate(numbered(half), scan_of(megre()), minimum_fraction=0.6)


@pytest.mark.parametrize("flags", [[], [CALIBRATION], [NAVIGATOR], [ismrmrd.ACQ_IS_DUMMYSCAN_DATA]])
def test_scan_without_images_is_an_error(flags):
    lines = [block(noise((3, 2, NX)), flags)] if flags else []
    with pytest.raises(ScanError, match="without a single imaging line"):
        accumulate(numbered(*lines), scan_of(megre()))


# ---- bad data


@pytest.mark.parametrize(
    ("counter", "value", "words"),
    [
        ("contrast", 2, "acquisition 5 has contrast = 2, beyond its limit of 1"),
        ("set", 3, "acquisition 5 has set = 3, beyond its limit of 2"),
        ("slice", 1, "acquisition 5 has slice = 1, beyond its limit of 0"),
        ("kspace_encode_step_1", 8, "acquisition 5 has kspace_encode_step_1 = 8, beyond its limit of 7"),
        ("kspace_encode_step_2", 1, "acquisition 5 has kspace_encode_step_2 = 1, beyond its limit of 0"),
    ],
)
def test_counter_beyond_its_limit_is_named(counter, value, words):
    lines = full_scan(vfa(), encoding(), NX)
    lines.head["idx"][counter][5] = value
    with pytest.raises(ScanError, match=words):
        accumulate(numbered(lines), scan_of(vfa()))


def test_line_outside_the_matrix_is_named():
    scan = scan_of(megre(), centre=(0, 2), last=(0, 9))
    with pytest.raises(ScanError, match="kspace_encode_step_1 = 6, which with the centre at 2 lies outside"):
        accumulate(numbered(block(noise((7, 2, NX)), kspace_encode_step_1=np.arange(7))), scan)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1j * np.nan])
def test_samples_that_are_no_numbers_are_named(value):
    lines = full_scan(megre(), encoding(), NX)
    lines.data[6, 1, 3] = value
    with pytest.raises(ScanError, match="acquisition 6 has samples that are not finite numbers"):
        accumulate(numbered(lines), scan_of(megre()))


def test_a_sample_that_is_a_number_is_not_called_none():
    """The square of 1e30 is none in single precision."""
    lines = full_scan(megre(), encoding(), NX)
    lines.data[6, 1, 3] = 1e30
    with pytest.raises(ScanError, match=r"^acquisition 6 has samples too large .*: .* they reach 1e\+30"):
        accumulate(numbered(lines), scan_of(megre()))


def test_changing_number_of_channels_is_named():
    lines = full_scan(megre(), encoding(), NX)
    with pytest.raises(ScanError, match="acquisition 10 has 3 channels, the ones before have 2"):
        accumulate(numbered(lines.where(np.arange(16) < 10), block(noise((2, 3, NX)))), scan_of(megre()))


def test_forgotten_transform_is_named():
    with pytest.raises(ScanError, match="needs the gadget remove_oversampling"):
        list(Accumulate()([full_scan(megre(), encoding(), NX)], scan_of(megre())))


# ---- the basis


def problems(lines, scan, **basis):
    gadget = BasisGadget(**basis)
    gadget.prepare(scan)
    return list(gadget(Accumulate()(map(hybrid, numbered(lines)), scan), scan))


@pytest.mark.parametrize("storage", ["reduced", "lines"])
def test_one_problem_a_slice_adds_up_to_the_scan(storage):
    grid = encoding((2, 8, NX), slices=3)
    lines = shuffled(full_scan(vfa(), grid, NX))
    scan = scan_of(vfa(), grid)
    scan.needs_lines = storage == "lines"
    parts = problems(lines, scan)
    assert len(parts) == 3
    for index, problem in enumerate(parts):
        mine = lines.where(lines.head["idx"]["slice"] == index)
        assert problem.encoding.slices == 1
        assert problem.reduced.projected.shape[0] == 1
        assert problem.reduced.samples == len(mine) * 2 * NX
        assert problem.reduced.energy == pytest.approx(np.sum(np.abs(mine.data) ** 2), rel=1e-6)
        alone = scan_of(vfa(), replace(grid, slices=1))
        mine.head["idx"]["slice"] = 0
        (expected,) = problems(mine, alone)
        assert torch.equal(problem.reduced.projected, expected.reduced.projected)
        assert torch.equal(problem.reduced.gram, expected.reduced.gram)
        assert (problem.kspace is not None) == scan.needs_lines
        if problem.kspace is not None:
            assert problem.kspace.grid[0] == 1
            assert problem.kspace.energy == pytest.approx(problem.reduced.energy)
            torch.testing.assert_close(
                reduce_kspace(problem.kspace, problem.reduced.basis).gram, problem.reduced.gram
            )


def test_rank_as_columns_or_energy():
    scan = scan_of(vfa())
    BasisGadget(rank=2).prepare(scan)
    assert scan.basis.rank == 2
    BasisGadget(rank=0.9999999).prepare(scan)
    assert scan.basis.rank == 3
    with pytest.raises(ScanError, match=r"rank leaves 1 column .* T1 and PD of vfa_gre take 2 or more"):
        BasisGadget(rank=1).prepare(scan)
    BasisGadget(rank=0.5).prepare(scan)  # half the energy at least, in what the maps take
    assert scan.basis.rank == 2
    with pytest.raises(ScanError, match="rank 4 is above the 3 contrasts of this vfa_gre scan"):
        BasisGadget(rank=4).prepare(scan)
    with pytest.raises(ScanError, match=r"rank is 1\.5"):
        BasisGadget(rank=1.5).prepare(scan)


def factors(lines, rank):
    """Lines whose contrasts are mixtures of ``rank`` random courses."""
    courses = noise((3, rank), 60)
    coefficients = noise((rank, 2, NX), 61)
    contrast = lines.head["idx"]["set"]
    scale = 1 + lines.head["idx"]["kspace_encode_step_1"]
    lines.data[:] = np.einsum("nr,rcx->ncx", courses[contrast], coefficients) * scale[:, None, None]
    return courses


@pytest.mark.parametrize("source", ["centre", "navigator"])
def test_measured_basis_spans_the_data(source):
    lines = full_scan(vfa(), encoding(), NX)
    courses = factors(lines, 2)
    navigators = lines.where(lines.head["idx"]["kspace_encode_step_1"] == 4)
    navigators.head["flags"] = 1 << (NAVIGATOR - 1)
    scan = scan_of(vfa())
    (problem,) = problems(joined(navigators, lines), scan, source=source, rank=2)
    basis = problem.reduced.basis.contrast.numpy()
    assert problem.reduced.basis.source == source
    np.testing.assert_allclose(basis @ (basis.conj().T @ courses), courses, atol=1e-5)
    # nothing of the signal is lost in the reduced form: the residual of the best fit is zero
    gram, b = problem.reduced.gram.to(torch.complex128), problem.reduced.projected.to(torch.complex128)
    fit = torch.linalg.solve(gram, b.flatten(-2)).unflatten(-1, b.shape[-2:])
    assert float((b.conj() * fit).real.sum()) == pytest.approx(problem.reduced.energy, rel=1e-4)


def test_basis_from_data_that_are_not_there():
    lines = full_scan(vfa(), encoding(), NX)
    with pytest.raises(ScanError, match="no navigator lines"):
        problems(lines, scan_of(vfa()), source="navigator")
    staggered = lines.where((lines.head["idx"]["set"] + lines.head["idx"]["kspace_encode_step_1"]) % 3 == 0)
    with pytest.raises(ScanError, match="no k-space point was sampled in every contrast"):
        problems(staggered, scan_of(vfa()), source="centre")


def test_slices_without_calibration_lines_have_none():
    grid = encoding(slices=2)
    lines = full_scan(megre(), grid, NX)
    index = lines.head["idx"]
    lines.head["flags"][(index["slice"] == 1) & (index["kspace_encode_step_1"] == 4)] |= np.uint64(
        1 << (CALIBRATION_AND_IMAGING - 1)
    )
    first, second = problems(lines, scan_of(megre(), grid))
    assert first.calibration is None
    assert second.calibration.count[0, 0, 4] == 1
