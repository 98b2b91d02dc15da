"""The gadget ``reconstruct``: its settings, its device, and slices that fail."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass, replace
from typing import ClassVar

import pytest
import torch

from quantitron.gadgets import reconstruct
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context
from quantitron.gadgets.reconstruct import Reconstruct
from quantitron.recon.data import Basis, Encoding, Maps, Problem, Protocol, ReducedKSpace
from quantitron.recon.device import ENVIRONMENT, choose_device
from quantitron.recon.solvers import Solver

ENCODING = Encoding((2, 6, 4), (0.02, 0.06, 0.04), (2, 4, 4))
PROTOCOL = Protocol("megre", (0.004, 0.009), (0.1,), (0.3,))
LOST = 7.0
"""Energy of a slice whose solver fails after its preview."""
LATE = 9.0
"""Energy of a slice whose solver fails after its maps."""


@dataclass(frozen=True)
class Numbered(Solver):
    """Yields a preview and maps that hold the slice's energy.

    Fails where that is negative, ``LOST`` or ``LATE``.
    """

    name: ClassVar[str] = "numbered"
    sequences: ClassVar[tuple[str, ...]] = ("megre",)
    rank: int | float = 1

    def solve(self, problem: Problem, progress) -> Iterator[Maps]:
        if problem.reduced.energy < 0:
            raise ValueError("the energy is negative")
        value = torch.full((1, *ENCODING.matrix), problem.reduced.energy)
        maps = Maps({"pd": value}, value > 0, failure=f"only {value.max():.0f}" if value.max() > 100 else "")
        yield replace(maps, preview=True)
        if problem.reduced.energy == LOST:
            raise RuntimeError("CUDA out of memory")
        progress("solving", 1.0)
        yield maps
        if problem.reduced.energy == LATE:
            raise ValueError("the standard deviations are not finite")


@dataclass(frozen=True)
class Faulty(Solver):
    """Gives what no solver should."""

    name: ClassVar[str] = "faulty"
    sequences: ClassVar[tuple[str, ...]] = ("megre",)
    fault: str = ""

    def solve(self, problem: Problem, progress) -> Iterator[Maps]:
        value = torch.ones(1, *ENCODING.matrix)
        maps = Maps({"t2star": value, "pd": value}, value > 0)
        if self.fault == "nothing" or problem.reduced.energy < 0:
            return
        yield {
            "type": value,
            "empty": replace(maps, values={}),
            "name": replace(maps, values={"T2star": value}),
            "axes": replace(maps, values={"t2star": value[0]}),
            "shape": replace(maps, values={"t2star": value, "pd": value[..., 1:]}),
            "array": replace(maps, values={"t2star": value.numpy()}),
            "complex": replace(maps, values={"t2star": value + 1j}),
            "mask": replace(maps, mask=value),
            "deviation": replace(maps, standard_deviation={"pd": value[:, 1:]}),
            "magnitude": replace(maps, magnitude=value),
            "preview": replace(maps, preview=True),
            "values": replace(maps, values={"t2star": value / 0 - value / 0, "pd": value}),
        }.get(self.fault, maps)
        if self.fault == "key":
            raise KeyError("b0")


def _problem(energy):
    gram, projected = torch.ones(1, 1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1, 1, 1), 10.0)
    basis = Basis(torch.ones(1, 1), torch.ones(1), 1.0, "dictionary")
    return Problem(
        ENCODING, PROTOCOL, ReducedKSpace(gram, projected, torch.ones(1, 1, 1, 1), energy, 1, basis)
    )


@pytest.fixture(autouse=True)
def _solvers(monkeypatch):
    monkeypatch.setattr(reconstruct, "SOLVERS", (*reconstruct.SOLVERS, Numbered, Faulty))


def _context():
    return Context(header=None, encoding=ENCODING, protocol=PROTOCOL, axes={})


def _run(energies, context, **values):
    gadget = Reconstruct.build({"solver": "numbered", "device": "cpu", **values}, "test")
    gadget.prepare(context)
    context.encoding = replace(context.encoding, slices=len(energies))
    return list(gadget((_problem(energy) for energy in energies), context))


def test_previews_come_first_and_maps_are_cropped():
    preview, final = _run([5.0], _context())
    assert preview.preview
    assert not final.preview
    assert final.values["pd"].shape == (1, 2, 4, 4)


def test_a_failed_slice_leaves_the_others():
    context = _context()
    (maps,) = _run([1.0, -1.0, 3.0], context)
    assert maps.values["pd"].shape == (3, 2, 4, 4)
    assert maps.values["pd"][1].isnan().all()
    assert not maps.mask[1].any()
    assert maps.values["pd"][2].eq(3).all()
    assert context.failures == ["slice 1 of 3 was not reconstructed: the energy is negative"]


def test_a_preview_does_not_pass_for_the_maps():
    """The solver fails after it: what was sent stands, the scan fails."""
    stream = Reconstruct.build({"solver": "numbered", "device": "cpu"}, "test")(
        iter([_problem(LOST)]), _context()
    )
    assert next(stream).preview
    with pytest.raises(ScanError, match="'numbered' gave no maps: CUDA out of memory"):
        next(stream)


def test_the_preview_of_a_failed_slice_is_kept_and_said_to_be_one():
    context = _context()
    (maps,) = _run([1.0, LOST, 3.0], context)
    assert not maps.preview
    assert maps.values["pd"][1].eq(LOST).all()
    assert maps.values["pd"][2].eq(3).all()
    assert context.failures == ["slice 1 of 3 holds the maps of its preview: CUDA out of memory"]


def test_a_reason_that_slices_share_is_said_once():
    context = _context()
    (maps,) = _run([-1.0, -1.0, -1.0, 1.0, LOST, -1.0, LOST], context)
    assert maps.values["pd"][3].eq(1).all()
    assert context.failures == [
        "slices 0-2, 5 of 7 were not reconstructed: the energy is negative",
        "slices 4, 6 of 7 hold the maps of their preview: CUDA out of memory",
    ]


def test_a_reason_that_all_slices_share_is_said_once():
    context = _context()
    with pytest.raises(ScanError, match=r"'numbered' gave no maps$"):
        _run([-1.0] * 8, context)
    assert context.failures == ["slices 0-7 of 8 were not reconstructed: the energy is negative"]


def test_what_fails_after_the_maps_keeps_them_and_is_said():
    context = _context()
    *_, maps = _run([LATE], context)
    assert maps.values["pd"].eq(LATE).all()
    said = "failed after its maps were made: the standard deviations are not finite"
    assert context.failures == [f"slice 0 of 1: {said}"]


def test_slices_are_made_one_at_a_time():
    """A slice's problem holds its share of the raw data: it goes before the next one comes."""
    alive, most = weakref.WeakSet(), []

    def problems():
        for energy in (1.0, 2.0, -3.0, 4.0):
            most.append(len(alive))
            # A tensor stands for the data of the slice.
            problem = _problem(energy)
            alive.add(problem.reduced.gram)
            yield problem
            del problem

    context = _context()
    context.encoding = replace(context.encoding, slices=4)
    (maps,) = Reconstruct.build({"solver": "numbered", "device": "cpu"}, "test")(problems(), context)
    assert maps.values["pd"].shape[0] == 4
    assert most == [0, 0, 0, 0]


