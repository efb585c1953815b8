"""The encoder that nnU-Net builds from a plan, on visible blocks."""

from functools import partial

from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import DenseLayout, Feature, visible_blocks
from hyspark_nnunet.building_blocks.plan_blocks import PlanBlocks, check_blocks, convolutions_of, finished, prepare
from hyspark_nnunet.masking import unit_size


class PlanEncoder(PlanBlocks):
    """PlainConvEncoder or ResidualEncoder of dynamic-network-architectures, with its own modules and parameter names.

    ``encoder(image)`` is nnU-Net's own forward pass, ``encoder(image, visible)`` that of masked pre-training: dense
    convolutions with the mask applied after each of them, and norms over the visible voxels. All stages are taken.
    Source: SparK (arXiv 2301.03580).

    Args:
        encoder: whose modules are used, not copied.

    Attributes:
        strides: of the stages, per axis.
        kernel_sizes: of the stages, per axis.
        unit: voxels of a mask unit per axis.
        output_channels: channels of the features, fine to coarse.

    Raises:
        ValueError: a module or a geometry that cannot be run on visible blocks; names it.
    """

    def __init__(self, encoder: PlainConvEncoder | ResidualEncoder) -> None:
        super().__init__()
        self.stem = getattr(encoder, "stem", None)
        self.stages = encoder.stages
        for name in ("stem", "stages"):
            if (part := getattr(self, name)) is not None:
                check_blocks(part, f"encoder.{name}")
        dims = len(encoder.strides[0])
        self.strides = [tuple(int(s) for s in stride) for stride in encoder.strides]
        self.kernel_sizes = [(k,) * dims if isinstance(k, int) else tuple(k) for k in encoder.kernel_sizes]
        self.unit = unit_size(self.strides)
        self.output_channels = list(encoder.output_channels)
        self._check_geometry()

    def _check_geometry(self) -> None:
        if any(s != 1 for s in self.strides[0]):
            raise ValueError(
                f"the first stage's stride is {self.strides[0]}, but the decoder rebuilds the image at this stage's "
                "resolution: set the first of 'strides' in the plan to 1"
            )
        block = list(self.unit)
        for index, (kernel, stride) in enumerate(zip(self.kernel_sizes, self.strides, strict=True)):
            block = [b // s for b, s in zip(block, stride, strict=True)]
            if any(k // 2 > b for k, b in zip(kernel, block, strict=True)):
                raise ValueError(
                    f"stage {index} has kernels of {kernel} voxels where a mask unit is {tuple(block)} voxels wide: "
                    "a convolution would look beyond the neighbouring units. Set its 'kernel_sizes' in the plan to 3"
                )

    def forward(self, image: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """The features, fine to coarse.

        Args:
            image: (B, C, *spatial).
            visible: BoolTensor (B, 1, *grid), True = kept, equally many per sample; None: nnU-Net's own forward pass.

        Returns:
            features (B, output_channels[i], *spatial_i), zero at hidden positions.

        Raises:
            ValueError: with a mask: the image is not a whole number of mask units, or the mask does not fit it.
        """
        if visible is not None:
            return [feature.image() for feature in self.features(image, visible)]
        features, field = [], image if self.stem is None else self.stem(image)
        for stage in self.stages:
            field = stage(field)
            features.append(field)
        return features

    def features(self, image: Tensor, visible: Tensor, num_visible: int | None = None) -> list[Feature]:
        """The features of the visible units, fine to coarse.

        Args:
            image: as in ``forward``.
            visible: as in ``forward``.
            num_visible: visible units of each sample, where known: then nothing waits for the device.

        Raises:
            ValueError: see ``forward``.
        """
        layout: DenseLayout = visible_blocks(image, visible, self.unit, num_visible)
        field = layout.enter(image)
        if self.stem is not None:
            field = self._stack(self.stem, field, layout)
        features = []
        for stage, stride in zip(self.stages, self.strides, strict=True):
            field, layout = self._stage(stage, field, layout), layout.coarser(stride)
            features.append(Feature(field, layout))
        return features

    def _stage(self, stage: nn.Module, field: Tensor, layout: DenseLayout) -> Tensor:
        if isinstance(stage, nn.Sequential):
            for part in stage:
                field, layout = self._stage(part, field, layout), layout.coarser(part.initial_stride)
            return field
        if isinstance(stage, StackedConvBlocks):
            return self._stack(stage, field, layout)
        for block in stage.blocks:
            prepare(convolutions_of(block), layout)
            field = self.full(partial(self.residual, block, layout=layout), field)
            layout = layout.coarser(block.stride)
        return field

    def _stack(self, stack: StackedConvBlocks, field: Tensor, layout: DenseLayout) -> Tensor:
        prepare(stack.convs, layout)
        return self.full(lambda f: self.finish(self.convolve_in_turn(stack.convs, finished(f), layout)), field)
