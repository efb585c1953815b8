"""Two ways to lay out a batch in memory, with the operations that look beyond one voxel.

Everything in an encoder except spatial convolutions, pooling and attention is point-wise. A layout supplies these
three, so that one encoder serves fine-tuning and pre-training. Fields (activations) are channels-last: LayerNorm and
1^3 convolutions are then plain operations on rows, and convolutions see torch's ``channels_last`` memory format.

========================  =========================  =================================================================
layout                    shape of a field           used for
========================  =========================  =================================================================
``DenseLayout``           (B, *spatial, C)           fine-tuning and inference: no mask
``VisibleBlocksLayout``   (B * V, *block, C)         pre-training: only visible mask units are stored and computed
========================  =========================  =================================================================

With a mask, every convolution sees hidden voxels as zero. All strides divide the mask unit, so pooling never mixes
visible and hidden voxels, and visible blocks need no masking: hidden voxels are never read.
Source: SparK (arXiv 2301.03580), section 3.2.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hyspark_nnunet.masking import mask_grid

CONVOLUTION = {2: F.conv2d, 3: F.conv3d}
MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def to_channels_first(field: Tensor) -> Tensor:
    """A view (N, C, *spatial) of a field (N, *spatial, C), in torch's ``channels_last`` memory format."""
    return field.movedim(-1, 1)


def to_channels_last(image: Tensor) -> Tensor:
    """A field (N, *spatial, C) of an image (N, C, *spatial); a view where the memory format allows it."""
    return image.movedim(1, -1).contiguous()


