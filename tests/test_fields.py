"""Smooth fields, coil sensitivities and noise covariance of simulated scans."""

import numpy as np
import pytest

from quantitron.phantoms.coils import coil_sensitivities, noise_covariance
from quantitron.phantoms.field import (
    GYROMAGNETIC_RATIO,
    dipole_field,
    off_resonance,
    receive_phase,
    transmit_field,
)


def head(nz=9, n=33):
    """Places z, y, x [m] on a grid over a head, and a mask of it."""
    places = np.meshgrid(
        np.linspace(-0.03, 0.03, nz), np.linspace(-0.1, 0.1, n), np.linspace(-0.1, 0.1, n), indexing="ij"
    )
    z, y, x = places
    return tuple(places), (z / 0.04) ** 2 + (y / 0.095) ** 2 + (x / 0.075) ** 2 <= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_off_resonance_is_smooth_and_fills_its_range(seed):
    places, inside = head()
    field = off_resonance(places, 40.0, np.random.default_rng(seed))
    assert 25 < field[inside].max() <= 41
    assert -41 <= field[inside].min() < -20
    steps = [np.abs(np.diff(field, axis=axis)).max() / 6.25 for axis in (1, 2)]  # Hz per mm
    assert max(steps) < 5
    assert not off_resonance(places, 0.0, np.random.default_rng(seed)).any()


def test_fields_do_not_depend_on_the_grid():
    places, _ = head()
    part = tuple(place[3:4, 10:12, 5:9] for place in places)
    for make, amplitude in ((off_resonance, 40.0), (receive_phase, 1.5), (transmit_field, 0.2)):
        whole = make(places, amplitude, np.random.default_rng(4))
        assert np.allclose(whole[3:4, 10:12, 5:9], make(part, amplitude, np.random.default_rng(4)))


def test_transmit_field_is_high_in_the_middle():
    places, inside = head()
    field = transmit_field(places, 0.2, np.random.default_rng(0))
    assert 1.05 < field[4, 16, 16] < 1.15
    assert 0.85 < field[inside].min() < 0.95
    assert np.array_equal(transmit_field(places, 0.0, np.random.default_rng(0)), np.ones_like(field))


def test_dipole_field_of_a_sphere():
    """Inside a sphere nothing (Lorentz-corrected), outside dchi/3 a^3/r^3 (3 cos^2 - 1) B0."""
    n, radius, chi, strength = 48, 7.0, 0.5, 3.0
    z, y, x = np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")
    r = np.sqrt(z**2 + y**2 + x**2)
    sphere = np.where(r <= radius, chi, 0).astype(np.float32)
    field = dipole_field(sphere, (1e-3, 1e-3, 1e-3), strength)
    volume = np.count_nonzero(sphere)
    a3 = volume * 3 / (4 * np.pi)  # radius^3 of the voxelised sphere
    safe = np.where(r > 0, r, 1)
    expected = GYROMAGNETIC_RATIO * strength * chi / 3 * a3 / safe**3 * (3 * (z / safe) ** 2 - 1)
    shell = (r > 10) & (r < 18)
    error = np.abs(field - expected)[shell].max() / np.abs(expected)[shell].max()
    assert error < 0.05
    assert field[n // 2 + 12, n // 2, n // 2] > 0 > field[n // 2, n // 2 + 12, n // 2]
    assert np.abs(field[r < 4]).max() < 0.05 * np.abs(field).max()


@pytest.mark.parametrize("coils", [2, 8, 10, 16, 24, 32])
def test_coils_are_smooth_and_encode_in_all_directions(coils):
    places, inside = head()
    maps = coil_sensitivities(places, coils, 0.224)
    assert maps.shape == (coils, *inside.shape)
    assert np.allclose(np.sum(np.abs(maps) ** 2, axis=0), 1, atol=1e-5)
    for axis, step in ((1, 7.5), (2, 6.25), (3, 6.25)):
        change = np.abs(np.diff(maps, axis=axis)).max() / step
        assert change < 0.08  # per mm
    gram = maps[:, inside] @ maps[:, inside].conj().T / inside.sum()
    weights = np.linalg.eigvalsh(gram)[::-1]
    assert weights[0] < 0.85
    if coils >= 8:
        assert weights[3] > 0.02  # four coils' worth of information at least
        along_z = np.abs(np.abs(maps[:, 0]) - np.abs(maps[:, -1]))[:, inside[4]]
        assert along_z.max() > 0.1


def test_one_coil_is_one():
    places, _ = head()
    assert (coil_sensitivities(places, 1, 0.2) == 1).all()


@pytest.mark.parametrize("coils", [1, 2, 8, 24, 32])
def test_noise_covariance_is_one(coils):
    covariance = noise_covariance(coils, np.random.default_rng(7))
    assert np.allclose(covariance, covariance.conj().T)
    assert np.linalg.eigvalsh(covariance).min() > 0.2
    assert np.trace(covariance).real == pytest.approx(coils)
    if coils > 1:
        deviation = np.sqrt(np.diag(covariance).real)
        correlation = np.abs(covariance) / np.outer(deviation, deviation)
        nearest = np.sort(correlation, axis=1)[:, -2]
        assert (nearest > 0.1).all()
        assert (nearest < 0.3).all()
        assert deviation.max() / deviation.min() > 1.02
        assert np.abs(covariance.imag).max() > 0.01
