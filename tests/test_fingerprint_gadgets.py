"""Fingerprints from their readouts to images: dictionary, B1 map, choice of the solver, the whole chain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar
from xml.etree import ElementTree

import ismrmrd
import ismrmrd.xsd as xsd
import numpy as np
import pytest
import torch
from line_factory import context as cartesian_context
from line_factory import megre, numbered
from readout_factory import context, fingerprint, images, readouts, spirals, whole_scan

from quantitron.gadgets import chain as chain_module
from quantitron.gadgets import reconstruct
from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.chain import check_configuration, make_chain
from quantitron.gadgets.dictionary_cache import FOLDER_VARIABLE
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.header import make_header
from quantitron.gadgets.reconstruct import Reconstruct
from quantitron.recon.data import FingerprintProblem, Maps
from quantitron.recon.solvers import Solver

CALIBRATION = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION
SMALL = {"t1_points": 7, "t2_points": 6, "t1_range": (0.2, 4.0), "t2_range": (0.02, 1.0)}
"""A dictionary that is simulated at once."""


@dataclass(frozen=True)
class CartesianStandIn(Solver):
    """Shares its name with another."""

    name: ClassVar[str] = "stand_in"
    sequences: ClassVar[tuple[str, ...]] = ("megre",)
    lines: int = 3


@dataclass(frozen=True)
class FingerprintStandIn(Solver):
    """Shares its name with another. Its maps tell what it got."""

    name: ClassVar[str] = "stand_in"
    sequences: ClassVar[tuple[str, ...]] = ("fisp_mrf",)
    spirals: int = 5

    def solve(self, problem: FingerprintProblem, progress) -> Iterator[Maps]:
        shape = (1, *problem.encoding.matrix)
        b1 = torch.ones(shape) if problem.b1 is None else problem.b1[None]
        values = {
            "t1": torch.full(shape, float(len(problem.kspace.time_point))),
            "t2": b1 * 0.1,
            "pd": torch.full(shape, problem.kspace.energy),
        }
        yield Maps(values, torch.ones(shape, dtype=torch.bool), rank=problem.basis.rank)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    monkeypatch.setattr(reconstruct, "SOLVERS", (*reconstruct.SOLVERS, CartesianStandIn, FingerprintStandIn))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))


# ---- basis


def ready(scan, **settings):
    gadget = BasisGadget(**{**SMALL, **settings})
    gadget.prepare(scan)
    gadget.make_ready(scan)
    return gadget


def problems(lines, scan, **settings):
    gadget = ready(scan, **settings)
    return list(gadget(Accumulate()(numbered(*lines), scan), scan))


def test_each_slice_becomes_a_problem():
    separate = readouts(spirals(3), flags=[CALIBRATION], slice=[0, 0, 2])
    lines = whole_scan(points=6, slices=3)
    scan = context(grid=images(slices=3))
    scan.noise_known = True
    parts = problems([separate, lines], scan)
    assert len(parts) == 3
    for index, problem in enumerate(parts):
        mine = lines.data[6 * index : 6 * index + 6]
        assert isinstance(problem, FingerprintProblem)
        assert problem.encoding == replace(images(), slices=1)
        assert problem.protocol == scan.protocol
        np.testing.assert_array_equal(problem.kspace.samples.numpy(), np.concatenate(list(mine), axis=1))
        assert problem.kspace.grid == (1, 1, 16, 16)
        assert problem.kspace.energy == pytest.approx(np.sum(np.abs(mine) ** 2), rel=1e-6)
        assert problem.basis is scan.basis
        assert problem.dictionary is scan.dictionary
        assert problem.b1 is None
        assert problem.noise_known
    counts = [None if p.calibration is None else len(p.calibration.time_point) for p in parts]
    assert counts == [2, None, 1]
    assert parts[2].calibration.grid == (1, 1, 16, 16)
    assert parts[2].calibration.slice.tolist() == [0]


def test_the_grid_of_the_dictionary_can_be_set():
    scan = context()
    ready(scan, b1_range=(0.8, 1.2), b1_points=3)
    dictionary = scan.dictionary
    assert dictionary.coefficients.shape[:3] == (3, 7, 6)
    assert dictionary.b1.tolist() == pytest.approx([0.8, 1.0, 1.2])
    assert (float(dictionary.t1[0]), float(dictionary.t1[-1])) == pytest.approx((0.2, 4.0))
    assert (float(dictionary.t2[0]), float(dictionary.t2[-1])) == pytest.approx((0.02, 1.0))


def test_rank_of_a_fingerprint():
    """By default what keeps 99.99 % of the energy, and not more."""
    scan = context(fingerprint(40))
    ready(scan)
    assert scan.basis.retained_energy >= 0.9999
    assert scan.dictionary.basis(scan.basis.rank - 1).retained_energy < 0.9999
    ready(scan, rank=3)
    assert scan.basis.rank == 3
    with pytest.raises(ScanError, match=r"rank leaves 2 columns .* T1, T2 and PD of fisp_mrf take 3 or more"):
        BasisGadget(**SMALL, rank=2).prepare(scan)
    ready(scan, rank=0.5)  # at least: half the energy, in what the maps take
    assert scan.basis.rank == 3
    with pytest.raises(ScanError, match="rank 41 is above the 40 contrasts of this fisp_mrf scan"):
        BasisGadget(**SMALL, rank=41).prepare(scan)


def test_a_short_train_is_no_less_reconstructed_by_a_preset():
    """Where T2 shows little, most of the energy lies in fewer columns than the maps take."""
    short = replace(fingerprint(3), flip_angle=tuple(math.radians(angle) for angle in (5.26, 5.76, 6.24)))
    scan = context(short)
    ready(scan, rank=0.9999)
    assert scan.basis.rank == 3
    assert scan.dictionary.basis(0.9999).rank < 3


def test_the_rank_of_other_scans_is_as_before():
    scan = cartesian_context(megre(), images(trajectory="cartesian"))
    assert BasisGadget().columns_or_energy("megre") == 0.99999
    BasisGadget().prepare(scan)
    assert scan.dictionary is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "centre"}, "source is 'centre', but fingerprints are matched in the basis of their"),
        ({"source": "navigator"}, "source is 'navigator', but fingerprints"),
        ({"b1_range": (1.2, 0.8)}, r"b1_range runs from 1\.2 to 0\.8"),
        ({"b1_points": 5}, "'b1_points' needs 'b1_range'"),
        ({"t1_range": (3.0, 0.1)}, "basis: the T1 range of a dictionary is 3 to 0.1 s"),
    ],
)
def test_wrong_settings_of_the_basis_are_one_sentence(settings, words):
    with pytest.raises(ScanError, match=words):
        ready(context(), **settings)


def test_the_grid_is_refused_for_other_sequences():
    with pytest.raises(ScanError, match="property 't2_points' is for fisp_mrf, this scan is megre"):
        BasisGadget(t2_points=40).prepare(cartesian_context(megre(), images(trajectory="cartesian")))


# ---- choice of the solver


def test_the_sequence_chooses_between_solvers_of_one_name():
    chosen = Reconstruct.build({"solver": "stand_in", "spirals": "7"}, "here", "fisp_mrf")
    assert chosen.method == FingerprintStandIn(7)
    assert Reconstruct.build({"solver": "stand_in", "lines": 4}, "here", "megre").method == CartesianStandIn(
        4
    )
    assert Reconstruct.build({"solver": "stand_in"}, "here").method == CartesianStandIn()


@pytest.mark.parametrize(
    ("values", "sequence", "words"),
    [
        (
            {"solver": "stand_in"},
            "vfa_gre",
            "does not reconstruct vfa_gre; it does megre, fisp_mrf",
        ),
        ({"solver": "summit"}, "fisp_mrf", "'summit' does not reconstruct fisp_mrf; it does "),
        ({"solver": "stand_in", "spirals": 3}, "megre", "unknown property 'spirals'"),
        ({"solver": "stand_on"}, "megre", "no solver 'stand_on'; there are subspace, "),
    ],
)
def test_what_no_solver_of_that_name_can_do_is_one_sentence(values, sequence, words):
    with pytest.raises(ScanError, match=words):
        Reconstruct.build(values, "here", sequence)


CHAIN = """<configuration>
  <gadget name="noise_adjust"/><gadget name="remove_oversampling"/>
  <gadget name="accumulate"/>
  <gadget name="basis">{basis}</gadget>
  <gadget name="reconstruct"><property name="solver" value="{solver}"/>{reconstruct}</gadget>
  <gadget name="images"><property name="output" value="float32"/></gadget>