class DenseLayout:
    """The whole volume, no mask.

    Args:
        spatial: size of the volume per axis at this stage.
    """

    def __init__(self, spatial: Sequence[int]) -> None:
        self.spatial = tuple(spatial)

    def enter(self, image: Tensor) -> Tensor:
        """The field of an image (B, C, *spatial)."""
        return to_channels_last(image)

    def leave(self, field: Tensor) -> Tensor:
        """The image (B, C, *spatial) of a field."""
        return to_channels_first(field)

    def prepare(self, kernel: Sequence[int]) -> None:
        """Computes what ``convolve`` needs for a kernel, once for all convolutions."""

    def convolve(self, field: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """A convolution of odd kernel and stride 1 that keeps the size; weight (C_out, C_in / groups, *kernel)."""
        padding = [k // 2 for k in weight.shape[2:]]
        image = to_channels_first(field)
        return to_channels_last(CONVOLUTION[len(padding)](image, weight, bias, padding=padding, groups=groups))

    def pool(self, field: Tensor, stride: Sequence[int]) -> Tensor:
        """Max pooling, window = stride; the result belongs to ``coarser(stride)``."""
        if all(s == 1 for s in stride):
            return field
        return to_channels_last(MAX_POOL[len(stride)](to_channels_first(field), list(stride)))

    def coarser(self, stride: Sequence[int]) -> "DenseLayout":
        """The layout of the next stage."""
        return DenseLayout([n // s for n, s in zip(self.spatial, stride, strict=True)])

    def tokens(self, field: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels as tokens, with their positions.

        Args:
            field: at a stage where a mask unit is one voxel.
            positions: (L, C), one row per voxel of the grid, row-major.

        Returns:
            tokens (B, T, C) and positions, broadcastable to them.
        """
        return field.flatten(1, -2), positions[None]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """The field of tokens (B, T, C)."""
        return tokens.unflatten(1, self.spatial)


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

    def gather_units(self, units: Tensor) -> Tensor:
        """Visible units (B * V, ...) of all units (B, L, ...)."""
        batch = torch.arange(self.batch_size, device=units.device)[:, None]
        return units[batch, self.index].flatten(0, 1)


class VisibleBlocksLayout(DenseLayout):
    """Only the visible mask units, each a small block; a field is (B * V, *block, C).

    A convolution takes a halo around each block from its visible neighbours, zero where they are hidden or outside.

    Args:
        units: the batch's visible units.
        block: voxels of a mask unit per axis at this stage.
        neighbours: of ``units``; computed where not given.
    """

    def __init__(self, units: VisibleUnits, block: Sequence[int], neighbours: Tensor | None = None) -> None:
        super().__init__(block)
        self.units, self.block = units, tuple(block)
        self.neighbours = units.neighbours() if neighbours is None else neighbours
        self._halo_index: dict[tuple[int, ...], Tensor] = {}

    def enter(self, image: Tensor) -> Tensor:
        return self.units.gather_units(to_units(to_channels_last(image), self.block))

    def leave(self, field: Tensor) -> Tensor:
        return to_channels_first(self.scatter(field, field.new_zeros(field.shape[-1])))

    def scatter(self, field: Tensor, background: Tensor) -> Tensor:
        """The whole volume (B, *spatial, C): visible blocks from the field, hidden ones filled with a vector (C)."""
        units, length = self.units, prod(self.units.grid)
        everything = background.to(field.dtype).expand(units.batch_size, length, *field.shape[1:])
        index = units.index.view(units.batch_size, units.num_visible, *[1] * (field.ndim - 1))
        everything = everything.scatter(
            1, index.expand(-1, -1, *field.shape[1:]), field.unflatten(0, units.index.shape)
        )
        return from_units(everything, units.grid)

    def prepare(self, kernel: Sequence[int]) -> None:
        if tuple(kernel) not in self._halo_index:
            self._halo_index[tuple(kernel)] = halo_index(self.neighbours, self.block, kernel)

    def convolve(self, field: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        kernel = tuple(weight.shape[2:])
        image = to_channels_first(self._with_halo(field, kernel))
        return to_channels_last(CONVOLUTION[len(kernel)](image, weight, bias, groups=groups))

    def coarser(self, stride: Sequence[int]) -> "VisibleBlocksLayout":
        block = [b // s for b, s in zip(self.block, stride, strict=True)]
        return VisibleBlocksLayout(self.units, block, self.neighbours)

    def tokens(self, field: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return field.view(self.units.batch_size, self.units.num_visible, field.shape[-1]), positions[self.units.index]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(self.units.num_blocks, *self.block, tokens.shape[-1])

    def _with_halo(self, field: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """(B * V, *(block + kernel - 1), C)."""
        self.prepare(kernel)
        size = [b + k - 1 for b, k in zip(self.block, kernel, strict=True)]
        rows = field.flatten(0, -2)
        # one row of zeros behind the last: what hidden and outside voxels are read as
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return rows.index_select(0, self._halo_index[kernel]).view(len(field), *size, rows.shape[1])


class Feature(NamedTuple):
    """A feature map in the layout it was computed in."""

    field: Tensor
    layout: DenseLayout

    def image(self) -> Tensor:
        """(B, C, *spatial); zero where hidden."""
        return self.layout.leave(self.field)


def visible_blocks(
    image: Tensor, visible: Tensor, unit: Sequence[int], num_visible: int | None = None
) -> VisibleBlocksLayout:
    """The layout of an image's visible mask units.

    Args:
        image: (B, C, *spatial).
        visible: BoolTensor (B, 1, *grid), True = kept, equally many per sample.
        unit: voxels of a mask unit per axis.
        num_visible: visible units of each sample, where known: then nothing waits for the device.

    Raises:
        ValueError: the image is not a whole number of mask units, or the mask does not fit it.
    """
    grid = mask_grid(image.shape[2:], unit)
    if tuple(visible.shape) != (len(image), 1, *grid):
        raise ValueError(
            f"the mask has shape {tuple(visible.shape)}, but an image of shape {tuple(image.shape)} with mask units of "
            f"{tuple(unit)} voxels needs {(len(image), 1, *grid)}"
        )
    return VisibleBlocksLayout(VisibleUnits(visible, num_visible), unit)


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


def halo_index(neighbours: Tensor, block: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """For every voxel of every block with its halo, the row to read; rows count the voxels of all blocks.

    Args:
        neighbours: (N, 3^d) of ``VisibleUnits.neighbours``.
        block: voxels per axis.
        kernel: odd kernel size per axis, at most 2 * block + 1.

    Returns:
        LongTensor (N * prod(block + kernel - 1)); N * prod(block) for a voxel that is hidden or outside.
    """
    if any(k // 2 > b for k, b in zip(kernel, block, strict=True)):
        raise ValueError(f"kernel {tuple(kernel)} reaches beyond the neighbours of blocks of {tuple(block)} voxels")
    which = torch.zeros((), dtype=torch.long, device=neighbours.device)  # neighbour, row-major in 3^d
    local = torch.zeros((), dtype=torch.long, device=neighbours.device)  # voxel inside it, row-major
    for width, size in zip(block, kernel, strict=True):
        offset = torch.arange(-(size // 2), width + size // 2, device=neighbours.device)
        which = which[..., None] * 3 + torch.div(offset, width, rounding_mode="floor") + 1
        local = local[..., None] * width + offset.remainder(width)
    rows = neighbours[:, which.flatten()] * prod(block) + local.flatten()
    return rows.clamp_(max=len(neighbours) * prod(block)).flatten()
