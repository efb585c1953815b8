"""The hybrid encoder: MedNeXt stages, and a vision transformer on the voxels of the last.

One class, two ways through it: ``encoder(x)`` is the dense network of fine-tuning and inference, ``encoder(x,
visible)`` the sparse one of pre-training. Same parameters, same keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import DenseLayout, Feature, visible_blocks
from hyspark_nnunet.building_blocks.mednext import LayoutConvolution, MedNeXtBlock
from hyspark_nnunet.building_blocks.transformer import VisionTransformer, sincos_positions
from hyspark_nnunet.masking import mask_grid, unit_size

HEAD_SIZE = 32


class EncoderStage(nn.Module):
    """MedNeXt blocks, then (except in the last stage) a convolution to the next stage's channels.

    Args:
        channels: of the input and the blocks.
        out_channels: of the convolution after the blocks; None: no convolution.
        n_blocks: number of MedNeXt blocks.
        expansion: of each block.
        kernel_size: of every convolution of the stage.
    """

    def __init__(
        self, channels: int, out_channels: int | None, n_blocks: int, expansion: int, kernel_size: Sequence[int]
    ) -> None:
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        self.blocks = nn.ModuleList(MedNeXtBlock(channels, expansion, kernel_size) for _ in range(n_blocks))
        self.widen = None if out_channels is None else LayoutConvolution(channels, out_channels, kernel_size)

    def forward(self, field: Tensor, layout: DenseLayout) -> Tensor:
        """Field (N, *spatial, channels) to (N, *spatial, out_channels)."""
        layout.prepare(self.kernel_size)  # before parts of the stage are recomputed
        for block in self.blocks:
            field = block(field, layout)
        return field if self.widen is None else self.widen(field, layout)


class HybridEncoder(nn.Module):
    """HySparK's encoder, for any plan.

    Args:
        input_channels: channels of the image.
        n_stages: number of stages n, at least 2.
        features_per_stage: n channel counts c_0 .. c_(n-1); the stem leads to c_0.
        kernel_sizes: n kernel sizes, per axis.
        strides: n strides, per axis; the first is 1, pooling after stage i is ``strides[i + 1]``.
        n_blocks_per_stage: n numbers of MedNeXt blocks.
        expansion_per_stage: n expansions of the MedNeXt blocks.
        vit_n_blocks: transformer blocks on the last stage.
        vit_num_heads: their heads; None: heads of size 32.

    Attributes:
        output_channels: channels of the n features: c_1 .. c_(n-1), c_(n-1).

    Raises:
        ValueError: fewer than 2 stages, lists of other lengths, a first stride that is not 1, even kernels.
    """

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        n_blocks_per_stage: Sequence[int],
        expansion_per_stage: Sequence[int],
        vit_n_blocks: int = 3,
        vit_num_heads: int | None = None,
    ) -> None:
        super().__init__()
        if n_stages < 2:
            raise ValueError(f"n_stages is {n_stages}, but HySparK needs at least 2 stages")
        per_stage = {
            "features_per_stage": features_per_stage,
            "kernel_sizes": kernel_sizes,
            "strides": strides,
            "n_blocks_per_stage": n_blocks_per_stage,
            "expansion_per_stage": expansion_per_stage,
        }
        for name, values in per_stage.items():
            if len(values) != n_stages:
                raise ValueError(f"{name} has {len(values)} entries, but n_stages is {n_stages}")
        if any(s != 1 for s in strides[0]):
            raise ValueError(
                f"the first stage's stride is {tuple(strides[0])}, but HySparK's first stage keeps the size"
            )
        last = features_per_stage[-1]
        if vit_num_heads is None:
            if last % HEAD_SIZE:
                raise ValueError(
                    f"the last stage has {last} channels, no multiple of the head size {HEAD_SIZE}: give vit_num_heads"
                )
            vit_num_heads = last // HEAD_SIZE

        self.strides = [tuple(s) for s in strides]
        self.kernel_sizes = [tuple(k) for k in kernel_sizes]
        self.unit = unit_size(self.strides)
        self.output_channels = [*features_per_stage[1:], last]
        self.stem = LayoutConvolution(input_channels, features_per_stage[0], kernel_sizes[0])
        next_channels = [*features_per_stage[1:], None]
        self.stages = nn.ModuleList(
            EncoderStage(
                features_per_stage[i], next_channels[i], n_blocks_per_stage[i], expansion_per_stage[i], kernel_sizes[i]
            )
            for i in range(n_stages)
        )
        self.vit = VisionTransformer(last, vit_n_blocks, vit_num_heads)

    def forward(self, image: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """The n features, fine to coarse.

        Args:
            image: (B, input_channels, *spatial), a whole number of mask units per axis.
            visible: BoolTensor (B, 1, *grid), True = kept, equally many per sample; None: the dense encoder.

        Returns:
            features (B, output_channels[i], *spatial_i), zero at hidden positions.

        Raises:
            ValueError: the image is no whole number of mask units, or the mask does not fit it.
        """
        return [feature.image() for feature in self.features(image, visible)]

    def features(self, image: Tensor, visible: Tensor | None = None, num_visible: int | None = None) -> list[Feature]:
        """The n features in the layout they are computed in.

        Args:
            image: as in ``forward``.
            visible: as in ``forward``.
            num_visible: visible units of each sample, where known: then nothing waits for the device.

        Raises:
            ValueError: see ``forward``.
        """
        layout = self._first_layout(image, visible, num_visible)
        # a dense field runs through the same code; only its layout differs
        field = self.stem(layout.enter(image), layout)
        features = []
        for stage, stride in zip(self.stages[:-1], self.strides[1:], strict=True):
            field = stage(field, layout)
            features.append(Feature(field, layout))
            field, layout = layout.pool(field, stride), layout.coarser(stride)
        field = self.stages[-1](field, layout)
        features.append(Feature(self._transform(field, layout, image.shape[2:]), layout))
        return features

    def _first_layout(self, image: Tensor, visible: Tensor | None, num_visible: int | None) -> DenseLayout:
        if visible is None:
            mask_grid(image.shape[2:], self.unit)  # checks the size
            return DenseLayout(image.shape[2:])
        return visible_blocks(image, visible, self.unit, num_visible)

    def _transform(self, field: Tensor, layout: DenseLayout, spatial: torch.Size) -> Tensor:
        grid = [n // u for n, u in zip(spatial, self.unit, strict=True)]
        positions = sincos_positions(grid, field.shape[-1], field.device).to(field.dtype)
        tokens, positions = layout.tokens(field, positions)
        return layout.from_tokens(self.vit(tokens, positions))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Voxels times channels that the convolutions and the transformer write for one image of ``input_size``.

        The measure of dynamic-network-architectures, by which nnU-Net's planner estimates memory.
        """
        size, total = list(input_size), 0
        for index, (stage, stride) in enumerate(zip(self.stages, self.strides, strict=True)):
            size = [n // s for n, s in zip(size, stride, strict=True)]
            voxels = int(torch.tensor(size).prod())
            if index == 0:
                total += voxels * self.stem.weight.shape[0]
            for block in stage.blocks:
                total += voxels * (2 * block.project.out_features + block.expand.out_features)
            if stage.widen is not None:
                total += voxels * stage.widen.weight.shape[0]
        for block in self.vit.blocks:
            total += voxels * (
                block.attn.qkv.out_features + block.mlp.fc1.out_features + 2 * block.mlp.fc2.out_features
            )
        return total
