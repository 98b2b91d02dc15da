"""Noise adjustment, readout oversampling and coil compression."""

from __future__ import annotations

from dataclasses import replace

import ismrmrd
import numpy as np
import pytest
from line_factory import block, context, encoding, joined, megre, noise, numbered, recut

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.prepare import CompressCoils, NoiseAdjust, RemoveOversampling

NOISE = ismrmrd.ACQ_IS_NOISE_MEASUREMENT
REVERSE = ismrmrd.ACQ_IS_REVERSE
CALIBRATION = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION
COILS = 4


def correlated(shape, seed):
    """Noise whose channels are correlated and unequal: (n, c, sample)."""
    mixing = noise((COILS, COILS), 99).astype(np.complex128) + np.diag([1, 2, 3, 4])
    return np.einsum("dc,ncx->ndx", mixing, noise(shape, seed))


def whitened(blocks, scan=None, **settings):
    scan = scan or context(megre(), encoding(coils=COILS))
    out = list(NoiseAdjust(**settings)(blocks, scan))
    mixed = [part.data if part.mixing is None else np.matmul(part.mixing, part.data) for part in out]
    return np.concatenate(mixed), scan


# ---- noise adjustment


def test_whitened_noise_is_white_with_unit_variance():
    lines = numbered(
        block(correlated((64, COILS, 256), 0), [NOISE]),
        block(correlated((64, COILS, 32), 1)),
    )
    samples, scan = whitened(lines)
    flat = samples.transpose(1, 0, 2).reshape(COILS, -1)
    covariance = flat @ flat.conj().T / flat.shape[1]
    assert np.abs(covariance - np.eye(COILS)).max() < 0.08  # 2048 samples: 1 / sqrt(2048) = 0.022
    assert samples.shape == (64, COILS, 32)  # the noise lines themselves are gone
    assert scan.noise_known
    assert scan.notes == []


def test_sampling_time_and_receiver_bandwidth_scale_the_noise():
    scan_noise = block(correlated((16, COILS, 256), 0), [NOISE], sample_time_us=2.5)
    lines = block(correlated((2, COILS, 32), 1), sample_time_us=10)
    scan = context(megre(), encoding(coils=COILS), relative_receiver_noise_bandwidth=0.5)
    scaled, _ = whitened(numbered(scan_noise, lines), scan)
    equal = block(scan_noise.data, [NOISE])
    plain, _ = whitened(numbered(equal, block(lines.data)))
    np.testing.assert_allclose(scaled, plain * np.sqrt(10 / 2.5 * 0.5), rtol=1e-5)
    scan.header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth = None
    by_setting, _ = whitened(numbered(scan_noise, lines), scan, receiver_bandwidth_ratio=0.793)
    np.testing.assert_allclose(by_setting, plain * np.sqrt(10 / 2.5 * 0.793), rtol=1e-5)


def test_sampling_time_may_differ_between_lines():
    data = correlated((3, COILS, 32), 1)
    scan_noise = block(correlated((16, COILS, 256), 0), [NOISE])
    mixed, _ = whitened(numbered(scan_noise, block(data, sample_time_us=[5, 20, 5])))
    plain, _ = whitened(numbered(scan_noise, block(data)))
    np.testing.assert_allclose(mixed, plain * np.array([1, 2, 1])[:, None, None], rtol=1e-5)


def test_noise_lines_of_several_sampling_times_count_alike():
    noise, lines = correlated((16, COILS, 256), 0), block(correlated((2, COILS, 32), 1))
    plain, _ = whitened(numbered(block(noise, [NOISE], sample_time_us=5), lines))
    longer = np.where(np.arange(16) % 3 == 0, 20, 5).astype(np.float32)
    averaged = (noise * np.sqrt(5 / longer)[:, None, None]).astype(np.complex64)  # as a longer sample is
    mixed, _ = whitened(numbered(block(averaged, [NOISE], sample_time_us=longer), lines))
    np.testing.assert_allclose(mixed, plain, rtol=1e-5)


