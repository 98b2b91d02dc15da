"""A raw file as a ``Problem``: what a solver is given in a pipeline, for measuring solvers one by one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.gadget import Gadget
from quantitron.gadgets.header import make_context, parse_header
from quantitron.gadgets.prepare import NoiseAdjust, RemoveOversampling
from quantitron.host.raw_file import read_blocks, read_header
from quantitron.recon.data import Problem


def load(path: str | os.PathLike[str], keep_lines: bool = True, rank: int | float = 0.99999) -> Problem:
    """Run the gadgets before ``reconstruct`` over a raw file.

    Args:
        path: ISMRMRD file of one slice or slab.
        keep_lines: whether ``Problem.kspace`` holds the sampled lines beside their reduced form.
        rank: of the contrast basis, columns or energy, as the gadget ``basis`` takes it.

    Raises:
        ScanError: if the file cannot be read or processed.
        ValueError: if the scan has more than one slice.
    """
    context = make_context(parse_header(read_header(path)))
    context.needs_lines = keep_lines
    chain: tuple[Gadget, ...] = (NoiseAdjust(), RemoveOversampling(), Accumulate(), BasisGadget(rank=rank))
    for gadget in chain:
        gadget.prepare(context)
    items: Iterable[Any] = read_blocks(path)
    for gadget in chain:
        items = gadget(items, context)
    problems: list[Problem] = list(items)
    if len(problems) != 1:
        raise ValueError(f"{os.fspath(path)} holds {len(problems)} slices; the benchmarks take one")
    return problems[0]
