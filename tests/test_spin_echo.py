"""Synthesis of spin-echo images: limits, weighting, and protocols that no scanner could play."""

import math

import pytest
import torch

from quantitron.recon.signal.spin_echo import (
    SpinEchoProtocol,
    spin_echo_dictionary,
    spin_echo_images,
    spin_echo_signal,
)

T1, T2 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.08, dtype=torch.float64)


def one(repetition_time, echo_time, t1=T1, t2=T2):
    return float(spin_echo_signal(t1, t2, SpinEchoProtocol(("one",), (repetition_time,), (echo_time,))))


def test_long_repetition_and_no_echo_time_leave_proton_density():
    assert one(100.0, 0.0) == pytest.approx(1, abs=1e-12)


def test_recovery_and_decay_are_those_of_one_time_constant():
    assert one(float(T1), 0.0) == pytest.approx(1 - math.exp(-1), rel=1e-12)
    assert one(100.0, float(T2)) == pytest.approx(math.exp(-1), rel=1e-12)
    assert one(float(T1), float(T2)) == pytest.approx((1 - math.exp(-1)) / math.e, rel=1e-12)


def test_repetition_far_below_t1_is_linear_in_single_precision():
    assert one(1e-6, 0.0, T1.float(), T2.float()) == pytest.approx(1e-6 / 0.9, rel=1e-5)


def test_usual_images_are_weighted_as_they_are_named():
    protocol = SpinEchoProtocol()
    assert protocol.modalities == ("T1w", "T2w", "PDw")
    base = spin_echo_signal(T1, T2, protocol)

    def change(t1, t2):
        ratio = spin_echo_signal(t1, t2, protocol) / base
        return dict(zip(protocol.modalities, ratio.log().abs().tolist(), strict=True))

    by_t1, by_t2 = change(1.2 * T1, T2), change(T1, 1.2 * T2)
    assert by_t1["T1w"] > 0.1
    assert by_t2["T1w"] < 0.025
    assert by_t2["T2w"] > 0.18
    assert by_t1["T2w"] < 0.015
    assert by_t1["PDw"] < 0.015
    assert by_t2["PDw"] < 0.025
    # White matter is brighter than grey in T1w, darker in T2w; fluid the reverse by far.
    white, grey, fluid = (
        spin_echo_signal(torch.tensor(t1), torch.tensor(t2), protocol)
        for t1, t2 in ((0.85, 0.07), (1.4, 0.09), (4.3, 1.8))
    )
    assert white[0] > grey[0] > fluid[0]
    assert white[1] < grey[1] < fluid[1]


def test_images_scale_with_the_size_of_pd_and_not_with_its_phase():
    generator = torch.Generator().manual_seed(0)
    t1, t2 = 0.5 + torch.rand(2, 2, 3, 4, generator=generator)
    pd = torch.randn(2, 3, 4, generator=generator, dtype=torch.complex64)
    images = spin_echo_images(t1, t2, pd, SpinEchoProtocol())
    assert images.shape == (3, 2, 3, 4)
    assert not images.is_complex()
    signal = spin_echo_signal(t1, t2, SpinEchoProtocol()).movedim(-1, 0)
    assert torch.allclose(images, pd.abs() * signal)
    turned = spin_echo_images(t1, t2, pd * torch.exp(torch.tensor(2j)), SpinEchoProtocol())
    assert torch.allclose(turned, images)


def test_voxels_without_estimate_are_black():
    t1 = torch.tensor([0.0, math.nan, 1.0, 1.0, 1.0])[None, None]
    t2 = torch.tensor([0.0, math.nan, 0.1, 0.0, 0.1])[None, None]
    pd = torch.tensor([0.0, math.nan, 0.0, 1.0, 1.0])[None, None]
    protocol = SpinEchoProtocol(("PDw", "T2w"), (5.0, 5.0), (0.0, 0.1))
    images = spin_echo_images(t1, t2, pd, protocol)
    assert (images[..., :4] == 0).all()
    assert (images[..., 4] > 0).all()


def test_dictionary_is_the_signal_at_each_point_of_the_grid():
    t1 = torch.logspace(-1, 0.6, 5, dtype=torch.float64)
    t2 = torch.logspace(-2, 0, 4, dtype=torch.float64)
    table = spin_echo_dictionary(t1, t2, SpinEchoProtocol())
    assert table.shape == (5, 4, 3)
    for i, j in ((0, 0), (4, 1), (2, 3)):
        assert torch.allclose(table[i, j], spin_echo_signal(t1[i], t2[j], SpinEchoProtocol()))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (((), (), ()), "at least one"),
        ((("T1w", "T2w"), (0.5,), (0.01, 0.1)), "2 modalities .T1w, T2w. need .* not 1 and 2"),
        ((("T1w", "T1w"), (0.5, 0.5), (0.01, 0.1)), "named twice"),
        ((("T1w",), (0.5,), (0.5,)), "T1w: a spin echo 0.5 s .* TR of 0.5 s"),
        ((("T1w",), (0.5,), (-0.01,)), "T1w"),
        ((("T1w",), (math.inf,), (0.01,)), "T1w"),
        ((("T1w",), (math.nan,), (0.01,)), "T1w"),
    ],
)
def test_a_protocol_that_cannot_be_played_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SpinEchoProtocol(*fields)
