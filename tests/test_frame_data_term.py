"""The frame-by-frame data term against the operators, the reduced form and differences."""

from dataclasses import replace

import pytest
import torch

from quantitron.recon.data import Basis, KSpace
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.operators.coils import CoilOperator
from quantitron.recon.operators.fourier import FourierOperator
from quantitron.recon.operators.frame_data_term import FrameDataTerm, frame_images
from quantitron.recon.operators.reduced_sense import ReducedSense
from quantitron.recon.operators.sampling import SamplingOperator
from quantitron.recon.operators.subspace import OffResonanceOperator, SubspaceOperator

NX, COILS = 4, 3
CONTRASTS, ECHOES, RANK, COEFFICIENTS = 5, 3, 2, 4
FRAMES = CONTRASTS * ECHOES
ECHO_TIME = torch.tensor([0.002, 0.005, 0.009], dtype=torch.float64)
EVERYWHERE = torch.arange(NX)


def _random(*shape, seed=0, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _lines(grid=(4, 6), dtype=torch.complex128, share=0.3):
    """Random lines in random order, some the mean of several, two frames with none; and the counts."""
    generator = torch.Generator().manual_seed(1)
    count = torch.randint(1, 4, (FRAMES, *grid), generator=generator).to(dtype).real
    count *= torch.rand(FRAMES, *grid, generator=generator) < share
    count[[0, 7]] = 0
    t, kz, ky = (
        index[torch.randperm(int((count > 0).sum()), generator=torch.Generator().manual_seed(2))]
        for index in torch.nonzero(count, as_tuple=True)
    )
    samples = _random(len(t), COILS, NX, seed=3).to(dtype)
    weighted = samples.abs().square() * count[t, kz, ky][:, None, None]
    kspace = KSpace(
        samples,
        t // ECHOES,
        t % ECHOES,
        torch.zeros_like(t),
        kz,
        ky,
        count[t, kz, ky],
        float(weighted.sum(dtype=torch.float64)) + 17.0,  # more than the means hold: repeats scatter
        (CONTRASTS, 1, ECHOES),
        (1, *grid, NX),
    )
    return kspace, count


def _images(grid=(4, 6), dtype=torch.complex128):
    return _random(NX, FRAMES, *grid, seed=4).to(dtype), _random(NX, COILS, *grid, seed=5).to(dtype)


def _dense(kspace, count):
    """Samples on the grid of all frames times sqrt(n): (x, c, t, z, y)."""
    dense = torch.zeros(NX, COILS, *count.shape, dtype=kspace.samples.dtype)
    frame = kspace.contrast * ECHOES + kspace.echo
    dense[:, :, frame, kspace.kz, kspace.ky] = kspace.samples.permute(2, 1, 0)
    return dense * count.sqrt()


@pytest.mark.parametrize("transform", ["fft", "direct"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 8), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.complex128, 1e-12)])
def test_it_is_the_distance_of_the_operators(grid, dtype, tolerance, transform):
    kspace, count = _lines(grid, dtype, 0.5)
    frames, csm = _images(grid, dtype)
    operator = SamplingOperator(count.sqrt()) @ FourierOperator((-2, -1)) @ CoilOperator(csm)
    residual = operator(frames) - _dense(kspace, count)
    term = FrameDataTerm(kspace, transform=transform)
    predicted, acquired = term.predict(frames, csm, EVERYWHERE)
    frame, kz, ky = torch.nonzero(count, as_tuple=True)
    expected = (operator(frames) / count.sqrt().clamp_min(1))[:, :, frame, kz, ky].transpose(1, 2)
    assert float((predicted - expected).norm() / expected.norm()) < tolerance
    found = (_dense(kspace, count) / count.sqrt().clamp_min(1))[:, :, frame, kz, ky].transpose(1, 2)
    torch.testing.assert_close(acquired, found)
    l1 = float(torch.view_as_real(residual).abs().sum(dtype=torch.float64))
    l2 = float(torch.view_as_real(residual).square().sum(dtype=torch.float64))
    assert float(term.l1(frames, csm, EVERYWHERE)) == pytest.approx(l1, rel=tolerance)
    assert float(term.l2(frames, csm, EVERYWHERE)) == pytest.approx(l2 + 17, rel=tolerance)
    assert term.samples_per_position == COILS * int((count > 0).sum())


@pytest.mark.parametrize("transform", ["fft", "direct"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex64, 1e-5), (torch.complex128, 1e-12)])
def test_l2_is_the_residual_of_the_reduced_form(dtype, tolerance, transform):
    kspace, _ = _lines(dtype=dtype)
    real = kspace.count.dtype
    contrast = torch.linalg.qr(_random(CONTRASTS, RANK, seed=6).real)[0].to(real)
    mixing = _random(ECHOES, RANK, COEFFICIENTS, seed=7).to(dtype)
    phi = torch.einsum("wl,elk->wek", contrast.to(dtype), mixing).flatten(0, 1)  # (t, k)
    b0 = 40 * _random(NX, 4, 6, seed=8).real.to(real)
    _, csm = _images(dtype=dtype)
    reduced = reduce_kspace(kspace, Basis(contrast, torch.ones(RANK), 1.0, "dictionary"))
    other = ReducedSense(reduced, csm, mixing, b0, ECHO_TIME)
    u = _random(*other.shape, seed=9).to(dtype)
    frames = (OffResonanceOperator(b0, ECHO_TIME, CONTRASTS) @ SubspaceOperator(phi))(u)
    residual = float(FrameDataTerm(kspace, transform=transform).l2(frames, csm, EVERYWHERE))
    assert residual == pytest.approx(other.residual_energy(u), rel=tolerance)


