"""nnU-Net's convolution blocks, run on a layout instead of by their own forward pass.

The blocks are those of dynamic-network-architectures (``building_blocks/simple_conv_blocks.py`` and ``residual.py``).
Nothing is copied or patched: their parameters are used, and their point-wise modules are called.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hyspark_nnunet.building_blocks.layouts import DenseLayout, to_channels_first, to_channels_last
from hyspark_nnunet.building_blocks.recomputation import Recomputing

CONTAINERS = (nn.Sequential, StackedConvBlocks, StackedResidualBlocks, ConvDropoutNormReLU, BasicBlockD, BottleneckD)
# these act on each voxel and channel alone
POINTWISE = (nn.LeakyReLU, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Identity)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
AVERAGES = (nn.AvgPool2d, nn.AvgPool3d)


def check_blocks(part: nn.Module, name: str) -> None:
    """Refuses a part of nnU-Net's network with a module that ``PlanBlocks`` cannot run.

    Args:
        part: such as an encoder's stages.
        name: of the part, for the message.

    Raises:
        ValueError: names the module.
    """
    for path, module in part.named_modules(prefix=name):
        problem = _problem(module)
        if problem:
            raise ValueError(
                f"{path} of the plan's network is {problem}, which SparK cannot run on visible blocks: change the "
                "architecture in the plan, or pre-train HySparK's own network with -tr HySparKPretrainTrainer"
            )


def _problem(module: nn.Module) -> str | None:
    """What is wrong with a module, if anything."""
    if isinstance(module, CONVOLUTIONS):
        kernel = tuple(module.kernel_size)
        if any(k % 2 == 0 for k in kernel) or tuple(module.padding) != tuple(k // 2 for k in kernel):
            return f"a convolution with kernel {kernel} and padding {module.padding}"
        return None
    if isinstance(module, AVERAGES):
        return None if module.kernel_size == module.stride else f"an average pooling {module}"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "an InstanceNorm with running statistics"
    known = (*CONTAINERS, *POINTWISE, _InstanceNorm, _BatchNorm)
    return None if isinstance(module, known) else f"a {type(module).__name__}"


class Unfinished(NamedTuple):
    """Fields, and the function of them that is still to be computed.

    Norm and nonlinearity are left to the operation that follows, so that the backward pass can recompute them with it.
    """

    inputs: tuple[Tensor, ...]
    finish: Callable[..., Tensor]


def finished(field: Tensor) -> Unfinished:
    """A field for which nothing is left to be computed."""
    return Unfinished((field,), lambda field: field)


class PlanBlocks(Recomputing):
    """Runs nnU-Net's blocks on layouts; the base class of the modules that hold such blocks."""

    def finish(self, running: Unfinished) -> Tensor:
        """Computes what is left."""
        return self.light(running.finish, *running.inputs)

    def convolve(self, block: ConvDropoutNormReLU, before: Unfinished, layout: DenseLayout) -> Unfinished:
        """A convolution block; the result belongs to ``layout.coarser(block.stride)``."""
        conv, stride = block.conv, tuple(block.stride)

        def compute(*inputs: Tensor) -> Tensor:
            return layout.convolve(before.finish(*inputs), conv.weight, conv.bias, stride=stride)

        field = self.light(compute, *before.inputs)
        return Unfinished((field,), self.rest(block, layout.coarser(stride)))

    def rest(self, block: ConvDropoutNormReLU, layout: DenseLayout) -> Callable[[Tensor], Tensor]:
        """What follows a block's convolution: norm and nonlinearity, in the block's order."""
        return partial(_apply, [module for module in block.all_modules if module is not block.conv], layout)

    def convolve_in_turn(
        self, blocks: Iterable[ConvDropoutNormReLU], before: Unfinished, layout: DenseLayout
    ) -> Unfinished:
        """Convolution blocks, one after the other."""
        for block in blocks:
            before, layout = self.convolve(block, before, layout), layout.coarser(block.stride)
        return before

    def residual(self, block: BasicBlockD | BottleneckD, field: Tensor, layout: DenseLayout) -> Tensor:
        """A residual block; the result belongs to ``layout.coarser(block.stride)``."""
        main = self.convolve_in_turn(convolutions_of(block), finished(field), layout)
        skip, skip_layout = finished(field), layout
        for module in block.skip if isinstance(block.skip, nn.Sequential) else ():
            if isinstance(module, ConvDropoutNormReLU):
                skip = self.convolve(module, skip, skip_layout)
            else:
                skip = Unfinished(skip.inputs, partial(layout.average, stride=tuple(block.stride)))
                skip_layout = layout.coarser(block.stride)
        nonlinearity = block.nonlin3 if isinstance(block, BottleneckD) else block.nonlin2

        def add(field: Tensor, other: Tensor) -> Tensor:
            return nonlinearity(main.finish(field) + skip.finish(other))

        return self.light(add, *main.inputs, *skip.inputs)


def convolutions_of(block: BasicBlockD | BottleneckD) -> list[ConvDropoutNormReLU]:
    """The convolution blocks of a residual block, without those of its skip."""
    return [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]


def prepare(blocks: Iterable[ConvDropoutNormReLU], layout: DenseLayout) -> None:
    """Computes what the layouts need for convolution blocks in a row, before parts of them are recomputed."""
    for block in blocks:
        layout.prepare(block.conv.kernel_size, block.stride)
        layout = layout.coarser(block.stride)


def _apply(modules: Iterable[nn.Module], layout: DenseLayout, field: Tensor) -> Tensor:
    """Norms and point-wise modules, in their order."""
    for index, module in enumerate(modules):
        if isinstance(module, _InstanceNorm):
            field = layout.normalise(field, module.weight, module.bias, module.eps)
        elif isinstance(module, _BatchNorm):
            field = to_channels_last(module(to_channels_first(field)))
        elif index == 0 and getattr(module, "inplace", False):
            field = module(field.clone())  # a recomputation begins with this field again
        else:
            field = module(field)
    return field
