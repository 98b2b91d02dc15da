"""The encoded space of 2D slices that a header counts along z."""

from __future__ import annotations

from dataclasses import replace

import ismrmrd.xsd as xsd

THINNEST = 1.0
"""mm; thinner than 2D slices are excited."""


def one_slice(
    spaces: dict[str, xsd.encodingSpaceType],
    partitions: xsd.limitType | None,
    slices: int,
    notes: list[str],
) -> dict[str, xsd.encodingSpaceType]:
    """The spaces of one slice, where a converter gave those of all: points along z, and none of them encoded.

    That is so where several slices are counted and ``kspace_encode_step_2`` cannot go beyond 0: a slab has
    partitions to encode. (A line that has one all the same is refused when it comes.)

    Args:
        spaces: ``encodedSpace`` and ``reconSpace`` of a Cartesian scan.
        partitions: limits of ``kspace_encode_step_2``; None where the header does not say.
        slices: values of the slice counter.
        notes: a sentence is added here where something was changed.
    """
    points = spaces["encodedSpace"].matrixSize.z
    if points == 1 or slices == 1 or partitions is None or partitions.maximum > 0:
        return spaces
    # The field of view is that of all slices or of one; the delivered space is nearer to the images.
    space = spaces["reconSpace"]
    thickness = space.fieldOfView_mm.z / space.matrixSize.z
    if thickness < THINNEST:
        thickness = space.fieldOfView_mm.z
    notes.append(
        f"the header's matrix has {points} points along z, but kspace_encode_step_2 does not go beyond 0 and "
        f"{slices} slices are counted: taken as 2D slices of {thickness:g} mm"
    )
    return {
        where: replace(
            space,
            matrixSize=replace(space.matrixSize, z=1),
            fieldOfView_mm=replace(space.fieldOfView_mm, z=thickness),
        )
        for where, space in spaces.items()
    }
