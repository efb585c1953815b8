"""From visible features to dense skips."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hyspark_nnunet.building_blocks.layouts import Feature, VisibleBlocksLayout, to_channels_first
from hyspark_nnunet.building_blocks.mednext import convolution_class
from hyspark_nnunet.building_blocks.recomputation import Recomputing


class Densify(Recomputing):
    """Fills the hidden positions of each skip with a learned token, then projects it to the decoder's channels.

    The projection is a 1^3 convolution at the coarsest scale (none if the channels agree) and a convolution with the
    stage's kernel at the finer scales. Source: SparK (arXiv 2301.03580), section 3.3.

    Args:
        channels: of the features, coarse to fine.
        out_channels: of the skips, coarse to fine.
        kernel_sizes: of the stages, coarse to fine.
        identity: the finer projections begin as the identity; they must keep the channels then.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        identity: bool = False,
    ) -> None:
        super().__init__()
        dims = len(kernel_sizes[0])
        convolution = convolution_class(dims)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, c, *[1] * dims) for c in channels)
        self.projections = nn.ModuleList()
        for k, (c, out, kernel) in enumerate(zip(channels, out_channels, kernel_sizes, strict=True)):
            if k == 0:
                self.projections.append(nn.Identity() if c == out else convolution(c, out, 1))
                continue
            projection = convolution(c, out, tuple(kernel), padding=[n // 2 for n in kernel])
            if identity:
                nn.init.dirac_(cast(Tensor, projection.weight))
                nn.init.zeros_(cast(Tensor, projection.bias))
            self.projections.append(projection)
        for token in self.mask_tokens:
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, features: Sequence[Feature]) -> list[Tensor]:
        """Dense skips (B, out_channels[k], *spatial_k) of features of visible blocks, both coarse to fine."""
        skips = []
        for feature, token, projection in zip(features, self.mask_tokens, self.projections, strict=True):
            layout = cast(VisibleBlocksLayout, feature.layout)
            skips.append(self.light(partial(_fill_and_project, layout, projection), feature.field, token))
        return skips


def _fill_and_project(layout: VisibleBlocksLayout, projection: nn.Module, field: Tensor, token: Tensor) -> Tensor:
    return projection(to_channels_first(layout.scatter(field, token.flatten())))