def test_a_scan_without_signal_is_said_to_be_one():
    context = _context()
    (maps,) = [item for item in _run([0.0], context) if not item.preview]
    assert not maps.mask.any()
    assert "the scan holds no signal" in context.failures[0]


def test_maps_that_say_what_went_wrong_are_delivered_and_it_is_passed_on():
    context = _context()
    (maps,) = _run([1.0, 101.0, 102.0], context)
    assert maps.failure == "only 101"
    assert maps.values["pd"][2].eq(102).all()
    assert context.failures == ["only 101"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("nothing", "ended without yielding final maps"),
        ("preview", "ended without yielding final maps"),
        ("type", "yielded Tensor, not Maps"),
        ("empty", "yielded Maps that hold no map"),
        ("name", "yielded a map 'T2star'; maps are t1, t2, t2star"),
        (
            "axes",
            r"map t2star of the solver has shape \(2, 6, 4\), where \(s, z, y, x\) must be \(1, 2, 6, 4\)",
        ),
        ("shape", r"map pd of the solver has shape \(1, 2, 6, 3\)"),
        ("array", "map t2star of the solver is ndarray, where it must be a tensor"),
        ("complex", "map t2star of the solver is complex"),
        ("mask", "the mask of the solver is of type torch.float32, where it must be bool"),
        ("deviation", "map pd of the standard deviation of the solver has shape"),
        ("magnitude", "an echo of the magnitude of the solver has shape"),
    ],
)
def test_what_is_no_maps_does_not_pass_for_them(fault, sentence):
    with pytest.raises(ScanError, match=f"^solver 'faulty' gave no maps: .*{sentence}"):
        _run([1.0], _context(), solver="faulty", fault=fault)


def test_a_slice_without_maps_is_said_to_have_none():
    context = _context()
    _run([1.0, -1.0], context, solver="faulty")
    assert context.failures == [
        "slice 1 of 2 was not reconstructed: the solver ended without yielding final maps"
    ]


def test_a_mistake_in_one_slice_leaves_the_others():
    """Of whatever kind it is, which the sentence says where the words alone would not."""
    context = _context()
    (maps,) = _run([1.0, 1.0], context, solver="faulty", fault="key")
    assert maps.values["pd"].eq(1).all()
    assert context.failures == ["slices 0-1 of 2: failed after their maps were made: KeyError: 'b0'"]


def test_a_map_without_any_value_is_a_failure():
    context = _context()
    _run([1.0], context, solver="faulty", fault="values")
    assert context.failures == ["solver 'faulty' gave no value of t2star in any voxel"]


