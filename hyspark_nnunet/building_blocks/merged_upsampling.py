"""A transposed convolution and the convolution after it, as one convolution on the coarse grid.

Both are linear. For each output parity (position modulo the stride), the two together equal one small convolution of
the coarse grid: with stride 2 and kernel 3 it has 2 taps per axis instead of 3. The output of the transposed
convolution is never stored. All parities are computed as channels of one convolution, then written to their places on
the fine grid.

Zero padding of the coarse grid gives the same border values, except for the bias of the transposed convolution: the
fine grid's padding has no bias. The contribution of this bias is computed separately and corrected on faces, edges and
corners.
"""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hyspark_nnunet.building_blocks.layouts import CONVOLUTION, to_channels_first

# matrix products of the weights reach this part of a convolution's throughput (measured on CPU: 217 to 530 GFLOP/s)
MATRIX_PRODUCT_SPEED = 0.4


class MergedAxis(NamedTuple):
    """One axis of the merged convolution.

    Attributes:
        taps: of the merged kernel.
        padding: zeros at either end of the coarse grid.
        starts: per parity, where its outputs begin among those of the merged convolution.
        sources: sources[parity][tap][q]: the tap of the fine convolution that sees parity q of the coarse voxel under
            the merged kernel's tap; -1: none does.
    """

    taps: int
    padding: int
    starts: list[int]
    sources: list[list[list[int]]]


