"""Where the visible mask units of a batch lie, and which voxels their convolutions read."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_ZERO_ROWS = 4096


class VisibleUnits:
    """Where the visible mask units of a batch lie, shared by all stages.

    All shapes are static once ``num_visible`` is known, as ``torch.compile`` and CUDA graphs want them.

    Args:
        visible: BoolTensor (B, 1, *grid), True = kept.
        num_visible: visible units V of each sample; None: counted, which waits for the device.

    Raises:
        ValueError: the samples do not have equally many visible units, or none (checked where V is counted).
    """

    def __init__(self, visible: Tensor, num_visible: int | None = None) -> None:
        flat = visible.flatten(1)
        if num_visible is None:
            counts = flat.sum(1).tolist()
            if len(set(counts)) != 1 or counts[0] == 0:
                raise ValueError(
                    f"every sample of a batch must have the same number of visible units, at least one; got {counts}"
                )
            num_visible = int(counts[0])
        self.grid = tuple(visible.shape[2:])
        self.batch_size, self.num_visible = len(visible), num_visible
        # stable and descending: visible units first, in row-major order
        self.index = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_visible]  # (B, V)
        self._neighbours = self.neighbours()
        self._halo_indices: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    @property
    def num_blocks(self) -> int:
        """B * V."""
        return self.batch_size * self.num_visible

    def neighbours(self) -> Tensor:
        """For each block the block number of its 3^d neighbourhood, itself included, row-major.

        Returns:
            LongTensor (B * V, 3^d); hidden or outside: B * V.
        """
        blocks = torch.arange(self.num_blocks, device=self.index.device)
        slots = torch.full((self.batch_size, prod(self.grid)), self.num_blocks, device=blocks.device)
        slots = slots.scatter(1, self.index, blocks.view_as(self.index)).view(self.batch_size, *self.grid)
        slots = F.pad(slots, [1, 1] * len(self.grid), value=self.num_blocks)
        for axis in range(len(self.grid)):
            slots = slots.unfold(axis + 1, 3, 1)  # (B, *grid, 3, 3, 3)
        slots = slots.reshape(self.batch_size, prod(self.grid), 3 ** len(self.grid))
        return slots.gather(1, self.index[..., None].expand(-1, -1, slots.shape[-1])).flatten(0, 1)

    def halo_index(self, block: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """The rows that a convolution reads, for a field with ``zero_rows`` rows of zeros after its last.

        As the function ``halo_index``, in int32, but hidden voxels are spread over the rows of zeros: on CUDA all their
        gradients would otherwise be added to one row, one after the other. Each index is computed once.
        """
        key = (block, kernel, stride)
        if key not in self._halo_indices:
            rows, index = self.num_blocks * prod(block), halo_index(self._neighbours, *key)
            position = torch.arange(index.numel(), device=index.device).view(index.shape)
            spread = rows + position.remainder(self.zero_rows(block))
            self._halo_indices[key] = torch.where(index == rows, spread, index).int()
        return self._halo_indices[key]

    def zero_rows(self, block: Sequence[int]) -> int:
        """Number of rows of zeros after a field's last, for what hidden voxels are read as."""
        return min(MOST_ZERO_ROWS, self.num_blocks * prod(block))

    def gather_units(self, units: Tensor) -> Tensor:
        """Visible units (B * V, ...) of all units (B, L, ...)."""
        batch = torch.arange(self.batch_size, device=units.device)[:, None]
        return units[batch, self.index].flatten(0, 1)


def to_units(field: Tensor, block: Sequence[int]) -> Tensor:
    """Cuts a field (B, *spatial, C) into mask units (B, L, *block, C), units in row-major order."""
    dims = len(block)
    for axis, width in enumerate(block):
        field = field.unflatten(2 * axis + 1, (-1, width))  # (B, g0, b0, g1, b1, g2, b2, C)
    order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
    return field.permute(order).flatten(1, dims)


def from_units(units: Tensor, grid: Sequence[int]) -> Tensor:
    """The field (B, *spatial, C) of mask units (B, L, *block, C); the inverse of ``to_units``."""
    dims, block = len(grid), units.shape[2:-1]
    order = [
        0,
        *(axis for pair in zip(range(1, dims + 1), range(dims + 1, 2 * dims + 1), strict=True) for axis in pair),
    ]
    field = units.unflatten(1, tuple(grid)).permute(*order, 2 * dims + 1)
    return field.reshape(len(units), *(g * b for g, b in zip(grid, block, strict=True)), units.shape[-1])


def halo_index(
    neighbours: Tensor, block: Sequence[int], kernel: Sequence[int], stride: Sequence[int] | None = None
) -> Tensor:
    """For every voxel that a convolution of the blocks reads, the row to read; rows count the voxels of all blocks.

    Args:
        neighbours: (N, 3^d) of ``VisibleUnits.neighbours``.
        block: voxels per axis of the input.
        kernel: odd kernel size per axis, at most 2 * block + 1.
        stride: of the convolution per axis, a divisor of the block; None: 1.

    Returns:
        LongTensor (N, *size) with size = block - stride + kernel; N * prod(block) where hidden or outside.

    Raises:
        ValueError: the kernel reaches beyond the neighbours.
    """
    if any(k // 2 > b for k, b in zip(kernel, block, strict=True)):
        raise ValueError(f"kernel {tuple(kernel)} reaches beyond the neighbours of blocks of {tuple(block)} voxels")
    which = torch.zeros((), dtype=torch.long, device=neighbours.device)  # neighbour, row-major in 3^d
    local = torch.zeros((), dtype=torch.long, device=neighbours.device)  # voxel inside it, row-major
    for width, size, step in zip(block, kernel, stride or [1] * len(block), strict=True):
        offset = torch.arange(width - step + size, device=neighbours.device) - size // 2
        which = which[..., None] * 3 + torch.div(offset, width, rounding_mode="floor") + 1
        local = local[..., None] * width + offset.remainder(width)
    rows = neighbours[:, which.flatten()] * prod(block) + local.flatten()
    return rows.clamp_(max=len(neighbours) * prod(block)).view(-1, *which.shape)
