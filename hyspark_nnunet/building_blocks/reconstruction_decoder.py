"""HySparK's decoder of pre-training: a light U-Net decoder from dense skips to the whole image."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_batchnorm
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.mednext import convolution_class
from hyspark_nnunet.building_blocks.merged_upsampling import MergedUpsampling
from hyspark_nnunet.building_blocks.recomputation import Recomputing


class ConvNormReLU(nn.Sequential):
    """Convolution, BatchNorm, ReLU, twice; the first convolution changes the channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> None:
        convolution, norm = convolution_class(len(kernel_size)), get_matching_batchnorm(dimension=len(kernel_size))
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
        """From the first convolution's output to the second's."""
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
        merge: whether the upsampling and the convolution after it are computed as one; None: where that pays.
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
        """(B, C, *spatial) through the upsampling and the first convolution after it."""
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
        # belongs to the next step, where it can be recomputed
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