def test_noise_may_be_interleaved_before_the_first_line_only():
    scan_noise = correlated((8, COILS, 32), 0)
    lines = block(correlated((4, COILS, 32), 1))
    dummy = block(correlated((1, COILS, 32), 2), [ismrmrd.ACQ_IS_DUMMYSCAN_DATA])
    late = block(100 * correlated((8, COILS, 32), 3), [NOISE])
    together, scan = whitened(
        numbered(block(scan_noise[:5], [NOISE]), dummy, block(scan_noise[5:], [NOISE]), lines, late)
    )
    plain, _ = whitened(numbered(block(scan_noise, [NOISE]), lines))
    np.testing.assert_array_equal(together, plain)
    assert scan.notes == ["noise lines that came after the first imaging line were not used"]


def test_scan_without_noise_passes_and_says_so():
    data = correlated((4, COILS, 32), 1).astype(np.complex64)
    samples, scan = whitened(numbered(block(data)))
    np.testing.assert_array_equal(samples, data)
    assert not scan.noise_known
    assert "no noise lines" in scan.notes[0]


@pytest.mark.parametrize("exponent", [-110, -80, -40, 40, 80, 120])
def test_scan_without_noise_may_have_any_unit(exponent):
    """Squares of samples of 1e20 or 1e-24 are infinite or nothing in single precision."""
    data = correlated((4, COILS, 32), 1).astype(np.complex64)
    data[0] = 0  # tells no scale
    data[1, 2, 3] = complex(np.nan, np.inf)
    scaled = np.ldexp(data.view(np.float32), exponent).view(np.complex64)
    samples, _ = whitened(numbered(block(scaled[:1]), block(scaled[1:3]), block(scaled[3:])))
    factor = samples[2, 0, 0].real / data[2, 0, 0].real
    assert np.log2(factor) == round(np.log2(factor))  # a power of two: not a bit is lost
    parts = np.ldexp(data.view(np.float32), round(np.log2(factor)))
    np.testing.assert_array_equal(samples.view(np.float32), parts)
    assert 0.5 <= np.nanmax(np.abs(np.where(np.isfinite(samples[1]), samples[1], 0).view(np.float32))) < 1


@pytest.mark.parametrize("exponent", [-25, 25])
def test_scans_in_the_same_usual_unit_keep_it(exponent):
    data = np.ldexp(correlated((4, COILS, 32), 1).astype(np.complex64).view(np.float32), exponent)
    samples, _ = whitened(numbered(block(data.view(np.complex64))))
    np.testing.assert_array_equal(samples.view(np.float32), data)


def test_few_noise_samples_take_out_variances_only():
    scan_noise = correlated((1, COILS, 8), 0)
    samples, scan = whitened(numbered(block(scan_noise, [NOISE]), block(correlated((1, COILS, 32), 1))))
    deviation = np.sqrt((np.abs(scan_noise[0]) ** 2).mean(axis=1))
    np.testing.assert_allclose(samples[0], correlated((1, COILS, 32), 1)[0] / deviation[:, None], rtol=1e-5)
    assert "8 samples for 4 channels" in scan.notes[0]


def test_dead_channel_is_left_out():
    scan_noise, lines = correlated((16, COILS, 64), 0), correlated((1, COILS, 32), 1)
    others = [0, 1, 3]
    expected, _ = whitened(numbered(block(scan_noise[:, others], [NOISE]), block(lines[:, others])))
    scan_noise[:, 2] = 0
    samples, scan = whitened(numbered(block(scan_noise, [NOISE]), block(lines)))
    np.testing.assert_allclose(samples, expected, rtol=1e-5)
    assert scan.notes == ["1 of 4 channels have no noise and are left out"]


@pytest.mark.parametrize("scale", [1, 1e-5])
@pytest.mark.parametrize(
    ("combination", "place"), [([1, 0, 0, 0], 4), ([0.5, 0.5, 0.5, 0.5], 4), ([0, 1j, -2, 0], 0)]
)
def test_channels_that_are_combinations_of_others_add_nothing(combination, place, scale):
    """Otherwise what rounding leaves of them is blown up to unit noise."""

    def with_one_more(samples):
        more = scale * np.einsum("c,ncx->nx", combination, samples)
        return np.insert(samples, place, more, axis=1).astype(np.complex64)

    scan_noise, lines = correlated((16, COILS, 64), 0), correlated((4, COILS, 32), 1)
    expected, _ = whitened(numbered(block(scan_noise, [NOISE]), block(lines)))
    samples, scan = whitened(numbered(block(with_one_more(scan_noise), [NOISE]), block(with_one_more(lines))))
    assert samples.shape == expected.shape
    # however the channels are mixed, products between samples of all of them are the same
    np.testing.assert_allclose(
        np.einsum("ncx,mcx->nmx", samples, samples.conj()),
        np.einsum("ncx,mcx->nmx", expected, expected.conj()),
        atol=2e-4,
    )
    assert len(scan.notes) == 1
    assert "(of 0 to 4) is a combination of that of other channels: it is left out" in scan.notes[0]
    if place == 4:
        assert "channel 4 " in scan.notes[0]