@pytest.mark.parametrize(
    ("name", "own", "sentence"),
    [
        ("subspace", "weight", "Subspace and Mine are both called 'subspace' and do both megre"),
        ("mine", "seed", "solver 'mine' has a setting 'seed', which is the gadget's own name"),
    ],
)
def test_names_that_collide_are_refused(monkeypatch, name, own, sentence):
    """Else the other's maps come, or the setting stays as it is, and nobody is told."""
    mine = make_dataclass(
        "Mine",
        [(own, int, 3)],
        bases=(Solver,),
        namespace={"name": name, "sequences": ("megre",)},
        frozen=True,
    )
    monkeypatch.setattr(reconstruct, "SOLVERS", (*reconstruct.SOLVERS, mine))
    with pytest.raises(ScanError, match=sentence):
        Reconstruct.build({"solver": name}, "here", "megre")


class Bare(Solver):
    """What a developer of methods begins with."""

    sequences = ("megre",)


class NoSettings(Bare):
    """Fields without the decorator that makes them settings."""

    name = "mine"
    steps: int = 3


@dataclass(frozen=True)
class OfNothing(Solver):
    """For no sequence."""

    name: ClassVar[str] = "mine"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Bare, r"the solver class test_reconstruct\.Bare has no name; give it one: name: ClassVar\[str\] ="),
        (NoSettings, r"test_reconstruct\.NoSettings is no dataclass, so that its fields are no settings"),
        (OfNothing, r"test_reconstruct\.OfNothing lists no sequences that it reconstructs"),
    ],
)
@pytest.mark.parametrize("wanted", ["subspace", "mine"])
def test_a_solver_that_is_not_complete_is_named_when_solvers_are_looked_up(
    monkeypatch, kind, sentence, wanted
):
    monkeypatch.setattr(reconstruct, "SOLVERS", (*reconstruct.SOLVERS, kind))
    with pytest.raises(ScanError, match=sentence):
        Reconstruct.build({"solver": wanted}, "here", "megre")
    with pytest.raises(ScanError, match=sentence):
        Reconstruct.sequences_of({"solver": wanted})


def test_nothing_reconstructed_is_an_error():
    with pytest.raises(ScanError, match="gave no maps: the energy is negative"):
        _run([-1.0], _context())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"solver": "magic"}, "no solver 'magic'; there are subspace"),
        ({"linear_iteration": "3"}, "unknown property 'linear_iteration'; did you mean 'linear_iterations'"),
        ({"linear_iterations": "many"}, "property 'linear_iterations' is 'many'"),
        ({"linear_iterations": "-1"}, "property 'linear_iterations' is"),
        ({"solver": "subspace", "t1_range": "2, 1"}, "t1_range runs from 2 to 1 s"),
        ({"solver": "subspace", "t1_range": "2"}, "property 't1_range' is '2', but must be 2 values"),
        ({"device": "tpu"}, "device 'tpu' is none of"),
        ({"rank": "3"}, "reconstruct.rank 3 is above the 2 frames"),
    ],
)
def test_wrong_settings_are_one_sentence(values, sentence):
    with pytest.raises(ScanError, match=sentence):
        Reconstruct.build(values, "here").prepare(_context())


def test_a_sequence_that_the_solver_cannot_do_is_named():
    context = replace(_context(), protocol=replace(PROTOCOL, sequence="vfa_gre"))
    with pytest.raises(ScanError, match="'numbered' does not reconstruct vfa_gre; it does megre"):
        Reconstruct.build({"solver": "numbered"}, "here").prepare(context)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA GPU is available"):
        choose_device("cuda")
    for unsaid in ("", "auto"):
        monkeypatch.setenv(ENVIRONMENT, unsaid)
        assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setenv(ENVIRONMENT, "cuda:1")
    with pytest.raises(ValueError, match="QUANTITRON_DEVICE=cuda:1 was asked for"):
        choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="there are 1 GPUs"):
        choose_device("auto")
    assert choose_device("cuda:0") == torch.device("cuda", 0)


def test_progress_says_what_is_left_of_the_whole(monkeypatch, caplog):
    """No more than once a second, and nothing of the time before a tenth is done."""
    now = [0.0]
    monkeypatch.setattr(reconstruct.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO", logger="quantitron")
    progress = reconstruct._progress_of(1, 3)
    for seconds, share in ((5.0, 0.05), (30.0, 0.25), (30.5, 0.3), (99.0, 0.99), (99.5, 1.0)):
        now[0] = seconds
        progress("steps", share)
    assert [record.getMessage() for record in caplog.records] == [
        "slice 2/3:   5 % steps (5.0 s)",
        "slice 2/3:  25 % steps (30.0 s, about 1 min 30 s left)",
        "slice 2/3:  99 % steps (99.0 s, about 1 s left)",
        "slice 2/3: 100 % steps (99.5 s)",
    ]
