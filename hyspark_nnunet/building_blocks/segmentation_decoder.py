"""The decoder of the segmentation network, with nnU-Net's deep supervision."""

from collections.abc import Sequence
from itertools import chain
from math import prod

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_instancenorm
from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.building_blocks.layouts import DenseLayout, to_channels_first, to_channels_last
from hyspark_nnunet.building_blocks.mednext import MedNeXtBlock, convolution_class
from hyspark_nnunet.building_blocks.recomputation import Recomputing


def pad_front(image: Tensor, amount: Sequence[int]) -> Tensor:
    """Zeros at the front of each spatial axis of (N, C, *spatial)."""
    return F.pad(image, list(chain.from_iterable((n, 0) for n in reversed(amount))))


class MedNeXtUpBlock(nn.Module):
    """A MedNeXt block that goes up: the depth-wise convolution is transposed, the residual too.

    Both transposed convolutions give stride * (n - 1) + 1 voxels; zeros at the front make it stride * n.
    Source: MedNeXt (arXiv 2303.09975), section 2.2.

    Args:
        channels: of the input.
        out_channels: of the output.
        expansion: width of the hidden layer in multiples of ``channels``.
        kernel_size: of the depth-wise convolution, per axis.
        stride: per axis.
    """

    def __init__(
        self, channels: int, out_channels: int, expansion: int, kernel_size: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        transposed = convolution_class(len(stride), transposed=True)
        kernel, padding = tuple(kernel_size), tuple(k // 2 for k in kernel_size)
        self.stride = tuple(stride)
        self.conv = transposed(channels, channels, kernel, stride=self.stride, padding=padding, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, expansion * channels)
        self.project = nn.Linear(expansion * channels, out_channels)
        self.residual = transposed(channels, out_channels, 1, stride=self.stride)

    def forward(self, image: Tensor) -> Tensor:
        """(B, channels, *spatial) to (B, out_channels, *(spatial * stride))."""
        hidden = self.norm(to_channels_last(self.conv(image)))
        hidden = to_channels_first(self.project(F.gelu(self.expand(hidden))))
        front = [s - 1 for s in self.stride]
        return pad_front(hidden, front) + pad_front(self.residual(image), front)


class ResidualFusion(nn.Module):
    """Two convolutions with InstanceNorm and LeakyReLU, and a 1^3 convolution with InstanceNorm on the shortcut.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of the two convolutions, per axis.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        dims = len(kernel_size)
        convolution, kernel, padding = convolution_class(dims), tuple(kernel_size), tuple(k // 2 for k in kernel_size)
        self.conv1 = convolution(in_channels, out_channels, kernel, padding=padding)
        self.conv2 = convolution(out_channels, out_channels, kernel, padding=padding)
        self.shortcut = convolution(in_channels, out_channels, 1)
        self.norm = get_matching_instancenorm(dimension=dims)(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        hidden = F.leaky_relu(self.norm(self.conv1(image)), 0.01)
        return F.leaky_relu(self.norm(self.conv2(hidden)) + self.norm(self.shortcut(image)), 0.01)


class SegmentationLevel(Recomputing):
    """One level: a MedNeXt block on the skip, the coarser feature brought up, both fused.

    Args:
        skip_channels: of the encoder's feature at this resolution.
        coarse_channels: of the coarser feature.
        out_channels: of the result.
        expansion: of the block on the skip.
        kernel_size: of the stage.
        stride: from the coarser feature to this resolution.
    """

    UP_EXPANSION = 4

    def __init__(
        self,
        skip_channels: int,
        coarse_channels: int,
        out_channels: int,
        expansion: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
    ) -> None:
        super().__init__()
        self.skip_block = MedNeXtBlock(skip_channels, expansion, kernel_size)
        self.up_block = MedNeXtUpBlock(coarse_channels, out_channels, self.UP_EXPANSION, kernel_size, stride)
        self.fusion = ResidualFusion(skip_channels + out_channels, out_channels, kernel_size)

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """Skip (B, C, *spatial) and the coarser feature to (B, out_channels, *spatial)."""
        skip = to_channels_first(self.skip_block(to_channels_last(skip), DenseLayout(skip.shape[2:])))
        return self.full(lambda s, c: self.fusion(torch.cat([s, self.up_block(c)], dim=1)), skip, coarse)


class SegmentationDecoder(nn.Module):
    """HySparK's segmentation decoder; levels run coarse to fine.

    Args:
        features_per_stage: of the encoder's stages.
        skip_channels: of the encoder's features, fine to coarse.
        strides: of the encoder's stages.
        kernel_sizes: of the encoder's stages.
        expansion_per_level: of the blocks on the skips, fine to coarse, one per skip but the coarsest.
        num_classes: segmentation heads.
        deep_supervision: give the logits of every level instead of the finest one's.
    """

    def __init__(
        self,
        features_per_stage: Sequence[int],
        skip_channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        expansion_per_level: Sequence[int],
        num_classes: int,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.strides = [tuple(s) for s in strides]
        self.levels, self.seg_layers = nn.ModuleList(), nn.ModuleList()
        # heads of all levels are always built, so that weights load whether deep supervision is on or not
        convolution = convolution_class(len(strides[0]))
        coarse = skip_channels[-1]
        for stage in range(len(strides) - 2, -1, -1):
            out = features_per_stage[stage]
            level = SegmentationLevel(
                skip_channels[stage], coarse, out, expansion_per_level[stage], kernel_sizes[stage], strides[stage + 1]
            )
            self.levels.append(level)
            self.seg_layers.append(convolution(out, num_classes, 1))
            coarse = out

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The encoder's features, fine to coarse, to logits (B, num_classes, *spatial).

        Returns:
            the logits at full resolution; with deep supervision a list of them, fine to coarse.
        """
        running, logits = features[-1], []
        for index, (level, skip) in enumerate(zip(self.levels, features[-2::-1], strict=True)):
            running = level(skip, running)
            if self.deep_supervision or index == len(self.levels) - 1:
                logits.append(self.seg_layers[index](running))
        return logits[::-1] if self.deep_supervision else logits[0]

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Voxels times channels that the convolutions write for one image of ``input_size``."""
        total, sizes = 0, [list(input_size)]
        for stride in self.strides[1:]:
            sizes.append([n // s for n, s in zip(sizes[-1], stride, strict=True)])
        for level, head, size, coarse in zip(self.levels, self.seg_layers, sizes[-2::-1], sizes[:0:-1], strict=True):
            skip, up, out = level.skip_block, level.up_block, level.fusion.conv1.out_channels
            channels = 2 * skip.project.out_features + skip.expand.out_features + 3 * out
            if self.deep_supervision or head is self.seg_layers[-1]:
                channels += head.out_channels
            # the block that goes up writes before it is padded
            up_voxels = prod(s * (n - 1) + 1 for n, s in zip(coarse, up.stride, strict=True))
            up_channels = up.expand.in_features + up.expand.out_features + 2 * out
            total += channels * prod(size) + up_channels * up_voxels
        return total
