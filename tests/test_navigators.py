"""Navigator lines: anything goes where nothing uses them; those that the basis comes from must fit."""

from __future__ import annotations

import ismrmrd
import numpy as np
import pytest
import torch
from line_factory import block, context, encoding, full_scan, megre, noise, numbered, vfa
from readout_factory import context as fingerprint_context
from readout_factory import readouts, whole_scan

from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.acquisition_block import AcquisitionBlock
from quantitron.gadgets.basis import BasisGadget
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.prepare import CompressCoils, NoiseAdjust, RemoveOversampling

NAVIGATOR = ismrmrd.ACQ_IS_NAVIGATION_DATA
NOISE = ismrmrd.ACQ_IS_NOISE_MEASUREMENT
COUNTED = "3 navigator lines were left out: nothing in this reconstruction uses them"


def gathered(blocks, scan, basis=None):
    """The scan after every gadget up to ``accumulate``."""
    if basis is not None:
        basis.prepare(scan)
    for gadget in (NoiseAdjust(), RemoveOversampling(), CompressCoils(coils=2), Accumulate()):
        blocks = gadget(blocks, scan)
    (result,) = blocks
    return result


def among(lines: AcquisitionBlock, navigators: AcquisitionBlock) -> list[AcquisitionBlock]:
    """Noise, then each navigator before some lines of the scan."""
    scan_noise = block(noise((8, 2, 32), 7), [NOISE])
    parts = [scan_noise]
    for number, some in enumerate(np.array_split(np.arange(len(lines)), len(navigators))):
        alone = np.arange(len(navigators)) == number
        parts += [navigators.where(alone), lines.where(np.isin(np.arange(len(lines)), some))]
    return list(numbered(*parts))


@pytest.mark.parametrize(
    "samples", [noise((3, 2, 512)), noise((3, 1, 32)), np.full((3, 2, 32), np.nan), noise((3, 2, 4))]
)
def test_navigators_that_nothing_uses_may_be_anything(samples):
    lines = full_scan(vfa(), encoding(), 32)
    navigators = block(samples, [NAVIGATOR], kspace_encode_step_1=999, set=77)
    with_them, without = context(vfa(), encoding()), context(vfa(), encoding())
    result = gathered(among(lines, navigators), with_them, BasisGadget())
    expected = gathered(numbered(block(noise((8, 2, 32), 7), [NOISE]), lines), without, BasisGadget())
    assert torch.equal(result.reduced.projected, expected.reduced.projected)
    assert result.navigator is None
    assert with_them.notes == [COUNTED]
    assert without.notes == []


def test_readouts_on_a_trajectory_have_no_use_for_navigators():
    navigators = readouts(np.zeros((3, 64, 0)), coils=1, flags=[NAVIGATOR], repetition=77)
    scan = fingerprint_context()
    result = gathered(among(whole_scan(), navigators), scan, BasisGadget())
    assert len(result.kspace.time_point) == 6
    # Six time points hardly tell T2, which is noted, too.
    assert [note for note in scan.notes if "hardly tells" not in note] == [COUNTED]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (noise((3, 2, 512)), "acquisition 8 has 512 samples"),
        (noise((3, 1, 32)), "acquisition 8 has 1 channels, the noise scan has 2"),
        (np.full((3, 2, 32), np.nan), "acquisition 8 has samples that are not finite numbers"),
    ],
)
def test_navigators_that_the_basis_comes_from_must_fit(samples, words):
    blocks = among(full_scan(megre(), encoding(), 32), block(samples, [NAVIGATOR]))
    with pytest.raises(ScanError, match=words):
        gathered(blocks, context(megre(), encoding()), BasisGadget(source="navigator"))
