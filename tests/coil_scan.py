"""An object in an array of coils, as k-space and as what should be found of it."""

import torch

from quantitron.recon.operators.fourier import centred_fft


def ellipsoid(grid, coils=5, noise=0.01, slab=False):
    """An ellipsoid with structure, smooth sensitivities around it: csm, k-space (c, z, y, x), mask.

    As a ``slab`` it is a cylinder, which ends with the field of view.
    """
    z, y, x = torch.meshgrid(*((torch.arange(n) - n // 2) / n for n in grid), indexing="ij")
    angle = 2 * torch.pi * torch.arange(coils)[:, None, None, None] / coils
    distance = (
        (y - 0.7 * torch.sin(angle)) ** 2
        + (x - 0.7 * torch.cos(angle)) ** 2
        + (z - 0.2 * torch.cos(3 * angle)) ** 2
    )
    csm = torch.polar(
        torch.exp(-distance / 0.5), 1.5 * (x * torch.cos(angle) - y * torch.sin(2 * angle)) + angle
    )
    csm = csm / torch.linalg.vector_norm(csm, dim=0)
    mask = (y / 0.38) ** 2 + (x / 0.32) ** 2 + (0 * z if slab else (z / 0.45) ** 2) < 1
    image = mask * (1 + 0.4 * torch.sin(40 * x) * torch.cos(33 * y))
    kspace = centred_fft(csm * image, (1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    return csm, kspace + noise * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator), mask


def misalignment(estimate, csm, mask):
    """Root mean square sine of the angle between estimated and true sensitivity vectors."""
    alignment = (estimate.conj() * csm).sum(0).abs()[mask]
    return float((1 - alignment.square()).clamp_min(0).mean().sqrt())
