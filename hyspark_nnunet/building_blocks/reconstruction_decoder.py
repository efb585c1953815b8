"""From the encoder's visible features to the whole image: densify, then a light U-Net decoder."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import Feature, VisibleBlocksLayout, to_channels_first
from hyspark_nnunet.building_blocks.mednext import convolution_class
from hyspark_nnunet.building_blocks.merged_upsampling import MergedUpsampling
from hyspark_nnunet.building_blocks.recomputation import Recomputing

BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Densify(Recomputing):
    """Fills the hidden positions of each skip with a learned token and projects it to the decoder's width.

    Skips run coarse to fine; the finest feature of the encoder is not among them, the decoder has no use for it. The
    projection is 1^3 at the coarsest scale (none where the widths agree) and of the stage's kernel at the finer ones.
    Source: SparK (arXiv 2301.03580), section 3.3.

    Args:
        channels: of the encoder's features, coarse to fine.
        width: of the decoder at the coarsest scale; halves with every finer one.
        kernel_sizes: of the stages, coarse to fine.
    """

    def __init__(self, channels: Sequence[int], width: int, kernel_sizes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        dims = len(kernel_sizes[0])
        convolution = convolution_class(dims)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, c, *[1] * dims) for c in channels)
        self.projections = nn.ModuleList()
        for k, (c, kernel) in enumerate(zip(channels, kernel_sizes, strict=True)):
            if k == 0:
                same = c == width
                self.projections.append(nn.Identity() if same else convolution(c, width, 1))
            else:
                padding = [n // 2 for n in kernel]
                self.projections.append(convolution(c, width // 2**k, tuple(kernel), padding=padding))
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, features: Sequence[Feature]) -> list[Tensor]:
        """Dense skips (B, width / 2^k, *spatial_k) of features of visible blocks, both coarse to fine."""
        skips = []
        for feature, token, projection in zip(features, self.mask_tokens, self.projections, strict=True):
            layout = cast(VisibleBlocksLayout, feature.layout)
            skips.append(self.light(partial(_fill_and_project, layout, projection), feature.field, token))
        return skips


def _fill_and_project(layout: VisibleBlocksLayout, projection: nn.Module, field: Tensor, token: Tensor) -> Tensor:
    return projection(to_channels_first(layout.scatter(field, token.flatten())))


class ConvNormReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU, twice; the first convolution changes the channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> None:
        convolution, norm = convolution_class(len(kernel_size)), BATCH_NORM[len(kernel_size)]
        kernel, padding = tuple(kernel_size), tuple(k // 2 for k in kernel_size)
        super().__init__(
            convolution(in_channels, out_channels, kernel, padding=padding),
            norm(out_channels),
            nn.ReLU(inplace=True),
            convolution(out_channels, out_channels, kernel, padding=padding),
            norm(out_channels),
            nn.ReLU(inplace=True),
        )

    def first(self, image: Tensor) -> Tensor:
        """The first convolution."""
        return self[0](image)

    def second(self, convolved: Tensor) -> Tensor:
        """From behind the first convolution to behind the second."""
        return self[3](self[2](self[1](convolved)))

    def finish(self, convolved: Tensor) -> Tensor:
        """What follows the second convolution."""
        return self[5](self[4](convolved))


class UpsamplingLevel(nn.Module):
    """One level of the decoder: fuse with the skip (but at the coarsest), then go up and halve the channels.

    The parts only; ``ReconstructionDecoder`` runs them.

    Args:
        channels: of the input.
        stride: of the upsampling, per axis.
        fuse_kernel: kernel of the stage of the input; None: no skip to fuse.
        up_kernel: kernel of the stage of the output.

    Attributes:
        merge: whether the upsampling and the convolution behind it are computed as one; None: where that pays.
    """

    def __init__(
        self,
        channels: int,
        stride: Sequence[int],
        fuse_kernel: Sequence[int] | None,
        up_kernel: Sequence[int],
    ) -> None:
        super().__init__()
        self.fuse = None if fuse_kernel is None else ConvNormReLU(2 * channels, channels, fuse_kernel)
        transposed = convolution_class(len(stride), transposed=True)
        self.upsample = transposed(channels, channels, tuple(stride), stride=tuple(stride))
        self.refine = ConvNormReLU(channels, channels // 2, up_kernel)
        self.merged = MergedUpsampling(stride, up_kernel)
        self.merge: bool | None = None

    def go_up(self, running: Tensor) -> Tensor:
        """(B, C, *spatial) through the upsampling and the first convolution behind it."""
        up, first = self.upsample, self.refine[0]
        fine_voxels = len(running) * prod(running.shape[2:]) * prod(up.stride)
        pays = self.merged.pays(fine_voxels, first.in_channels, first.out_channels)
        if pays if self.merge is None else self.merge:
            return self.merged(running, up.weight, up.bias, first.weight, first.bias)
        return first(up(running))


def check_width(width: int, n_levels: int) -> None:
    """Whether a decoder's width can be halved at every level.

    Raises:
        ValueError: it cannot.
    """
    if width < 1 or width % 2**n_levels:
        raise ValueError(f"decoder_width {width} cannot be halved {n_levels} times: choose a multiple of {2**n_levels}")


class ReconstructionDecoder(Recomputing):
    """HySparK's decoder of pre-training.

    Args:
        width: channels at the coarsest level; halves with every level.
        out_channels: channels of the image.
        strides: of the encoder's stages, fine to coarse.
        kernel_sizes: of the encoder's stages, fine to coarse.

    Raises:
        ValueError: the width cannot be halved at every level.
    """

    def __init__(
        self, width: int, out_channels: int, strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        n_levels = len(strides) - 1
        check_width(width, n_levels)
        self.levels = nn.ModuleList()
        for k in range(n_levels):
            stage = n_levels - k
            fuse_kernel = None if k == 0 else kernel_sizes[stage]
            level = UpsamplingLevel(width // 2**k, strides[stage], fuse_kernel, kernel_sizes[stage - 1])
            self.levels.append(level)
        self.project = convolution_class(len(strides[0]))(width // 2**n_levels, out_channels, 1)
        self.apply(self.initialize)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Convolutions truncated normal 0.02, transposed ones Kaiming fan-out, biases zero, as the release has them."""
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """Densified skips, coarse to fine, to the reconstruction (B, out_channels, *spatial)."""
        # between the steps the running feature is kept as the last convolution left it; "pending", its norm and ReLU,
        # belongs to the step behind, where it can be recomputed
        running, pending = skips[0], _identity
        for level, skip in zip(self.levels, skips, strict=True):
            running = self.full(partial(self._level, level, pending), running, skip)
            pending = level.refine.finish
        return self.light(lambda r: self.project(pending(r)), running)

    def _level(
        self, level: UpsamplingLevel, pending: Callable[[Tensor], Tensor], running: Tensor, skip: Tensor
    ) -> Tensor:
        if level.fuse is not None:
            fuse, before = level.fuse, pending
            running = self.light(lambda r, s: fuse.first(torch.cat([before(r), s], dim=1)), running, skip)
            running = self.light(fuse.second, running)
            pending = fuse.finish
        running = self.light(lambda r: level.go_up(pending(r)), running)
        return self.light(level.refine.second, running)


def _identity(field: Tensor) -> Tensor:
    return field