def test_strongly_correlated_channels_are_kept():
    scan_noise = noise((64, COILS, 256))
    scan_noise[:, 3] = scan_noise[:, 0] + 0.01 * scan_noise[:, 3]
    samples, scan = whitened(numbered(block(scan_noise, [NOISE]), block(scan_noise)))
    assert samples.shape[1] == COILS
    assert np.mean(np.abs(samples) ** 2, axis=(0, 2)) == pytest.approx([1] * COILS, rel=1e-3)
    assert scan.notes == []


def test_fewer_noise_samples_than_channels_leave_none_out():
    samples, scan = whitened(
        numbered(block(correlated((1, COILS, 2), 0), [NOISE]), block(correlated((1, COILS, 32), 1)))
    )
    assert samples.shape[1] == COILS
    assert "2 samples for 4 channels" in scan.notes[0]


@pytest.mark.parametrize("garbage", [1e3, np.nan])
def test_discarded_samples_of_noise_lines_do_not_count(garbage):
    """Filters that settle at the start of a readout leave them."""
    scan_noise, lines = correlated((16, COILS, 64), 0), block(correlated((1, COILS, 32), 1))
    expected, _ = whitened(numbered(block(scan_noise, [NOISE]), lines))
    spoiled = np.pad(scan_noise, ((0, 0), (0, 0), (6, 2)), constant_values=garbage)
    samples, scan = whitened(numbered(block(spoiled, [NOISE], discard_pre=6, discard_post=2), lines))
    np.testing.assert_allclose(samples, expected, rtol=1e-5)
    assert scan.notes == []


def test_noise_lines_of_discarded_samples_alone_hold_no_noise():
    silence = block(correlated((2, COILS, 64), 0), [NOISE], discard_pre=64)
    _, scan = whitened(numbered(silence, block(correlated((1, COILS, 32), 1))))
    assert not scan.noise_known
    assert "the noise lines hold no noise" in scan.notes[0]


def test_bad_noise_is_named():
    bad = correlated((4, COILS, 32), 0)
    bad[3, 1, 5] = np.nan
    with pytest.raises(ScanError, match="noise acquisition 3 has samples that are not finite"):
        whitened(numbered(block(bad, [NOISE]), block(correlated((1, COILS, 16), 0))))


@pytest.mark.parametrize("unit", [1, 1e-12, 1e15])
@pytest.mark.parametrize("value", [1e30, 1e8, -3e8j])
def test_noise_sample_that_is_no_noise_is_named(value, unit):
    lines = [block(correlated((4, COILS, 64), part) * np.float32(unit), [NOISE]) for part in range(2)]
    lines[1].data[2, 1, 5] = value * (unit if abs(value) < 1e30 else 1)
    with pytest.raises(
        ScanError, match="noise acquisition 6 has samples too large to be noise: in channel 1"
    ):
        whitened(numbered(*lines, block(correlated((2, COILS, 64), 9))))


def test_spike_and_silent_samples_are_noise_still():
    quiet = correlated((8, COILS, 64), 0)
    quiet[:, 0, ::2] = 0  # as receivers of few bits give
    quiet[3, 2, 7] = 1e3
    _, scan = whitened(numbered(block(quiet, [NOISE]), block(correlated((2, COILS, 64), 9))))
    assert scan.noise_known
    assert scan.notes == []


def test_channels_that_differ_from_the_noise_scan_are_named():
    with pytest.raises(ScanError, match="acquisition 16 has 3 channels, the noise scan has 4"):
        whitened(numbered(block(correlated((16, COILS, 32), 0), [NOISE]), block(noise((2, 3, 32)))))