def merge_axis(stride: int, kernel: int) -> MergedAxis:
    """How one axis merges.

    Args:
        stride: of the transposed convolution, whose kernel is as large.
        kernel: of the convolution after it, odd.
    """
    reach = kernel // 2
    first = [(parity - reach) // stride for parity in range(stride)]
    last = [(parity + reach) // stride for parity in range(stride)]
    taps = max(end - begin + 1 for begin, end in zip(first, last, strict=True))
    # a parity that needs fewer taps must not look beyond the padding
    first = [min(begin, max(last) - taps + 1) for begin in first]

    def source(parity: int, tap: int, q: int) -> int:
        offset = stride * (first[parity] + tap) + q - parity
        return offset + reach if abs(offset) <= reach else -1

    sources = [[[source(p, tap, q) for q in range(stride)] for tap in range(taps)] for p in range(stride)]
    return MergedAxis(taps, -min(first), [begin - min(first) for begin in first], sources)


class MergedUpsampling(nn.Module):
    """``conv(conv_transpose(image))`` of two layers it does not own, computed as one convolution.

    Args:
        stride: of the transposed convolution, whose kernel is as large, per axis.
        kernel: of the convolution after it, per axis, odd; its padding keeps the size.
    """

    index: Tensor

    def __init__(self, stride: Sequence[int], kernel: Sequence[int]) -> None:
        super().__init__()
        axes = [merge_axis(s, k) for s, k in zip(stride, kernel, strict=True)]
        self.stride, self.kernel = tuple(stride), tuple(kernel)
        self.taps, self.padding = [axis.taps for axis in axes], [axis.padding for axis in axes]
        self.parities = prod(stride)
        # where each parity is written on the fine grid begins at the parity; where it is read begins here
        self.places = list(
            zip(product(*[range(s) for s in stride]), product(*[axis.starts for axis in axes]), strict=True)
        )
        self.register_buffer("index", _source_index(axes, kernel), persistent=False)

    def pays(self, fine_voxels: int, channels: int, out_channels: int) -> bool:
        """Whether merging saves more than merging the kernels costs, in operations and in memory.

        Args:
            fine_voxels: of the whole batch.
            channels: of the image and of the transposed convolution's output.
            out_channels: of the convolution.
        """
        saved = fine_voxels * channels * (channels + (prod(self.kernel) - prod(self.taps)) * out_channels)
        spread = self.parities**2 * prod(self.taps) * channels * out_channels  # numbers, see merged_weight
        return saved > spread * channels / MATRIX_PRODUCT_SPEED and fine_voxels * channels > spread

    def forward(self, image: Tensor, up_weight: Tensor, up_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, E, *(spatial * stride)), in torch's ``channels_last`` memory format.

        Args:
            image: (B, C, *spatial).
            up_weight: (C, D, *stride), of the transposed convolution.
            up_bias: (D).
            weight: (E, D, *kernel), of the convolution.
            bias: (E).
        """
        # in full precision under autocast: the merged kernel would be rounded twice
        with torch.autocast(image.device.type, enabled=False):
            merged_weight = self.merged_weight(up_weight, weight)
            from_bias = self._contribution_of_bias(up_bias, weight, image.shape[2:])
            inside = _inside(from_bias.shape[1:], self.kernel)
            inner = from_bias[(slice(None), *inside)]
            correction = from_bias - inner.view(-1, *[1] * len(inside))
            merged_bias = (bias + inner).repeat(self.parities)
        merged = CONVOLUTION[len(inside)](image, merged_weight, merged_bias, padding=self.padding)
        interleave = _InterleaveInOnePass if torch.compiler.is_compiling() else _Interleave
        interleaved = interleave.apply(
            merged.movedim(1, -1), correction, tuple(image.shape[2:]), self.stride, self.kernel, self.places
        )
        return to_channels_first(interleaved)

    def merged_weight(self, up_weight: Tensor, weight: Tensor) -> Tensor:
        """(parities * E, C, *taps), parities in row-major order; arguments as in ``forward``."""
        out_channels = len(weight)
        rows = F.pad(weight.flatten(2).permute(2, 0, 1), (0, 0, 0, 0, 0, 1))  # (taps of the fine kernel + 1, E, D)
        spread = rows.index_select(0, self.index).unflatten(0, (-1, self.parities)).transpose(1, 2).flatten(2)
        up = up_weight.flatten(2).permute(2, 1, 0).flatten(0, 1)  # (parities * D, C)
        merged = (spread.flatten(0, 1) @ up).view(self.parities, -1, out_channels, up.shape[1])
        return merged.permute(0, 2, 3, 1).reshape(self.parities * out_channels, up.shape[1], *self.taps)

    def _contribution_of_bias(self, up_bias: Tensor, weight: Tensor, coarse: Sequence[int]) -> Tensor:
        """What the transposed convolution's bias adds to the result, (E, *classes).

        The classes of an axis are its first positions, all those inside as one, and its last.
        """
        size = [min(n * s, k) for n, s, k in zip(coarse, self.stride, self.kernel, strict=True)]
        field = up_bias.view(1, -1, *[1] * len(size)).expand(1, -1, *size)
        return CONVOLUTION[len(size)](field, weight, padding=[k // 2 for k in self.kernel])[0]


def _source_index(axes: Sequence[MergedAxis], kernel: Sequence[int]) -> Tensor:
    """For every parity, merged tap and parity of the input, in this order, the fine convolution's tap, row-major.

    LongTensor; prod(kernel) where there is none.
    """
    index = torch.zeros((), dtype=torch.long)
    missing = torch.zeros((), dtype=torch.bool)
    for axis, size in zip(axes, kernel, strict=True):
        table = torch.tensor(axis.sources)
        index = index[..., None, None, None] * size + table
        missing = missing[..., None, None, None] | (table < 0)
    order = [3 * axis + kind for kind in range(3) for axis in range(len(axes))]
    return torch.where(missing, prod(kernel), index).permute(order).flatten()


def _inside(classes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    return [min(k // 2, n - 1) for n, k in zip(classes, kernel, strict=True)]


def _regions(fine: Sequence[int], classes: Sequence[int], inside: Sequence[int]) -> list[tuple[Any, Any]]:
    """Per class that is not inside on every axis: its index, and the part of the fine grid it covers."""
    per_axis = []
    for n, count, middle in zip(fine, classes, inside, strict=True):
        covers = [slice(c, c + 1) for c in range(middle)] + [slice(middle, n - (count - 1 - middle))]
        covers += [slice(n - count + c, n - count + c + 1) for c in range(middle + 1, count)]
        per_axis.append(list(enumerate(covers)))
    found = []
    for combination in product(*per_axis):
        index = [c for c, _ in combination]
        if index != list(inside):
            found.append((index, [covered for _, covered in combination]))
    return found


class _Interleave(torch.autograd.Function):
    """Writes the parities, which are channels, to their places on the fine grid; adds the correction of the border.

    As one function, because autograd would copy the whole result for each of the writes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        correction: Tensor,
        coarse: tuple[int, ...],
        stride: tuple[int, ...],
        kernel: tuple[int, ...],
        places: list[Any],
    ) -> Tensor:
        """Field (B, *merged, parities * E) and correction (E, *classes) to field (B, *fine, E)."""
        ctx.geometry = (coarse, stride, kernel, places)
        ctx.merged_shape, ctx.classes = merged.shape, correction.shape[1:]
        fine = [n * s for n, s in zip(coarse, stride, strict=True)]
        channels = correction.shape[0]
        result = merged.new_empty([len(merged), *fine, channels])
        for number, (written, read) in enumerate(_slices(coarse, stride, places)):
            part = slice(number * channels, (number + 1) * channels)
            result[(slice(None), *written)] = merged[(slice(None), *read, part)]
        for index, region in _regions(fine, ctx.classes, _inside(ctx.classes, kernel)):
            result[(slice(None), *region)] += correction[(slice(None), *index)].to(result.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        coarse, stride, kernel, places = ctx.geometry
        channels = gradient.shape[-1]
        merged = gradient.new_zeros(ctx.merged_shape)
        for number, (written, read) in enumerate(_slices(coarse, stride, places)):
            part = slice(number * channels, (number + 1) * channels)
            merged[(slice(None), *read, part)] = gradient[(slice(None), *written)]
        # the correction is in float32 or better, see MergedUpsampling
        exact = torch.promote_types(gradient.dtype, torch.float32)
        correction = gradient.new_zeros([channels, *ctx.classes], dtype=exact)
        for index, region in _regions(gradient.shape[1:-1], ctx.classes, _inside(ctx.classes, kernel)):
            part = gradient[(slice(None), *region)]
            correction[(slice(None), *index)] = part.sum(dim=list(range(part.ndim - 1)), dtype=exact)
        return merged, correction, None, None, None, None


class _InterleaveInOnePass(torch.autograd.Function):
    """As ``_Interleave``, for the compiler, which turns each write to a part into a pass over the whole.

    Uncompiled, this would hold the result twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        correction: Tensor,
        coarse: tuple[int, ...],
        stride: tuple[int, ...],
        kernel: tuple[int, ...],
        places: list[Any],
    ) -> Tensor:
        """As ``_Interleave.forward``."""
        ctx.geometry = (coarse, stride, kernel, places)
        ctx.merged_shape, ctx.classes = merged.shape, correction.shape[1:]
        dims, channels = len(coarse), correction.shape[0]
        parts = [
            merged[(slice(None), *read, slice(number * channels, (number + 1) * channels))]
            for number, (_, read) in enumerate(_slices(coarse, stride, places))
        ]
        fields = torch.stack(parts, 1).unflatten(1, stride)  # (B, *stride, *coarse, E)
        order = [axis for i in range(dims) for axis in (1 + dims + i, 1 + i)]
        fine = [n * s for n, s in zip(coarse, stride, strict=True)]
        result = fields.permute(0, *order, 1 + 2 * dims).reshape(len(merged), *fine, channels)
        middles = _inside(ctx.classes, kernel)
        classes = []
        for axis, (n, count, middle) in enumerate(zip(fine, ctx.classes, middles, strict=True)):
            position = torch.arange(n, device=merged.device)
            # the first positions have classes of their own, and the last
            of_axis = position.clamp(max=middle) + (position - (n - count + middle)).clamp(min=0)
            classes.append(of_axis.view(-1, *[1] * (dims - 1 - axis)))
        return result + correction.movedim(0, -1)[tuple(classes)].to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        coarse, stride, kernel, places = ctx.geometry
        parts = []
        for written, read in _slices(coarse, stride, places):
            edges = zip(read, ctx.merged_shape[1:-1], strict=True)
            padding = [n for begin, size in reversed(list(edges)) for n in (begin.start, size - begin.stop)]
            parts.append(F.pad(gradient[(slice(None), *written)], [0, 0, *padding]))
        correction = gradient.sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))
        middles = _inside(ctx.classes, kernel)
        for axis, (count, middle) in enumerate(zip(ctx.classes, middles, strict=True)):
            last = count - 1 - middle
            first, inner, end = correction.split([middle, correction.shape[axis] - middle - last, last], axis)
            correction = torch.cat([first, inner.sum(axis, keepdim=True), end], axis)
        correction[tuple(middles)] = 0  # inside, nothing is corrected
        return torch.cat(parts, -1), correction.movedim(-1, 0), None, None, None, None


def _slices(coarse: Sequence[int], stride: Sequence[int], places: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Per parity: where it is written on the fine grid, and where it is read in the merged result."""
    return [
        (
            [slice(p, None, s) for p, s in zip(parity, stride, strict=True)],
            [slice(start, start + n) for start, n in zip(starts, coarse, strict=True)],
        )
        for parity, starts in places
    ]