@pytest.mark.parametrize("transform", ["fft", "direct"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient_is_that_of_differences(norm, transform):
    kspace, _ = _lines()
    term = FrameDataTerm(kspace, transform=transform, working_set=3000)
    loss = getattr(term, norm)
    position = torch.tensor([3, 1])
    frames, csm = (part[position].requires_grad_() for part in _images())
    gradients = torch.autograd.grad(0.5 * loss(frames, csm, position), (frames, csm))
    for number, gradient in enumerate(gradients):
        direction = _random(*gradient.shape, seed=10 + number)
        steps = [torch.zeros_like(frames), torch.zeros_like(csm)]
        steps[number] = 1e-6 * direction
        with torch.no_grad():
            ahead = loss(frames + steps[0], csm + steps[1], position)
            behind = loss(frames - steps[0], csm - steps[1], position)
        slope = torch.view_as_real(gradient * direction.conj())[..., 0].sum()
        assert float(slope) == pytest.approx(0.5 * float(ahead - behind) / 2e-6, rel=1e-6)


def test_gradient_of_l2_is_the_normal_equations():
    kspace, count = _lines()
    frames, csm = _images()
    frames.requires_grad_()
    operator = SamplingOperator(count.sqrt()) @ FourierOperator((-2, -1)) @ CoilOperator(csm)
    (gradient,) = torch.autograd.grad(FrameDataTerm(kspace).l2(frames, csm, EVERYWHERE), frames)
    expected = 2 * (operator.gram(frames.detach()) - operator.H(_dense(kspace, count)))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", ["fft", "direct"])
def test_chunks_and_batches_change_nothing(transform):
    kspace, _ = _lines()
    frames, csm = _images()

    def evaluate(working_set, batches):
        term = FrameDataTerm(kspace, transform=transform, working_set=working_set)
        parts = [frames.clone().requires_grad_(), csm.clone().requires_grad_()]
        total = sum(term.l1(parts[0][b], parts[1][b], b) for b in batches)
        return total.detach(), *torch.autograd.grad(total, parts)

    reference = evaluate(1 << 30, [EVERYWHERE])
    for working_set in (1, 5000, 1 << 30):
        result = evaluate(working_set, [torch.tensor([2, 0]), torch.tensor([1]), torch.tensor([3])])
        for value, expected in zip(result, reference, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_is_differentiated():
    kspace, _ = _lines()
    frames, csm = _images()
    term = FrameDataTerm(kspace)
    both = [frames.clone().requires_grad_(), csm.clone().requires_grad_()]
    expected = torch.autograd.grad(term.l1(*both, EVERYWHERE), both)
    torch.testing.assert_close(
        torch.autograd.grad(term.l1(both[0], csm, EVERYWHERE), both[0])[0], expected[0]
    )
    torch.testing.assert_close(
        torch.autograd.grad(term.l1(frames, both[1], EVERYWHERE), both[1])[0], expected[1]
    )
    assert not term.l1(frames, csm, EVERYWHERE).requires_grad


def test_frames_from_their_factors():
    contrast = _random(NX, CONTRASTS, 4, 6, seed=12).real.requires_grad_()
    echo = _random(NX, ECHOES, 4, 6, seed=13).requires_grad_()
    frames = frame_images(contrast, echo)
    assert torch.equal(frames[:, 2 * ECHOES + 1], contrast[:, 2] * echo[:, 1])
    kspace, _ = _lines()
    loss = FrameDataTerm(kspace).l1(frames, _images()[1], EVERYWHERE)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (contrast, echo)))


def test_the_way_follows_the_sampling():
    few, many = _lines(share=0.02)[0], _lines(share=0.9)[0]
    assert FrameDataTerm(few).transform == "direct"
    assert FrameDataTerm(many).transform == "fft"


def test_what_does_not_fit_is_refused():
    kspace, _ = _lines()
    frames, csm = _images()
    term = FrameDataTerm(kspace)
    with pytest.raises(ValueError, match="coil maps at 4 readout positions"):
        term.l1(frames[:, 1:], csm, EVERYWHERE)
    with pytest.raises(ValueError, match="coil maps at 1 readout positions"):
        term.l2(frames, csm, torch.tensor([0]))
    with pytest.raises(ValueError, match="of one slice"):
        FrameDataTerm(replace(kspace, grid=(2, 4, 6, NX)))
    twice = {
        name: torch.cat([getattr(kspace, name), getattr(kspace, name)[:1]])
        for name in ("samples", "contrast", "echo", "slice", "kz", "ky", "count")
    }
    with pytest.raises(ValueError, match="twice in one frame"):
        FrameDataTerm(replace(kspace, **twice))