</configuration>"""


def configuration(solver="stand_in", reconstruct="", **basis):
    inner = "".join(
        f"<property name='{name}' value='{str(value).strip('()')}'/>" for name, value in basis.items()
    )
    return ElementTree.fromstring(CHAIN.format(solver=solver, basis=inner, reconstruct=reconstruct))


def test_a_configuration_is_checked_for_what_its_solver_can_do():
    checked = check_configuration(configuration())
    assert set(checked) == {"megre", "fisp_mrf"}
    assert checked["fisp_mrf"]["reconstruct"]["spirals"] == 5
    assert "spirals" not in checked["megre"]["reconstruct"]
    with pytest.raises(ScanError, match="no solver 'magic'"):
        check_configuration(configuration("magic"))


def test_sections_of_the_settings_reach_the_solver_of_their_sequence(monkeypatch):
    text = (
        "all: {basis: {rank: 3}}\nfisp_mrf: {reconstruct: {spirals: 11}}\nmegre: {reconstruct: {lines: 8}}\n"
    )
    monkeypatch.setattr(chain_module, "settings_names", lambda: ["stand_in"])
    monkeypatch.setattr(chain_module, "settings_text", lambda name: text)
    checked = check_configuration(configuration())
    assert checked["fisp_mrf"]["reconstruct"]["spirals"] == 11
    assert checked["megre"]["reconstruct"]["lines"] == 8
    assert checked["fisp_mrf"]["basis"]["rank"] == 3


# ---- the whole chain


def chain(header=None, **options):
    header = make_header(images(slices=2), fingerprint()) if header is None else header
    return make_chain(configuration(**{**SMALL, **options}), xsd.ToXML(header))


def test_a_fingerprint_gives_t1_t2_pd_and_mask():
    made = chain(rank=3)
    found = list(made(numbered(whole_scan(points=6, slices=2))))
    roles = [image.meta["GADGETRON_DataRole"] for image in found]
    assert roles == ["T1", "T1", "T2", "T2", "PD", "PD", "MASK", "MASK"]  # one image a slice
    assert [image.image_series_index for image in found[::2]] == [101, 102, 104, 112]
    for image in found:
        assert image.data.shape[-3:] == (1, 16, 16)
        assert image.meta["Quantitron_Rank"] == "3"
        assert image.meta["Quantitron_Pipeline"] == "stand_in"
    assert found[0].data == pytest.approx(np.full(found[0].data.shape, 6000.0))
    assert made.context.failures == []


def test_another_sequences_solver_is_refused_before_any_data():
    with pytest.raises(ScanError, match="solver 'summit' does not reconstruct fisp_mrf; it does"):
        chain(solver="summit")


def test_a_cartesian_scan_goes_on_as_before():
    header = make_header(images(trajectory="cartesian"), megre())
    made = make_chain(configuration(), xsd.ToXML(header))
    assert made.context.dictionary is None
    assert isinstance(made.gadgets[-2].method, CartesianStandIn)


# ---- B1 map


def b1_property(path):
    return f"<property name='b1_map' value='{path}'/>"


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_b1_map_reaches_the_solver_slice_by_slice(tmp_path, kind):
    values = np.random.default_rng(0).uniform(0.8, 1.2, (2, 1, 16, 16))
    path = tmp_path / f"b1.{kind}"
    np.savez(path, b1=values) if kind == "npz" else np.save(path, values)
    made = chain(reconstruct=b1_property(path), b1_range=(0.8, 1.2), b1_points=3)
    found = list(made(numbered(whole_scan(points=6, slices=2))))
    t2 = [image.data[0, 0] for image in found if image.meta["GADGETRON_DataRole"] == "T2"]
    np.testing.assert_allclose(t2, 100 * values[:, 0], rtol=1e-5)


def test_a_b1_map_lies_on_the_maps_whatever_the_order_of_the_slices(tmp_path):
    values = np.random.default_rng(0).uniform(0.8, 1.2, (3, 1, 16, 16))
    np.save(tmp_path / "b1.npy", values)
    lines = whole_scan(points=6, slices=3)
    heights = np.array([7.0, -5.0, 1.0])  # of the slices by their numbers
    lines.head["position"][:, 2] = heights[lines.head["idx"]["slice"]]
    header = make_header(images(slices=3), fingerprint())
    made = chain(header, reconstruct=b1_property(tmp_path / "b1.npy"), b1_range=(0.8, 1.2), b1_points=3)
    t2 = next(image for image in made(numbered(lines)) if image.meta["GADGETRON_DataRole"] == "T2")
    np.testing.assert_allclose(t2.data[0], 100 * values[:, 0], rtol=1e-5)


def test_b1_beyond_the_dictionary_is_said(tmp_path):
    values = np.ones((1, 16, 16), np.float32)
    values[0, 0, :3], values[0, 5, 5] = 0.7, 1.2005
    np.save(tmp_path / "b1.npy", values)
    header = make_header(images(), fingerprint())
    options = {"reconstruct": b1_property(tmp_path / "b1.npy"), "b1_points": 3}
    beyond = [
        [note for note in chain(header, b1_range=limits, **options).context.notes if "B1 map" in note]
        for limits in ((0.8, 1.2), (0.7, 1.3))
    ]
    assert beyond[1] == []
    assert "3 of 256 voxels of the B1 map, which runs from 0.7 to 1.2, lie beyond" in beyond[0][0]


def test_a_b1_map_of_one_slice_may_leave_the_slice_axis_out(tmp_path):
    np.save(tmp_path / "b1.npy", np.ones((1, 16, 16), np.float32))
    header = make_header(images(), fingerprint())
    made = chain(header, reconstruct=b1_property(tmp_path / "b1.npy"), b1_range=(0.8, 1.2), b1_points=3)
    assert made.context.b1.shape == (1, 1, 16, 16)


def test_slices_that_nobody_announced_are_counted_at_the_end(tmp_path):
    np.save(tmp_path / "b1.npy", np.ones((2, 1, 16, 16)))
    header = make_header(images(), fingerprint())
    header.encoding[0].encodingLimits.slice = None
    options = {"reconstruct": b1_property(tmp_path / "b1.npy"), "b1_range": (0.8, 1.2), "b1_points": 3}
    assert len(list(chain(header, **options)(numbered(whole_scan(points=6, slices=2))))) == 8
    made = chain(header, **options)
    with pytest.raises(ScanError, match="the B1 map holds 2 slices, the scan has 3"):
        list(made(numbered(whole_scan(points=6, slices=3))))


GOOD = np.ones((2, 1, 16, 16))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (None, "there is no B1 map"),
        ({"b2": GOOD}, "holds b2, no array 'b1'"),
        ({"b1": GOOD[:1]}, "holds 1 slices, the scan has 2"),
        ({"b1": GOOD[0]}, "holds 1 slices, the scan has 2"),
        ({"b1": GOOD[..., :15]}, r"is 2 x 1 x 16 x 15, the images are 1 x 16 x 16 \(z, y, x\)"),
        ({"b1": GOOD[0, 0]}, "is 16 x 16, the images are"),
        ({"b1": GOOD * np.nan}, "512 voxels that are not finite"),
        ({"b1": GOOD * 100}, r"runs from 100 to 100; .* must lie in 0\.2\.\.2"),
        ({"b1": GOOD * 0}, "runs from 0 to 0"),
        ({"b1": GOOD * 1j}, "holds complex128 values, not real numbers"),
        ({"b1": np.full((2, 1, 16, 16), "a")}, "holds <U1 values"),
        ({"b1": np.full((2, 1, 16, 16), None)}, "cannot be read"),
        (b"nothing", "cannot be read"),
    ],
)
def test_wrong_b1_maps_are_one_sentence(tmp_path, held, words):
    path = tmp_path / "b1.npz"
    if isinstance(held, dict):
        np.savez(path, **held)
    elif held is not None:
        path.write_bytes(held)
    with pytest.raises(ScanError, match=words):
        chain(reconstruct=b1_property(path), b1_range=(0.8, 1.2), b1_points=3)


def test_a_b1_map_needs_a_dictionary_of_several_b1(tmp_path):
    np.savez(tmp_path / "b1.npz", b1=GOOD)
    with pytest.raises(ScanError, match="needs a dictionary of several B1 values; set the properties"):
        chain(reconstruct=b1_property(tmp_path / "b1.npz"))


def test_whatever_can_be_refused_is_refused_before_the_dictionary_is_simulated(tmp_path, monkeypatch):
    """A simulation may take minutes."""

    def never(*arguments, **settings):
        raise AssertionError("simulated although the scan is refused")

    monkeypatch.setattr("quantitron.gadgets.basis.cached_dictionary", never)
    several = {"b1_range": (0.8, 1.2), "b1_points": 3}
    with pytest.raises(ScanError, match="there is no B1 map"):
        chain(reconstruct=b1_property(tmp_path / "none.npz"), **several)
    np.savez(tmp_path / "b1.npz", b1=GOOD)
    with pytest.raises(ScanError, match="needs a dictionary of several B1 values"):
        chain(reconstruct=b1_property(tmp_path / "b1.npz"))
    with pytest.raises(AssertionError, match="simulated"):
        chain(reconstruct=b1_property(tmp_path / "b1.npz"), **several)


@pytest.mark.parametrize("limits", [(1.1, 1.3), (0.7, 0.9)])
def test_without_a_b1_map_the_dictionary_holds_the_nominal_angles(tmp_path, monkeypatch, limits):
    """Voxels would be matched at the nearest end; it is said before the dictionary is simulated."""
    np.savez(tmp_path / "b1.npz", b1=GOOD * np.mean(limits))
    chain(reconstruct=b1_property(tmp_path / "b1.npz"), b1_range=limits, b1_points=3)
    for edge in ((1.0, 1.2), (0.8, 1.0)):
        chain(b1_range=edge, b1_points=3)
    monkeypatch.setattr("quantitron.gadgets.basis.cached_dictionary", None)
    words = rf"^basis\.b1_range {limits[0]}\.\.{limits[1]} does not hold 1, at which voxels are matched"
    with pytest.raises(ScanError, match=words):
        chain(b1_range=limits, b1_points=3)


def test_a_b1_map_is_for_fingerprints(tmp_path):
    np.savez(tmp_path / "b1.npz", b1=GOOD)
    header = make_header(images(trajectory="cartesian"), megre())
    inner = configuration(reconstruct=b1_property(tmp_path / "b1.npz"))
    with pytest.raises(ScanError, match="b1_map is for fisp_mrf, this scan is megre"):
        make_chain(inner, xsd.ToXML(header))
