"""The unit of a trajectory, and trajectories that cannot be in any that is allowed."""

from __future__ import annotations

import ismrmrd
import numpy as np
import pytest
from line_factory import numbered
from readout_factory import context, images, readouts, spirals, whole_scan

from quantitron.gadgets.accumulate import Accumulate
from quantitron.gadgets.errors import ScanError

CALIBRATION = ismrmrd.ACQ_IS_PARALLEL_CALIBRATION


def accumulate(blocks, scan):
    (result,) = Accumulate()(blocks, scan)
    return result


@pytest.mark.parametrize("matrix", [(1, 16, 24), (6, 16, 24)])
def test_cycles_per_field_of_view_are_divided_by_the_matrix_and_said_once(matrix):
    columns = 2 if matrix[0] == 1 else 3
    lines = whole_scan(columns=columns)
    in_voxels = lines.trajectory.copy()
    lines.trajectory[:] = in_voxels * np.array(matrix[::-1][:columns])
    scan = context(grid=images(matrix))
    kspace = accumulate(numbered(lines), scan).kspace
    np.testing.assert_allclose(kspace.trajectory.numpy(), in_voxels.reshape(-1, columns), rtol=2e-7)
    said = [note for note in scan.notes if "cycles per field of view" in note]
    assert len(said) == 1


def test_the_unit_is_that_of_the_whole_scan():
    """Early readouts near the centre do not decide it, nor do the calibration readouts."""
    lines = whole_scan(points=6)
    lines.trajectory[:] *= 16
    lines.trajectory[:2] *= 0.02
    separate = readouts(0.3 * spirals(2), flags=[CALIBRATION])
    scan = context()
    expected = lines.trajectory / 16
    result = accumulate(numbered(separate, lines), scan)
    np.testing.assert_allclose(result.kspace.trajectory.numpy(), expected.reshape(-1, 2), rtol=2e-7)
    np.testing.assert_allclose(
        result.calibration.trajectory.numpy(), separate.trajectory.reshape(-1, 2) / 16, rtol=2e-7
    )
    assert sum("cycles per field of view" in note for note in scan.notes) == 1


def test_rounding_beyond_the_edge_is_allowed():
    lines = whole_scan()
    lines.trajectory[2, 5] = (0.5005, -0.5005)
    scan = context()
    kspace = accumulate(numbered(lines), scan).kspace
    assert float(kspace.trajectory.max()) == np.float32(0.5005)
    assert scan.notes == []


def test_beyond_k_space_is_an_error_that_names_the_acquisition():
    lines = whole_scan()
    lines.trajectory[4, 7, 1] = -8.2
    with pytest.raises(
        ScanError, match=r"acquisition 4 reaches ky = 8\.2, beyond 0\.5 cycles per voxel and beyond 8 cycles"
    ):
        accumulate(numbered(lines), context())


@pytest.mark.parametrize("factor", [3.0, 15.0])
def test_one_readout_beyond_the_edge_does_not_decide_the_unit_of_all(factor):
    lines = whole_scan(points=6)
    lines.trajectory[4] *= factor
    expected = (
        r"acquisition 4 reaches k. = [\d.]+, beyond 0\.5 cycles per voxel, but 5 of the scan's 6 readouts"
    )
    with pytest.raises(ScanError, match=expected):
        accumulate(numbered(lines), context())


def test_a_little_beyond_the_edge_is_neither_unit():
    lines = whole_scan()
    lines.trajectory[:] *= 1.3
    with pytest.raises(ScanError, match=r"reaches k. = 0\.6.*too little for cycles per field of view"):
        accumulate(numbered(lines), context())


def test_the_sentence_does_not_name_one_direction_against_itself():
    lines = whole_scan()
    lines.trajectory[..., 0] = 0.7 * np.sign(lines.trajectory[..., 0])
    expected = "kx = 0.7, beyond 0.5 cycles per voxel, but that is too little for cycles per field of view"
    with pytest.raises(ScanError, match=expected):
        accumulate(numbered(lines), context())


@pytest.mark.parametrize("factor", [0, 0.1, 1e-3])
@pytest.mark.parametrize("column", [0, 1])
def test_a_trajectory_without_extent_is_an_error(column, factor):
    lines = whole_scan()
    lines.trajectory[..., column] *= factor
    name = "xy"[column]
    with pytest.raises(ScanError, match=f"k{name} of all readouts stays within .* along {name}"):
        accumulate(numbered(lines), context())


def test_a_direction_that_stays_zero_in_cycles_per_field_of_view_is_an_error_too():
    lines = whole_scan()
    lines.trajectory[..., 0] *= 16
    lines.trajectory[..., 1] = 0
    with pytest.raises(ScanError, match="ky of all readouts stays within 0 cycles per field of view"):
        accumulate(numbered(lines), context())


@pytest.mark.parametrize(
    ("unit", "matrix", "words"),
    [
        (2 * np.pi, 32, r"reaches 3\.01\d and 3\.01\d cycles .* asks for 16 and 16"),  # radians per voxel
        (1 / 7, 32, r"reaches 2\.19\d and 2\.19\d cycles"),  # cycles per mm, voxels of 7 mm
        (2 * np.pi / 0.9, 256, r"asks for 128 and 128"),  # radians per mm, voxels of 0.9 mm
        (10 / 0.9, 256, r"asks for 128 and 128"),  # cycles per cm
    ],
)
def test_a_reach_far_from_the_edge_of_k_space_is_of_another_unit(unit, matrix, words):
    lines = whole_scan()
    lines.trajectory[:] *= unit
    with pytest.raises(ScanError, match=words):
        accumulate(numbered(lines), context(grid=images((1, matrix, matrix))))


@pytest.mark.parametrize("per_voxel", [True, False])
@pytest.mark.parametrize(("along_x", "along_y"), [(0.5, 0.5), (1, 0.25), (0.25, 1), (0.36, 0.36)])
def test_images_finer_than_the_scan_are_allowed_within_reason(along_x, along_y, per_voxel):
    """Twice the resolution is a common interpolation; one direction may be coarser than the other."""
    lines = whole_scan()
    lines.trajectory[:] *= np.array([along_x, along_y]) * (1 if per_voxel else 32)
    kspace = accumulate(numbered(lines), context(grid=images((1, 32, 32)))).kspace
    assert float(kspace.trajectory.abs().max()) == pytest.approx(0.48 * max(along_x, along_y), rel=0.02)


def test_columns_of_different_units_are_an_error():
    lines = whole_scan(columns=3)
    lines.trajectory[..., 2] *= 6
    with pytest.raises(ScanError, match=r"reaches kz = 2\.88, beyond 0\.5 .* too little for cycles"):
        accumulate(numbered(lines), context(grid=images((6, 16, 16))))
