"""The MedNeXt block of the encoder and of the segmentation decoder, and the convolution that knows its layout."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.building_blocks.layouts import DenseLayout
from hyspark_nnunet.building_blocks.recomputation import Recomputing


def convolution_class(dims: int, transposed: bool = False) -> type[nn.Module]:
    """nn.Conv2d, nn.Conv3d or their transposed forms, by number of axes.

    Raises:
        ValueError: another number of axes.
    """
    classes = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    if dims not in classes:
        raise ValueError(f"images with {dims} axes are not supported: HySparK takes 2 or 3")
    return classes[dims][transposed]


class LayoutConvolution(Recomputing):
    """A convolution of stride 1 that keeps the size, on a field of any layout.

    Args:
        in_channels: channels of the input field.
        out_channels: channels of the output field.
        kernel_size: odd, per axis.
        groups: as in nn.Conv3d.

    Attributes:
        channels_first: compute it on a channels-first copy; see ``choose_memory_formats``.
    """

    channels_first: bool = False

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Sequence[int], groups: int = 1) -> None:
        super().__init__()
        if any(k % 2 == 0 for k in kernel_size):
            raise ValueError(f"kernel size {tuple(kernel_size)} is even on an axis; HySparK needs odd kernels (1 or 3)")
        self.groups = groups
        # parameters with the names and initial values of torch's own class
        reference = convolution_class(len(kernel_size))(in_channels, out_channels, tuple(kernel_size), groups=groups)
        self.weight, self.bias = reference.weight, reference.bias

    def forward(self, field: Tensor, layout: DenseLayout) -> Tensor:
        """Field (N, *spatial, C_in) to (N, *spatial, C_out)."""
        layout.prepare(self.weight.shape[2:])  # once, not again in the recomputation
        return self.light(partial(self.compute, layout, self.channels_first), field)

    def compute(self, layout: DenseLayout, channels_first: bool, field: Tensor) -> Tensor:
        """The convolution in one of the two memory formats; the result is the same."""
        return layout.convolve(field, self.weight, self.bias, self.groups, channels_first=channels_first)


class MedNeXtBlock(Recomputing):
    """Depth-wise convolution, LayerNorm, expansion, GELU, projection, residual.

    Source: MedNeXt (arXiv 2303.09975), as HySparK's release uses it: with LayerNorm over channels instead of GroupNorm.

    Args:
        channels: of input and output.
        expansion: width of the hidden layer in multiples of ``channels``.
        kernel_size: odd, per axis.
    """

    def __init__(self, channels: int, expansion: int, kernel_size: Sequence[int]) -> None:
        super().__init__()
        self.conv = LayoutConvolution(channels, channels, kernel_size, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, expansion * channels)
        self.project = nn.Linear(expansion * channels, channels)

    def forward(self, field: Tensor, layout: DenseLayout) -> Tensor:
        """Field (N, *spatial, C) to the same shape."""
        return self.full(lambda f: self._forward(f, layout), field)

    def _forward(self, field: Tensor, layout: DenseLayout) -> Tensor:
        expanded = self.expand(self.norm(self.conv(field, layout)))
        return field + self.light(lambda e: self.project(F.gelu(e)), expanded)
