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
from functools import reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hyspark_nnunet.building_blocks.row_norm import normalise_columns
from hyspark_nnunet.building_blocks.visible_units import VisibleUnits, from_units, to_units
from hyspark_nnunet.masking import mask_grid

CONVOLUTION = {2: F.conv2d, 3: F.conv3d}
MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
# up to so many samples, one batch norm per sample is the fastest instance norm of channels-last fields. For more, group
# norm adds up each channel's squares in one sum: on a CPU, 2^19 voxels in float32 are wrong by 1e-4
FEW_SAMPLES = 4


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

    # consecutive blocks of a field that belong to one sample
    blocks_per_sample = 1

    def __init__(self, spatial: Sequence[int]) -> None:
        self.spatial = tuple(spatial)

    def enter(self, image: Tensor) -> Tensor:
        """The field of an image (B, C, *spatial)."""
        return to_channels_last(image)

    def leave(self, field: Tensor) -> Tensor:
        """The image (B, C, *spatial) of a field."""
        return to_channels_first(field)

    def prepare(self, kernel: Sequence[int], stride: Sequence[int] | None = None) -> None:
        """Computes what ``convolve`` needs for a kernel and stride, once for all convolutions."""

    def convolve(
        self,
        field: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int = 1,
        stride: Sequence[int] | None = None,
        channels_first: bool = False,
    ) -> Tensor:
        """A convolution with zero padding; the result belongs to ``coarser(stride)``.

        Args:
            field: (N, *spatial, C_in).
            weight: (C_out, C_in / groups, *kernel), odd kernel sizes.
            bias: (C_out) or None.
            groups: as in torch.
            stride: per axis, a divisor of the layout's size; None: 1.
            channels_first: the convolution runs on a channels-first copy, for which torch has other kernels.
        """
        kernel = tuple(weight.shape[2:])
        step = [1] * len(kernel) if stride is None else list(stride)
        if all(k == 1 for k in kernel) and all(s == 1 for s in step) and groups == 1:
            return F.linear(field, weight.flatten(1), bias)
        padding = [k // 2 for k in kernel]
        image = to_channels_first(field)
        image = image.contiguous() if channels_first else image
        return to_channels_last(CONVOLUTION[len(kernel)](image, weight, bias, step, padding, groups=groups))

    def pool(self, field: Tensor, stride: Sequence[int]) -> Tensor:
        """Max pooling, window = stride; the result belongs to ``coarser(stride)``."""
        if all(s == 1 for s in stride):
            return field
        return to_channels_last(MAX_POOL[len(stride)](to_channels_first(field), list(stride)))

    def average(self, field: Tensor, stride: Sequence[int]) -> Tensor:
        """Average pooling, window = stride; the result belongs to ``coarser(stride)``."""
        # axis by axis: torch's own pooling copies channels-last fields
        for axis, s in enumerate(stride, start=1):
            field = reduce(torch.add, field.unflatten(axis, (-1, s)).unbind(axis + 1))
        return field / prod(stride)

    def normalise(self, field: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """InstanceNorm: each channel of each sample by its mean and variance over the voxels that the layout stores.

        Args:
            field: (N, *spatial, C).
            weight: (C) or None.
            bias: (C) or None.
            eps: added to the variance.
        """
        samples = field.unflatten(0, (-1, self.blocks_per_sample)).flatten(1, 2)  # (B, V * n0, n1, ..., C)
        if len(samples) > FEW_SAMPLES:
            rows = F.group_norm(to_channels_first(samples), field.shape[-1], weight, bias, eps)
            return to_channels_last(rows).view(field.shape)
        rows = [normalise_columns(sample.flatten(0, -2), weight, bias, eps) for sample in samples]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).view(field.shape)

    def coarser(self, stride: Sequence[int]) -> "DenseLayout":
        """The layout after an operation with this stride."""
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


class VisibleBlocksLayout(DenseLayout):
    """Only the visible mask units, each a small block; a field is (B * V, *block, C).

    A convolution takes a halo around each block from its visible neighbours, zero where they are hidden or outside.

    Args:
        units: the batch's visible units.
        block: voxels of a mask unit per axis at this stage.
    """

    def __init__(self, units: VisibleUnits, block: Sequence[int]) -> None:
        super().__init__(block)
        self.units, self.block = units, tuple(block)
        self.blocks_per_sample = units.num_visible

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

    def prepare(self, kernel: Sequence[int], stride: Sequence[int] | None = None) -> None:
        step = tuple(stride or [1] * len(kernel))
        if prod(kernel) * prod(step) > 1:
            self.units.halo_index(self.block, tuple(kernel), step)

    def convolve(
        self,
        field: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int = 1,
        stride: Sequence[int] | None = None,
        channels_first: bool = False,
    ) -> Tensor:
        kernel = tuple(weight.shape[2:])
        step = tuple(stride or [1] * len(kernel))
        if prod(kernel) == prod(step) == groups == 1:
            return F.linear(field, weight.flatten(1), bias)
        index, channels = self.units.halo_index(self.block, kernel, step), field.shape[-1]
        rows = field.flatten(0, -2)
        # what hidden and outside voxels are read as
        rows = torch.cat([rows, rows.new_zeros(self.units.zero_rows(self.block), channels)])
        result = [b // s for b, s in zip(self.block, step, strict=True)]
        if groups == 1 and prod([n + k - 1 for n, k in zip(result, kernel, strict=True)]) > 2 * prod(result):
            # of small blocks a convolution would compute more halo than block: one matrix product instead
            for axis, (k, s) in enumerate(zip(kernel, step, strict=True), start=1):
                index = index.unfold(axis, k, s)
            patches = rows.index_select(0, index.flatten()).view(len(field), *result, prod(kernel) * channels)
            return F.linear(patches, weight.flatten(2).transpose(1, 2).flatten(1), bias)
        image = to_channels_first(rows.index_select(0, index.flatten()).view(*index.shape, channels))
        image = image.contiguous() if channels_first else image
        return to_channels_last(CONVOLUTION[len(kernel)](image, weight, bias, step, groups=groups))

    def coarser(self, stride: Sequence[int]) -> "VisibleBlocksLayout":
        return VisibleBlocksLayout(self.units, [b // s for b, s in zip(self.block, stride, strict=True)])

    def tokens(self, field: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return field.view(self.units.batch_size, self.units.num_visible, field.shape[-1]), positions[self.units.index]

    def from_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(self.units.num_blocks, *self.block, tokens.shape[-1])


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
