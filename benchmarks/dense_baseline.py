"""The dense baseline (with masking): how public codes of masked convolutional pre-training compute.

Dense channels-first convolutions over the whole volume, each multiplied by the mask; LayerNorm on the visible voxels,
gathered and scattered; the decoder layer by layer. The weights are those of the package's networks, so that results
and gradients can be compared. Tests and benchmarks compare with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.building_blocks.encoder import HybridEncoder
from hyspark_nnunet.building_blocks.layouts import CONVOLUTION, MAX_POOL
from hyspark_nnunet.building_blocks.mednext import LayoutConvolution, MedNeXtBlock, convolution_class
from hyspark_nnunet.building_blocks.transformer import VisionTransformer, sincos_positions
from hyspark_nnunet.masking import view_at


class DenseBaseline(nn.Module):
    """A HySparK masked autoencoder, computed densely.

    Args:
        network: whose weights are used, not copied.
        dropped_branch: also projects the finest feature, which the decoder does not use, as the public release does.
        num_visible: visible units of each sample, where known: then LayerNorm runs on all voxels and is masked, and
            tokens are gathered by an index. On a GPU, gathering by the mask makes the host wait and breaks the graph of
            torch.compile.
    """

    def __init__(
        self, network: HySparKMaskedAutoencoder, dropped_branch: bool = True, num_visible: int | None = None
    ) -> None:
        super().__init__()
        self.num_visible = num_visible
        self.network = network
        encoder = network.encoder
        finest_width = network.decoder.project.in_channels
        channels, kernel = encoder.output_channels[0], encoder.kernel_sizes[0]
        self.unused = (
            convolution_class(len(kernel))(channels, finest_width, kernel, padding=[k // 2 for k in kernel])
            if dropped_branch
            else None
        )
        self.unused_token = nn.Parameter(torch.zeros(1, channels, *[1] * len(kernel)))

    def features(self, image: Tensor, visible: Tensor) -> list[Tensor]:
        """See ``dense_features``."""
        return dense_features(self.network.encoder, image, visible, self.num_visible)

    def forward(self, image: Tensor, visible: Tensor) -> Tensor:
        """The reconstruction (B, C, *spatial)."""
        features = self.features(image, visible)
        densify, decoder = self.network.densify, self.network.decoder
        skips = []
        for feature, token, projection in zip(features[:0:-1], densify.mask_tokens, densify.projections, strict=True):
            skips.append(projection(_fill(feature, token, visible)))
        if self.unused is not None:
            self.unused(_fill(features[0], self.unused_token, visible))
        running = skips[0]
        for level, skip in zip(decoder.levels, skips, strict=True):
            if level.fuse is not None:
                running = level.fuse(torch.cat([running, skip], dim=1))
            running = level.refine(level.upsample(running))
        return decoder.project(running)


def dense_features(
    encoder: HybridEncoder, image: Tensor, visible: Tensor, num_visible: int | None = None
) -> list[Tensor]:
    """Features (B, C, *spatial) of a hybrid encoder, fine to coarse, zero where hidden."""
    block = list(encoder.unit)
    mask = view_at(visible, block)
    field = _convolve(encoder.stem, image * mask, mask)
    found = []
    for stage, stride in zip(encoder.stages[:-1], encoder.strides[1:], strict=True):
        for layer in stage.blocks:
            field = _mednext(layer, field, mask, num_visible is not None)
        field = _convolve(stage.widen, field, mask)
        found.append(field)
        block = [b // s for b, s in zip(block, stride, strict=True)]
        mask = view_at(visible, block)
        field = MAX_POOL[len(stride)](field, list(stride)) * mask
    for layer in encoder.stages[-1].blocks:
        field = _mednext(layer, field, mask, num_visible is not None)
    return [*found, _transform(encoder.vit, field, visible, num_visible)]


def _transform(vit: VisionTransformer, field: Tensor, visible: Tensor, num_visible: int | None) -> Tensor:
    batch, channels, *grid = field.shape
    shown = visible.flatten(1)
    rows = field.flatten(2).transpose(1, 2)
    positions = sincos_positions(grid, channels, field.device).to(field.dtype).expand_as(rows)
    if num_visible is not None:
        index = shown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_visible, None]
        index = index.expand(-1, -1, channels)
        tokens = vit(rows.gather(1, index), positions.gather(1, index))
        result = torch.zeros_like(rows, dtype=tokens.dtype).scatter(1, index, tokens)
        return result.transpose(1, 2).reshape(field.shape)
    tokens = vit(rows[shown].view(batch, -1, channels), positions[shown].view(batch, -1, channels))
    result = torch.zeros_like(rows)
    result[shown] = tokens.flatten(0, 1)
    return result.transpose(1, 2).reshape(field.shape)


def _convolve(layer: LayoutConvolution, field: Tensor, mask: Tensor) -> Tensor:
    padding = [k // 2 for k in layer.weight.shape[2:]]
    return CONVOLUTION[len(padding)](field, layer.weight, layer.bias, padding=padding, groups=layer.groups) * mask


def _pointwise(layer: nn.Linear, field: Tensor, mask: Tensor) -> Tensor:
    dims = field.ndim - 2
    weight = layer.weight.view(*layer.weight.shape, *[1] * dims)
    return CONVOLUTION[dims](field, weight, layer.bias) * mask


def _normalise(layer: nn.LayerNorm, field: Tensor, mask: Tensor, everywhere: bool) -> Tensor:
    """LayerNorm of the visible voxels."""
    rows = field.movedim(1, -1)
    if everywhere:
        result = layer(rows) * mask.movedim(1, -1)
    else:
        shown = mask[:, 0]
        result = torch.zeros_like(rows)
        result[shown] = layer(rows[shown])
    channels_last = field.ndim == 5 and field.is_contiguous(memory_format=torch.channels_last_3d)
    return result.movedim(-1, 1).contiguous(
        memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format
    )


def _mednext(block: MedNeXtBlock, field: Tensor, mask: Tensor, everywhere: bool) -> Tensor:
    hidden = _normalise(block.norm, _convolve(block.conv, field, mask), mask, everywhere)
    return field + _pointwise(block.project, F.gelu(_pointwise(block.expand, hidden, mask)), mask)


def _fill(feature: Tensor, token: Tensor, visible: Tensor) -> Tensor:
    mask = view_at(visible, [n // g for n, g in zip(feature.shape[2:], visible.shape[2:], strict=True)])
    return torch.where(mask, feature, token)
