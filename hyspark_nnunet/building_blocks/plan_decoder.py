"""The decoder that nnU-Net builds from a plan, as the decoder of pre-training."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import DenseLayout, to_channels_first, to_channels_last
from hyspark_nnunet.building_blocks.mednext import convolution_class
from hyspark_nnunet.building_blocks.plan_blocks import PlanBlocks, Unfinished, check_blocks, finished


class PlanDecoder(PlanBlocks):
    """UNetDecoder's stages and transposed convolutions, with their own parameter names, and a head for the image.

    Its norms take their statistics over hidden and visible voxels alike. The segmentation heads are not taken along.

    Args:
        decoder: whose modules are used, not copied.
        out_channels: channels of the image.

    Raises:
        ValueError: a module that is not known; names it.
    """

    def __init__(self, decoder: UNetDecoder, out_channels: int) -> None:
        super().__init__()
        self.stages, self.transpconvs = decoder.stages, decoder.transpconvs
        for stage in self.stages:
            check_blocks(stage, "decoder.stages")
        convolution = convolution_class(self.transpconvs[0].weight.ndim - 2)
        self.head = convolution(self.stages[-1].output_channels, out_channels, 1)
        self.head.apply(InitWeights_He(1e-2))  # as nnU-Net initialises all others

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """Dense skips of all stages, coarse to fine, to the reconstruction (B, out_channels, *spatial)."""
        running = finished(to_channels_last(skips[0]))
        for up, stage, skip in zip(self.transpconvs, self.stages, skips[1:], strict=True):
            layout = DenseLayout(skip.shape[2:])
            level = partial(self._level, up, stage, layout, running.finish)
            field = self.full(level, *running.inputs, to_channels_last(skip))
            running = Unfinished((field,), self.rest(stage.convs[-1], layout))
        layout = DenseLayout(skips[-1].shape[2:])
        head = self.head
        return to_channels_first(
            self.light(lambda field: layout.convolve(running.finish(field), head.weight, head.bias), *running.inputs)
        )

    def _level(
        self,
        up: nn.Module,
        stage: StackedConvBlocks,
        layout: DenseLayout,
        finish_coarser: Callable[[Tensor], Tensor],
        coarser: Tensor,
        skip: Tensor,
    ) -> Tensor:
        """Up to the stage's last convolution; its norm and nonlinearity belong to the next level."""

        def join(coarser: Tensor, skip: Tensor) -> Tensor:
            upsampled = up(to_channels_first(finish_coarser(coarser)))
            return torch.cat([to_channels_last(upsampled), skip], dim=-1)

        (field,) = self.convolve_in_turn(stage.convs, Unfinished((coarser, skip), join), layout).inputs
        return field
