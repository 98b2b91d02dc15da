from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from quantitron.gadgets import settings
from quantitron.gadgets.errors import ScanError
from quantitron.recon.solvers import SOLVERS


@dataclass(frozen=True)
class Solver:
    rank: int | float = field(default=0.999, metadata={"above": 0})
    iterations: int = field(default=20, metadata={"minimum": 1, "maximum": 100})
    tolerance: float = field(default=1e-4, metadata={"minimum": 0.0, "below": 1.0})
    refine: bool = True
    mode: Literal["fast", "exact"] = "fast"
    echoes: tuple[float, ...] = field(default=(), metadata={"above": 0})
    crop: tuple[int, int] | None = None
    device: str = field(default="cpu", metadata={"choices": ("cpu", "cuda")})

    def __post_init__(self) -> None:
        if self.mode == "exact" and not self.refine:
            raise ValueError("mode 'exact' needs refine")


def build(**values: object) -> Solver:
    return settings.build(Solver, values, "file.yaml, solver")


def test_strings_of_xml_become_the_types_of_the_fields():
    built = build(
        rank="15",
        iterations=" 7 ",
        tolerance="1e-3",
        refine="False",
        mode="fast",
        echoes="1, 2.5 3",
        crop="4,5",
    )
    assert built == Solver(15, 7, 1e-3, False, "fast", (1.0, 2.5, 3.0), (4, 5))
    assert isinstance(built.rank, int)
    assert build(rank="0.99").rank == 0.99
    assert build(crop="none").crop is None


def test_values_of_yaml_are_taken_as_they_are():
    assert build(rank=12, refine=False, echoes=[1, 2], crop=[3, 4]) == Solver(
        rank=12, refine=False, echoes=(1.0, 2.0), crop=(3, 4)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iteratons": 3}, ["unknown property 'iteratons'", "did you mean 'iterations'?"]),
        ({"xyz": 3}, ["unknown property 'xyz'", "allowed: crop, device"]),
        ({"iterations": "many"}, ["'iterations'", "'many'", "a whole number"]),
        ({"iterations": 2.5}, ["'iterations'", "a whole number"]),
        ({"iterations": True}, ["'iterations'", "a whole number"]),
        ({"iterations": 0}, ["'iterations' is 0", "at least 1"]),
        ({"iterations": 101}, ["at most 100"]),
        ({"tolerance": "nan"}, ["'tolerance'", "a number"]),
        ({"tolerance": "inf"}, ["'tolerance'", "a finite number"]),
        ({"tolerance": 1.0}, ["below 1.0"]),
        ({"rank": -2}, ["above 0"]),
        ({"rank": "big"}, ["a whole number or a number"]),
        ({"refine": "perhaps"}, ["true or false"]),
        ({"mode": "exat"}, ["one of fast, exact", "nearest: exact"]),
        ({"device": "cua"}, ["one of cpu, cuda", "nearest: cuda"]),
        ({"echoes": "1, -2"}, ["'echoes'", "above 0"]),
        ({"crop": "1,2,3"}, ["2 values"]),
        ({"mode": "exact", "refine": "no"}, ["mode 'exact' needs refine"]),
    ],
)
def test_wrong_settings_name_place_key_and_what_is_allowed(values, words):
    with pytest.raises(ScanError) as caught:
        build(**values)
    sentence = str(caught.value)
    assert sentence.startswith("file.yaml, solver: ")
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_hash_changes_with_any_setting_and_with_nothing_else():
    one = settings.settings_hash({"solver": settings.resolved(build())})
    assert one == settings.settings_hash({"solver": settings.resolved(build(rank=0.999))})
    assert one != settings.settings_hash({"solver": settings.resolved(build(rank=0.998))})
    assert len(one) == 16
    assert one == settings.settings_hash({"solver": dict(reversed(settings.resolved(build()).items()))})


def test_resolved_refuses_what_has_no_settings():
    with pytest.raises(TypeError, match="not a dataclass"):
        settings.resolved(3)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda kind: f"{kind.name}-{kind.sequences[0]}")
def test_the_mask_threshold_is_a_share(solver):
    """5 means 5 %, but would leave no voxel after all the work."""
    assert settings.build(solver, {"mask_threshold": "0.05"}, "file.yaml") == solver()
    for percent in (1, 5):
        with pytest.raises(ScanError, match=f"'mask_threshold' is {percent}, but must be below 1"):
            settings.build(solver, {"mask_threshold": percent}, "file.yaml")
