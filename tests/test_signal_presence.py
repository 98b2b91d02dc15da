"""Slices of noise alone: told from those with signal, and their maps left empty."""

from dataclasses import replace

import pytest
import torch
from fingerprint_scan import fingerprint_scan
from scan_of_ellipses import PROTOCOLS, scan_of_ellipses

from quantitron.gadgets.gadget import Context
from quantitron.gadgets.reconstruct import Reconstruct
from quantitron.recon.gram import reduce_kspace
from quantitron.recon.signal_presence import (
    calibration_serves,
    holds_signal,
    is_one_plane,
    silenced,
)


def noise_like(values, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(values.shape, dtype=values.dtype, generator=generator) * (values != 0)


def reconstructed(solver, *problems):
    """Final maps of the slices, and the context with what was said."""
    first = problems[0]
    context = Context(header=None, encoding=first.encoding, protocol=first.protocol, axes={})
    gadget = Reconstruct.build({"solver": solver, "device": "cpu"}, "test")
    gadget.prepare(context)
    context.encoding = replace(context.encoding, slices=len(problems))
    return list(gadget(iter(problems), context))[-1], context


def of_noise(problem, scale=1.0):
    """The problem with noise of standard deviation ``scale`` in the place of its data."""
    samples = noise_like(problem.kspace.samples, scale)
    kspace = replace(problem.kspace, samples=samples, energy=float(samples.abs().square().sum()))
    if hasattr(problem, "dictionary"):
        return replace(problem, kspace=kspace)
    return replace(problem, kspace=kspace, reduced=reduce_kspace(kspace, problem.reduced.basis))


@pytest.mark.parametrize("known", [True, False], ids=["whitened", "noise unknown"])
@pytest.mark.parametrize("sequence", ["vfa_gre", "t2ir_gre", "megre"])
def test_lines_of_noise_are_told_from_weak_signal(sequence, known):
    # In one image of a contrast the noise is as strong as the tissue, in each coil stronger.
    problem, _, _ = scan_of_ellipses(PROTOCOLS[sequence], (4, 24, 24), acceleration=4, noise=4.0)
    problem = replace(problem, noise_known=known)
    assert holds_signal(problem)
    assert not holds_signal(of_noise(problem))
    assert holds_signal(of_noise(problem, 2.0)) is known  # louder than the noise scan: something is there
    assert not holds_signal(silenced(problem))


@pytest.mark.parametrize("known", [True, False], ids=["whitened", "noise unknown"])
def test_samples_of_noise_are_told_from_weak_signal(known):
    scan = fingerprint_scan(24, noise=1.0, pd=20.0)
    problem = replace(scan.problem, noise_known=known)
    assert holds_signal(problem)
    assert not holds_signal(of_noise(problem))
    assert not holds_signal(silenced(problem))


def test_a_slice_of_noise_between_others_has_an_empty_mask_and_changes_nothing_else():
    problem, _, _ = scan_of_ellipses(PROTOCOLS["megre"], (1, 24, 24), noise=0.5)

    plain, before = reconstructed("subspace", problem, problem)
    mixed, context = reconstructed("subspace", problem, of_noise(problem), problem)
    assert not mixed.mask[1].any()
    assert mixed.values["t2star"][1].isnan().all()
    for name, values in plain.values.items():
        torch.testing.assert_close(mixed.values[name][[0, 2]], values, equal_nan=True, rtol=0, atol=0)
    assert context.notes == [*before.notes, "slice 1 of 3 holds noise alone: its maps are empty"]
    assert not context.failures


def test_a_scan_of_noise_alone_gives_empty_maps_and_says_so():
    problem, _, _ = scan_of_ellipses(PROTOCOLS["megre"], (1, 24, 24), noise=0.5)
    maps, context = reconstructed("subspace", of_noise(problem))
    assert not maps.mask.any()
    assert "the scan holds no signal" in context.failures[0]


@pytest.mark.parametrize("known", [True, False], ids=["whitened", "noise unknown"])
def test_calibration_lines_of_noise_are_told(known):
    problem, _, _ = scan_of_ellipses(PROTOCOLS["megre"], (1, 24, 24), noise=0.5)
    problem = replace(problem, noise_known=known)
    assert calibration_serves(problem)
    for scale in (1.0, 0.0):
        samples = noise_like(problem.calibration.samples, scale)
        dead = replace(problem, calibration=replace(problem.calibration, samples=samples))
        assert not calibration_serves(dead)


@pytest.mark.parametrize("known", [True, False], ids=["whitened", "noise unknown"])
def test_calibration_readouts_of_noise_or_of_the_centre_alone_are_told(known):
    problem = replace(fingerprint_scan(24, noise=1.0).problem, noise_known=known)
    calibration = problem.kspace.where(problem.kspace.time_point < 8)
    assert calibration_serves(replace(problem, calibration=calibration))
    assert not calibration_serves(problem)
    useless = [
        replace(calibration, samples=noise_like(calibration.samples)),
        replace(calibration, samples=torch.zeros_like(calibration.samples)),
        replace(calibration, trajectory=calibration.trajectory / 10),
    ]
    for readouts in useless:
        assert not calibration_serves(replace(problem, calibration=readouts))


@pytest.mark.parametrize(("flagged", "serves"), [(2, False), (4, False), (8, True)])
def test_some_of_the_spirals_of_a_scan_are_no_calibration(flagged, serves):
    """Eight fill k-space; what is missing of it would be in the coil maps of all."""
    problem = fingerprint_scan(24, noise=1.0).problem
    calibration = problem.kspace.where(problem.kspace.time_point % 8 < flagged)
    assert calibration_serves(replace(problem, calibration=calibration)) == serves


def test_a_calibration_of_its_own_may_reach_less_far_than_the_scan():
    problem = fingerprint_scan(24, noise=1.0).problem
    calibration = problem.kspace.where(problem.kspace.time_point < 8)
    calibration = replace(calibration, trajectory=calibration.trajectory / 3)
    assert calibration_serves(replace(problem, calibration=calibration))


@pytest.mark.parametrize("known", [True, False], ids=["whitened", "noise unknown"])
def test_one_plane_of_a_slab_is_no_calibration_of_lines(known):
    """Of one plane nothing tells how coil maps change along z; they came from the scan without a word."""
    problem, _, _ = scan_of_ellipses(PROTOCOLS["megre"], (4, 24, 24), noise=0.5)
    problem = replace(problem, noise_known=known)
    assert calibration_serves(problem)
    one = problem.calibration.count.clone()
    one[:, [0, 1, 3]] = 0
    calibration = replace(problem.calibration, count=one)
    assert not calibration_serves(replace(problem, calibration=calibration))
    few = torch.zeros_like(one)
    few[:, :, 10:14] = 1
    assert not calibration_serves(replace(problem, calibration=replace(calibration, count=few)))


def slab(arms, planes, calibrated):
    """A stack of spirals of noise-free signal, with readouts at some of its partitions as calibration."""
    problem = fingerprint_scan(24, noise=1.0).problem
    flat = problem.kspace.where(problem.kspace.time_point % 8 < arms)

    def stack(kspace, partitions):
        counts = len(kspace.readout_length)
        return replace(
            kspace,
            samples=kspace.samples.repeat(1, len(partitions)),
            trajectory=torch.cat(
                [torch.nn.functional.pad(kspace.trajectory, (0, 1), value=kz / planes) for kz in partitions]
            ),
            readout_length=kspace.readout_length.repeat(len(partitions)),
            time_point=kspace.time_point.repeat(len(partitions)),
            slice=torch.zeros(counts * len(partitions), dtype=kspace.slice.dtype),
            grid=(1, planes, *kspace.grid[2:]),
        )

    every = range(-(planes // 2), planes - planes // 2)
    calibration = stack(problem.kspace.where(problem.kspace.time_point < 8), calibrated)
    return replace(problem, kspace=stack(flat, every), calibration=calibration)


def test_one_plane_of_a_slab_on_a_trajectory_serves_where_the_scan_itself_has_gaps():
    assert calibration_serves(slab(8, 8, range(-3, 4)))
    assert not is_one_plane(slab(8, 8, range(-1, 2)))
    assert is_one_plane(slab(8, 8, [0]))
    assert not calibration_serves(slab(8, 8, [0]))
    assert calibration_serves(slab(2, 8, [0]))
    assert not is_one_plane(fingerprint_scan(24, noise=1.0).problem)


def test_coil_maps_come_from_the_scan_where_its_calibration_is_noise():
    problem = fingerprint_scan(24, noise=1.0).problem
    calibration = problem.kspace.where(problem.kspace.time_point < 8)
    dead = replace(calibration, samples=noise_like(calibration.samples))
    plain, _ = reconstructed("svdmrf", problem)
    found, context = reconstructed("svdmrf", replace(problem, calibration=dead))
    for name, values in plain.values.items():
        torch.testing.assert_close(found.values[name], values, equal_nan=True, rtol=0, atol=0)
    assert [note for note in context.notes if "calibration of the scan holds noise alone" in note]
