"""Patches of an image that look alike, found once and reused on every map of the same anatomy.

Around each reference patch of an (x, y) plane the patches at the least Euclidean distance are searched for
(Buades 2005; Dabov 2007). Reference and matches together are a stack; it is held as indices of voxels, so
that gathering a stack is one look-up and its adjoint one segmented sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Matches:
    """Stacks of similar patches, as places in images (x, z, y) of one shape."""

    shape: tuple[int, int, int]
    """(x, z, y) of the images."""
    voxel: Tensor
    """(member, voxel of the patch, stack) int32: flat index into the image; member 0 is the reference."""
    order: Tensor
    """(member * voxel * stack,) int32: entries of the flat ``voxel`` sorted by the voxel they point at."""
    start: Tensor
    """(x * z * y,) int32: where the entries of each voxel start in ``order``."""
    count: Tensor
    """(x * z * y,) int32: how many entries point at each voxel; 0 where no patch lies."""

    @property
    def stacks(self) -> int:
        """Number of stacks."""
        return int(self.voxel.shape[2])

    @property
    def members(self) -> int:
        """Patches in a stack, the reference included."""
        return int(self.voxel.shape[0])

    @property
    def patch_voxels(self) -> int:
        """Voxels of a patch."""
        return int(self.voxel.shape[1])

    def gather(self, columns: Tensor, part: slice) -> Tensor:
        """Stacks of images.

        Args:
            columns: (x * z * y, n), one image a column.
            part: which stacks.

        Returns:
            (member, voxel, stack * n).
        """
        return functional.embedding(self.voxel[:, :, part], columns).flatten(2)

    def scatter(self, entries: Tensor) -> Tensor:
        """Adjoint of ``gather`` over all stacks: every voxel gets the sum of the entries that point at it.

        Args:
            entries: (member * voxel * stack, n).

        Returns:
            (x * z * y, n).
        """
        # A segmented sum in a fixed order: 2 to 3 times faster than index_add, and the same on every run.
        return functional.embedding_bag(self.order, entries, self.start, mode="sum")


def check_planes(
    nx: int, ny: int, patch: int = 5, window: int = 7, similar: int = 3, stride: int = 1
) -> None:
    """Refuse settings of ``match_blocks`` that are none, or do not fit planes of nx x ny voxels.

    Raises:
        ValueError: if a setting is out of range, the planes are smaller than a patch or have too few
            positions for the stack.
    """
    if patch < 1 or stride < 1 or similar < 2 or window < 1 or window % 2 == 0:
        raise ValueError(
            "block matching needs patch >= 1, stride >= 1, similar >= 2 and an odd window, not "
            f"patch {patch}, stride {stride}, similar {similar}, window {window}"
        )
    if min(nx, ny) < patch:
        raise ValueError(f"planes of {nx} x {ny} voxels are smaller than a patch of {patch} x {patch}")
    reach = window // 2
    # A reference patch in a corner has the fewest neighbours.
    positions = (min(nx - patch, reach) + 1) * (min(ny - patch, reach) + 1)
    if positions < similar:
        raise ValueError(
            f"planes of {nx} x {ny} voxels hold {positions} patches of {patch} x {patch} within a window of "
            f"{window}, fewer than the {similar} of a stack"
        )


def match_blocks(
    image: Tensor,
    patch: int = 5,
    window: int = 7,
    similar: int = 3,
    stride: int = 1,
    mask: Tensor | None = None,
) -> Matches:
    """Find the patches most similar to each reference patch, within (x, y) planes and inside the image.

    Among patches at equal distance the nearer one wins, so that the result is the same everywhere.

    Args:
        image: (x, z, y) real.
        patch: edge of a patch [voxels].
        window: edge [voxels], odd, of the square of positions searched about the reference, which is its
            centre: patches are shifted by at most ``window // 2`` voxels along x and y.
        similar: patches in a stack, the reference included.
        stride: voxels from one reference patch to the next; the last position is always among them.
        mask: (x, z, y) bool; only reference patches that touch it are kept. None for all.

    Raises:
        ValueError: if a setting is out of range, the planes are smaller than a patch or have too few
            positions for the stack, no reference patch touches the mask, or the image is not finite.
    """
    nx, nz, ny = image.shape
    check_planes(nx, ny, patch, window, similar, stride)
    reach = window // 2
    if image.is_complex() or not bool(torch.isfinite(image).all()):
        raise ValueError("the image for block matching must be real and finite")
    device = image.device
    rows, columns = _grid(nx, patch, stride, device), _grid(ny, patch, stride, device)
    place = _nearest(image, rows, columns, patch, reach, similar - 1)  # (member, row, z, column)
    x, z, y = torch.meshgrid(rows, torch.arange(nz, device=device), columns, indexing="ij")
    reference = ((x * nz + z) * ny + y)[None]  # flat index of the first voxel of each reference patch
    corner = torch.cat([reference, reference + place]).flatten(1)  # (member, stack)
    if mask is not None:
        corner = corner[:, _touches(mask, rows, columns, patch)]
        if corner.shape[1] == 0:
            raise ValueError("no patch touches the mask")
    within = torch.arange(patch, device=device)
    offset = (within[:, None] * nz * ny + within).flatten()  # (voxel,)
    voxel = (corner[:, None] + offset[:, None]).int()  # (member, voxel, stack)
    count = torch.bincount(voxel.flatten(), minlength=image.numel())
    return Matches(
        shape=(nx, nz, ny),
        voxel=voxel,
        order=torch.argsort(voxel.flatten(), stable=True).int(),
        start=(count.cumsum(0) - count).int(),
        count=count.int(),
    )


def _grid(length: int, patch: int, stride: int, device: torch.device) -> Tensor:
    """First voxels of the reference patches along one axis, the last possible one included."""
    last = length - patch
    places = [*range(0, last, stride), last]
    return torch.tensor(places, device=device)


def _box(image: Tensor, rows: Tensor, columns: Tensor, patch: int) -> Tensor:
    """Sums over patches: (x, z, y) -> (row, z, column)."""
    along_x = sum((image[rows + i] for i in range(1, patch)), start=image[rows])
    return sum((along_x[..., columns + i] for i in range(1, patch)), start=along_x[..., columns])


def _touches(mask: Tensor, rows: Tensor, columns: Tensor, patch: int) -> Tensor:
    """(row * z * column,) bool: which reference patches hold a voxel of the mask."""
    return (_box(mask.to(torch.int32), rows, columns, patch) > 0).flatten()


def _nearest(image: Tensor, rows: Tensor, columns: Tensor, patch: int, reach: int, wanted: int) -> Tensor:
    """Flat displacements of the most similar patches, best first: (wanted, row, z, column)."""
    nx, nz, ny = image.shape
    # Outside lies infinity, and so every patch that leaves the image is infinitely far.
    padded = functional.pad(image, (reach, reach, 0, 0, reach, reach), value=torch.inf)
    span = range(-reach, reach + 1)
    shifts = sorted(
        ((dx, dy) for dx in span for dy in span if (dx, dy) != (0, 0)), key=lambda d: d[0] ** 2 + d[1] ** 2
    )
    shape = (wanted, len(rows), nz, len(columns))
    distance = image.new_full(shape, torch.inf)
    place = torch.zeros(shape, dtype=torch.int64, device=image.device)
    for dx, dy in shifts:
        moved = padded[reach + dx : reach + dx + nx, :, reach + dy : reach + dy + ny]
        candidate = _box((moved - image).square(), rows, columns, patch)
        shift = torch.full_like(place[0], dx * nz * ny + dy)
        for slot in range(wanted):  # insertion: what is displaced is tried on the next slot
            better = candidate < distance[slot]
            distance[slot], candidate = (
                torch.where(better, candidate, distance[slot]),
                torch.where(better, distance[slot], candidate),
            )
            place[slot], shift = (
                torch.where(better, shift, place[slot]),
                torch.where(better, place[slot], shift),
            )
    return place
