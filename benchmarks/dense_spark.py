"""The dense baseline (with masking) for nnU-Net's own networks.

The modules that nnU-Net builds, over the whole volume, with the mask applied after each convolution and norms over the
visible voxels; the decoder by its own forward pass. The weights are those of a ``SparKMaskedAutoencoder``. It shares no
computation with the package. Tests and benchmarks compare with it.
"""

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.building_blocks.plan_encoder import PlanEncoder
from hyspark_nnunet.masking import view_at


class MaskedModules:
    """Runs nnU-Net's modules under a mask.

    Args:
        visible: BoolTensor (B, 1, *grid), True = kept.
    """

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def mask(self, image: Tensor) -> Tensor:
        """The mask at the resolution of an image (B, C, *spatial), in its type."""
        spatial = tuple(image.shape[2:])
        if spatial not in self._masks:
            block = [n // g for n, g in zip(spatial, self.visible.shape[2:], strict=True)]
            self._masks[spatial] = view_at(self.visible, block).to(image.dtype)
        return self._masks[spatial]

    def run(self, module: nn.Module, image: Tensor) -> Tensor:
        """A module on an image that is zero where hidden; so is the result."""
        if isinstance(module, BasicBlockD | BottleneckD):
            return self._residual(module, image)
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.AvgPool2d | nn.AvgPool3d):
            image = module(image)
            return image * self.mask(image)
        if isinstance(module, _InstanceNorm | _BatchNorm):
            return self._normalise(module, image)
        parts = {
            nn.Sequential: lambda m: m,
            StackedConvBlocks: lambda m: m.convs,
            StackedResidualBlocks: lambda m: m.blocks,
            ConvDropoutNormReLU: lambda m: m.all_modules,
        }.get(type(module))
        if parts is None:
            return module(image)  # point-wise, and zero stays zero
        for part in parts(module):
            image = self.run(part, image)
        return image

    def _residual(self, block: BasicBlockD | BottleneckD, image: Tensor) -> Tensor:
        skip = self.run(block.skip, image) if isinstance(block.skip, nn.Sequential) else image
        for name in ("conv1", "conv2", "conv3"):
            if hasattr(block, name):
                image = self.run(getattr(block, name), image)
        nonlinearity = block.nonlin3 if isinstance(block, BottleneckD) else block.nonlin2
        return nonlinearity(image + skip)

    def _normalise(self, norm: _InstanceNorm | _BatchNorm, image: Tensor) -> Tensor:
        mask = self.mask(image)
        axes = list(range(2, image.ndim)) if isinstance(norm, _InstanceNorm) else [0, *range(2, image.ndim)]
        count = mask.sum(axes, keepdim=True)
        mean = image.sum(axes, keepdim=True) / count
        centred = (image - mean) * mask
        variance = centred.square().sum(axes, keepdim=True) / count
        shape = [1, -1] + [1] * (image.ndim - 2)
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            with torch.no_grad():
                unbiased = variance * count / (count - 1)
                norm.running_mean.lerp_(mean.flatten(), norm.momentum)
                norm.running_var.lerp_(unbiased.flatten(), norm.momentum)
                norm.num_batches_tracked += 1
        scale = torch.rsqrt(variance + norm.eps) * norm.weight.view(shape)
        return (centred * scale + norm.bias.view(shape)) * mask


def dense_features(encoder: PlanEncoder, image: Tensor, visible: Tensor) -> list[Tensor]:
    """Features (B, C, *spatial), fine to coarse, zero where hidden."""
    modules = MaskedModules(visible)
    field = image * modules.mask(image)
    if encoder.stem is not None:
        field = modules.run(encoder.stem, field)
    found = []
    for stage in encoder.stages:
        field = modules.run(stage, field)
        found.append(field)
    return found


class DenseSparK(nn.Module):
    """A masked autoencoder around nnU-Net's network, computed densely.

    Args:
        network: with nnU-Net's decoder; its weights are used, not copied.
    """

    def __init__(self, network: SparKMaskedAutoencoder) -> None:
        super().__init__()
        self.network = network

    def features(self, image: Tensor, visible: Tensor | None) -> list[Tensor]:
        """See ``dense_features``; without a mask, nnU-Net's own forward pass."""
        if visible is None:
            return self.network.encoder(image)
        return dense_features(self.network.encoder, image, visible)

    def forward(self, image: Tensor, visible: Tensor | None) -> Tensor:
        """The reconstruction (B, C, *spatial); without a mask, from the features as they are."""
        skips = self.features(image, visible)[::-1]
        densify, decoder = self.network.densify, self.network.decoder
        if visible is not None:
            parts = zip(skips, densify.mask_tokens, densify.projections, strict=True)
            skips = [projection(_fill(feature, token, visible)) for feature, token, projection in parts]
        running = skips[0]
        for up, stage, skip in zip(decoder.transpconvs, decoder.stages, skips[1:], strict=True):
            running = stage(torch.cat([up(running), skip], dim=1))
        return decoder.head(running)


def _fill(feature: Tensor, token: Tensor, visible: Tensor) -> Tensor:
    block = [n // g for n, g in zip(feature.shape[2:], visible.shape[2:], strict=True)]
    return torch.where(view_at(visible, block), feature, token)