def test_unused_lines_are_dropped_and_numbers_stay_true():
    data = block(correlated((6, COILS, 32), 1))
    data.head["flags"][2:4] = 1 << (ismrmrd.ACQ_IS_PHASECORR_DATA - 1)
    scan = context(megre(), encoding(coils=COILS))
    out = list(NoiseAdjust()([data], scan))
    assert [(part.first, len(part)) for part in out] == [(0, 2), (4, 2)]


def test_pending_whitening_is_applied_to_the_cropped_lines():
    """Mixing channels and transforming readouts commute: early or late, the lines are the same."""
    matrix = np.array([[1.0, 0.0], [0.4j, 0.7]], dtype=np.complex64)
    lines = block(noise((3, 2, 32)))
    late = list(RemoveOversampling()([replace(lines, mixing=matrix)], context(megre(), encoding(coils=2))))
    early = replace(lines, data=np.matmul(matrix, lines.data))
    expected = list(RemoveOversampling()([early], context(megre(), encoding(coils=2))))
    assert late[0].mixing is None
    np.testing.assert_allclose(late[0].data, expected[0].data, atol=1e-5)


# ---- readout oversampling


def readout(blocks, nx=16, oversampling=2.0):
    scan = context(megre(), encoding((1, 8, nx), coils=1), oversampling)
    out = list(RemoveOversampling()(blocks, scan))
    assert all(part.hybrid for part in out)
    return np.concatenate([part.data for part in out])[:, 0], scan


def spectrum(image):
    """Unitary centred Fourier transform of (..., x) by its definition."""
    n = image.shape[-1]
    x = np.arange(n) - n // 2
    return image @ np.exp(-2j * np.pi * np.outer(x, x) / n) / np.sqrt(n)


