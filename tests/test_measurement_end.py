"""Lines flagged as the last of the measurement: what comes after them, and what then is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from line_factory import LAST, context, encoding, full_scan, hybrid, joined, megre, numbered, recut, t2ir, vfa
from readout_factory import context as fingerprint_context
from readout_factory import readouts, spirals, whole_scan

from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.errors import ScanError

IS_LAST = np.uint64(1 << (LAST - 1))
NX = 16


def accumulate(blocks, scan):
    (result,) = Accumulate()(map(hybrid, blocks), scan)
    return result


def scans_in_one_file(protocol) -> AcquisitionBlock:
    """Scans of one value of ``set`` each, one after another, each with a last line of its own."""
    lines = full_scan(protocol, encoding(), NX)
    values = lines.head["idx"]["set"]
    lines.head["flags"][np.flatnonzero(np.diff(values))] |= IS_LAST
    return lines


def test_scans_put_together_in_one_file_are_all_used():
    lines = scans_in_one_file(vfa())
    scan = context(vfa(), encoding())
    kspace = accumulate(numbered(lines), scan).kspace
    np.testing.assert_array_equal(
        kspace.samples.numpy(), accumulate(numbered(lines), context(vfa(), encoding())).kspace.samples
    )
    assert len(kspace.count) == len(lines) == 48
    assert scan.notes == [
        "32 imaging lines came after one flagged as the last of the measurement, when frames were still "
        "missing, and used as well; 48 of the 48 lines that the encoding limits span came"
    ]


@pytest.mark.parametrize("length", [1, 7, 48])
def test_the_cut_into_blocks_changes_nothing(length):
    lines = scans_in_one_file(vfa())
    scan, whole = context(vfa(), encoding()), context(vfa(), encoding())
    one, other = accumulate(recut(lines, length), scan), accumulate(numbered(lines), whole)
    assert torch.equal(one.kspace.samples, other.kspace.samples)
    assert scan.notes == whole.notes


def test_every_echo_of_the_last_excitation_may_be_flagged():
    lines = full_scan(megre(4), encoding(), NX)
    lines.head["flags"] = 0
    order = np.lexsort((lines.head["idx"]["contrast"], lines.head["idx"]["kspace_encode_step_1"]))
    by_excitation = AcquisitionBlock(lines.head[order], lines.data[order], lines.trajectory[order])
    by_excitation.head["flags"][-4:] = IS_LAST
    scan = context(megre(4), encoding())
    assert len(accumulate(numbered(by_excitation), scan).kspace.count) == len(lines)
    assert scan.notes == []


def test_a_file_of_scans_that_ends_within_one_says_what_came():
    lines = scans_in_one_file(vfa()).where(np.arange(48) < 40)
    scan = context(vfa(), encoding())
    accumulate(numbered(lines), scan)
    assert "40 of the 48 lines that the encoding limits span came" in scan.notes[0]


@pytest.mark.parametrize("protocol", [vfa(), t2ir()])
def test_a_single_value_of_a_contrast_is_too_few(protocol):
    lines = scans_in_one_file(protocol)
    first = lines.where(lines.head["idx"]["set"] == 0)
    first.head["flags"][-1] |= IS_LAST
    with pytest.raises(ScanError, match="all lines have set = 0, one of 3 values, which is too few to fit"):
        accumulate(numbered(first), context(protocol, encoding()))


def test_two_flip_angles_of_three_are_enough():
    lines = scans_in_one_file(vfa())
    two = lines.where(lines.head["idx"]["set"] < 2)
    scan = context(vfa(), encoding())
    accumulate(numbered(two), scan)
    assert scan.notes[1:] == ["no line has set = 2 (1 of 3 values never came)"]


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_what_follows_a_complete_scan_is_read_but_not_used(length):
    lines = full_scan(megre(), encoding(), NX)
    more = full_scan(megre(), encoding(), NX, 4)
    more.data[2] = np.nan
    scan = context(megre(), encoding())
    kspace = accumulate(recut(joined(lines, more), length), scan).kspace
    np.testing.assert_array_equal(
        kspace.samples.numpy(), accumulate(numbered(lines), context(megre(), encoding())).kspace.samples
    )
    assert scan.notes == [f"{len(more)} imaging lines came after the end of the measurement, left out"]


def test_readouts_after_a_complete_fingerprint_are_not_used():
    lines, after = whole_scan(), readouts(spirals(3), repetition=[1, 2, 3])
    after.data[:] = np.nan
    scan = fingerprint_context()
    (result,) = Accumulate()(numbered(lines, after), scan)
    assert result.kspace.time_point.tolist() == [*range(6)]
    assert scan.notes == ["3 imaging lines came after the end of the measurement, left out"]
