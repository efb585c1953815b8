"""Plan-shaped arguments that both networks share: their form, and checks of them."""

from collections.abc import Sequence

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch.nn.modules.conv import _ConvNd


def check_dimensions(
    conv_op: type[_ConvNd], kernel_sizes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> None:
    """Kernels and strides have as many axes as the convolution.

    Raises:
        ValueError: they have not; names the value.
    """
    dims = convert_conv_op_to_dim(conv_op)
    for name, values in {"kernel_sizes": kernel_sizes, "strides": strides}.items():
        for stage, value in enumerate(values):
            if len(value) != dims:
                raise ValueError(f"{name}[{stage}] is {tuple(value)}, but {conv_op.__name__} has {dims} axes")


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A stride or kernel size per axis: nnU-Net's plans give one number for all axes or one per axis."""
    return (value,) * dims if isinstance(value, int) else tuple(value)