@pytest.mark.parametrize(("nx", "oversampling"), [(16, 2), (16, 1), (15, 1), (15, 2), (20, 1.6), (13, 1.4)])
def test_object_inside_the_field_of_view_is_kept(nx, oversampling):
    encoded = round(nx * oversampling)
    image = np.zeros((3, 1, encoded), complex)
    inside = slice(encoded // 2 - nx // 2, encoded // 2 - nx // 2 + nx)
    image[..., inside] = noise((3, 1, nx))
    result, scan = readout([block(spectrum(image))], nx, oversampling)
    np.testing.assert_allclose(result, image[:, 0, inside], atol=2e-6)
    assert scan.notes == []


def test_noise_keeps_its_variance():
    result, _ = readout([block(noise((400, 1, 32)))])
    assert np.mean(np.abs(result) ** 2) == pytest.approx(1, abs=0.03)


def test_reversed_readout_equals_the_forward_one():
    data = noise((4, 1, 32))
    forward, _ = readout([block(data)])
    turned, _ = readout([block(data[..., ::-1], [REVERSE])])
    np.testing.assert_array_equal(turned, forward)
    both = joined(block(data[:2]), block(data[2:, :, ::-1], [REVERSE]))
    mixed, _ = readout([both])
    np.testing.assert_array_equal(mixed, forward)


@pytest.mark.parametrize("mirrored_centre", [10, 24 - 10, 24 - 1 - 10])
def test_reversed_asymmetric_readout_whichever_end_the_centre_counts_from(mirrored_centre):
    data = noise((4, 1, 24))
    forward, _ = readout([block(data, center_sample=10)])
    lines = joined(
        block(data[:2], center_sample=10),
        block(data[2:, :, ::-1], [REVERSE], center_sample=mirrored_centre),
    )
    mixed, _ = readout([lines])
    np.testing.assert_array_equal(mixed, forward)


def test_discarded_samples_of_a_reversed_line_are_those_of_its_own_time():
    data = noise((1, 1, 32))
    forward, _ = readout([block(data, discard_pre=6, discard_post=2)])
    turned, _ = readout([block(data[..., ::-1], [REVERSE], discard_pre=2, discard_post=6)])
    np.testing.assert_array_equal(turned, forward)


def test_asymmetric_echo_lands_by_its_centre_and_the_rest_is_zero():
    full = noise((2, 1, 32))
    cut, scan = readout([block(full[..., 10:], center_sample=6)])
    zeroed = full.copy()
    zeroed[..., :10] = 0
    expected, _ = readout([block(zeroed)])
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    assert scan.notes == ["readouts cover 22 of 32 encoded samples; the others are zero"]


def test_discarded_samples_do_not_count():
    full = noise((2, 1, 32))
    spoiled = full.copy()
    spoiled[..., :5], spoiled[..., 29:] = 1e6, -1e6
    full[..., :5], full[..., 29:] = 0, 0
    cut, _ = readout([block(spoiled, discard_pre=5, discard_post=3)])
    expected, _ = readout([block(full)])
    np.testing.assert_allclose(cut, expected, atol=1e-6)


def test_lines_of_different_layout_in_one_block():
    data = noise((6, 1, 24))
    centres, pre = np.array([6, 12, 6, 12, 12, 6]), np.array([0, 0, 2, 0, 3, 0])
    together, _ = readout([block(data, center_sample=centres, discard_pre=pre)])
    for row in range(6):
        alone, _ = readout([block(data[row : row + 1], center_sample=centres[row], discard_pre=pre[row])])
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("centre", [32, 40, 0])
def test_impossible_centre_is_taken_as_centred(centre):
    data = noise((2, 1, 32))
    result, _ = readout([block(data, center_sample=centre)])
    expected, _ = readout([block(data)])
    np.testing.assert_array_equal(result, expected)


def test_readout_far_longer_than_the_grid_is_an_error():
    with pytest.raises(
        ScanError, match="acquisition 7 has 64 samples, but the header's encoded matrix has 32"
    ):
        readout([block(noise((1, 1, 64)), first=7)])


def test_line_without_samples_left_is_an_error():
    with pytest.raises(ScanError, match="keeps none of its 32 samples"):
        readout([block(noise((1, 1, 32)), discard_pre=20, discard_post=12)])


def test_not_a_number_stays_in_its_own_line():
    data = noise((3, 1, 32))
    expected, _ = readout([block(data)])
    data[1, 0, 4] = np.nan
    result, _ = readout([block(data)])
    np.testing.assert_array_equal(result[[0, 2]], expected[[0, 2]])
    assert np.isnan(result[1]).any()


def cropped_before(data):
    """What Gadgetron's removal of a twofold oversampling leaves of samples (n, c, sample)."""
    n = data.shape[-1]
    image = data @ np.linalg.inv(spectrum(np.eye(n)))
    return spectrum(image[..., n // 4 : n // 4 + n // 2])


@pytest.mark.parametrize("centre", [8, 16])
def test_readouts_that_were_cropped_before_are_only_transformed(centre):
    full = noise((6, 1, 32))
    expected, _ = readout([block(full)])
    lines = block(cropped_before(full), center_sample=centre)
    result, scan = readout([lines])
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert scan.notes == [
        "readouts have the 16 samples that are left of the header's 32 without oversampling: taken as "
        "cropped already"
    ]


def test_reversed_readouts_and_calibration_lines_may_be_cropped_too():
    full = noise((6, 1, 32))
    expected, _ = readout([block(full)])
    data = cropped_before(full)
    calibration = block(data[:2], [CALIBRATION])
    lines = joined(calibration, block(data[2:4]), block(data[4:, :, ::-1], [REVERSE], center_sample=7))
    result, _ = readout([lines])
    np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize(
    "fields", [{"center_sample": 4}, {"center_sample": 0}, {"discard_pre": 2}, {"discard_post": 1}]
)
def test_short_readouts_that_are_not_whole_are_partial_ones(fields):
    data = noise((2, 1, 16))
    _, scan = readout([block(data, **fields)])
    assert [note[:14] for note in scan.notes] == ["readouts cover"]


def test_short_lines_for_calibration_do_not_tell_that_the_scan_was_cropped():
    short, full = noise((2, 1, 16)), noise((3, 1, 32))
    padded = np.pad(short, ((0, 0), (0, 0), (8, 8)))
    expected, _ = readout([block(padded), block(full, first=2)])
    result, _ = readout([block(short, [CALIBRATION]), block(full, first=2)])
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize(("samples", "flags"), [(32, []), (12, []), (32, [CALIBRATION])])
def test_lines_that_were_not_cropped_as_the_first_are_named(samples, flags):
    with pytest.raises(
        ScanError, match=f"acquisition 2 has {samples} samples that are not those of a readout"
    ):
        readout([block(noise((2, 1, 16))), block(noise((1, 1, samples)), flags, first=2)])


def test_spirals_are_left_alone():
    scan = context(megre(), encoding(coils=1))
    scan.encoding = type(scan.encoding)(**{**vars(scan.encoding), "trajectory": "spiral"})
    lines = block(noise((2, 1, 50)))
    assert list(RemoveOversampling()([lines], scan)) == [lines]


# ---- coil compression


def low_rank(n, rank=2, coils=6, seed=0):
    """Signals that only ``rank`` virtual channels see: (n, c, x)."""
    maps = noise((coils, rank), 50)
    return np.einsum("cr,nrx->ncx", maps, noise((n, rank, 16), seed))


def compressed(blocks, **settings):
    scan = context(megre(), encoding((1, 64, 16), coils=6))
    return np.concatenate([part.data for part in CompressCoils(**settings)(blocks, scan)])


def test_compression_keeps_what_few_channels_see():
    data = low_rank(200)
    small = compressed(numbered(block(data, kspace_encode_step_1=np.arange(200) % 64)), coils=2)
    assert small.shape == (200, 2, 16)
    assert np.linalg.norm(small) == pytest.approx(np.linalg.norm(data), rel=1e-5)
    # inner products between lines survive: the combination has orthonormal rows
    np.testing.assert_allclose(
        np.einsum("ncx,mcx->nm", small, small.conj()),
        np.einsum("ncx,mcx->nm", data, data.conj()),
        atol=1e-3,
    )


def test_white_noise_stays_white():
    small = compressed(numbered(block(noise((300, 6, 16)), kspace_encode_step_1=32)), coils=3)
    flat = small.transpose(1, 0, 2).reshape(3, -1)
    covariance = flat @ flat.conj().T / flat.shape[1]
    assert np.abs(covariance - np.eye(3)).max() < 0.08


def test_off_and_more_channels_than_there_are():
    data = noise((4, 6, 16))
    np.testing.assert_array_equal(compressed(numbered(block(data))), data)
    more = compressed(numbered(block(data, kspace_encode_step_1=32)), coils=9)
    assert more.shape == data.shape
    assert np.linalg.norm(more) == pytest.approx(np.linalg.norm(data), rel=1e-5)


def test_edge_lines_wait_for_the_centre():
    # the edge holds only noise in channels that the centre's signal does not use
    data = 1e-3 * noise((64, 6, 16))
    data[30:35] = low_rank(5, 1)
    small = compressed(numbered(block(data, kspace_encode_step_1=np.arange(64))), coils=1, lines=4)
    assert np.linalg.norm(small[32]) == pytest.approx(np.linalg.norm(data[32]), rel=1e-5)
    early = compressed(
        numbered(block(data, kspace_encode_step_1=np.arange(64))), coils=1, lines=4, longest_wait=8
    )
    assert np.linalg.norm(early[32]) < 0.95 * np.linalg.norm(data[32])


def test_not_a_number_in_the_first_lines_is_named():
    data = noise((8, 6, 16))
    data[5, 0, 0] = np.inf
    with pytest.raises(ScanError, match="acquisition 5 has samples that are not finite"):
        compressed(numbered(block(data, kspace_encode_step_1=32)), coils=2, lines=8)


def test_changing_number_of_channels_is_named():
    lines = [block(noise((8, 6, 16)), kspace_encode_step_1=32), block(noise((2, 5, 16)))]
    with pytest.raises(ScanError, match="acquisition 8 has 5 channels, the ones before have 6"):
        compressed(numbered(*lines), coils=2, lines=4)


# ---- blocks


@pytest.mark.parametrize("length", [1, 7, 50, 128])
def test_the_cut_into_blocks_changes_no_bit(length):
    lines = joined(
        block(noise((40, 6, 32)), [NOISE]),
        block(noise((300, 6, 32), 1), kspace_encode_step_1=np.arange(300) % 64),
    )
    lines.head["flags"][100:120] |= np.uint64(1 << (REVERSE - 1))
    lines.head["sample_time_us"][200:] = 7

    def run(blocks):
        scan = context(megre(), encoding((1, 64, 16), coils=6))
        for gadget in (NoiseAdjust(), RemoveOversampling(), CompressCoils(coils=3)):
            blocks = gadget(blocks, scan)
        return np.concatenate([part.data for part in blocks])

    np.testing.assert_array_equal(run(recut(lines, length)), run(recut(lines, 97)))
