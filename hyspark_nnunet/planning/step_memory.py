"""Memory of a training step as a function of patch and batch: a straight line through two estimates.

Activations are proportional to the voxels of a batch, weights are constant. So two estimates of a network (``memory``)
give the memory of every other patch and batch with the same strides and kernels; a planner tries dozens of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from hyspark_nnunet.architectures.from_plans import pretraining_network, segmentation_network
from hyspark_nnunet.architectures.masked_autoencoder import MaskedAutoencoder
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.memory.step_bytes import pretraining_bytes, segmentation_bytes

PROBED_VOXELS = 2**20


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step.

    Args:
        fixed: of weights, gradients and moments.
        per_voxel: of a voxel of a patch.
    """

    fixed: float
    per_voxel: float

    def bytes_of(self, patch_size: Sequence[int], batch_size: int) -> float:
        """Peak memory of a step."""
        return self.fixed + self.per_voxel * prod(patch_size) * batch_size

    def batch_size_for(self, n_bytes: float, patch_size: Sequence[int]) -> int:
        """The largest batch that fits; may be 0."""
        return max(0, int((n_bytes - self.fixed) / (self.per_voxel * prod(patch_size))))


def pretraining_memory(configuration: dict[str, Any], input_channels: int, mixed_precision: bool = True) -> StepMemory:
    """Memory of HySparKPretrainTrainer on a plan's configuration."""
    manager = ConfigurationManager(configuration)
    recipe = resolve_recipe(PretrainRecipe, configuration.get("hyspark"), environment={})
    build = partial(pretraining_network, manager, input_channels, recipe.preset, recipe.decoder_width)
    return memory_of_pretraining(build, recipe, configuration["patch_size"], input_channels, mixed_precision)


def finetuning_memory(
    configuration: dict[str, Any], input_channels: int, num_classes: int, mixed_precision: bool = True
) -> StepMemory:
    """Memory of fine-tuning on a plan's configuration; nothing recomputed, as by nnU-Net's own trainer."""
    manager = ConfigurationManager(configuration)
    recipe = resolve_recipe(FinetuneRecipe, configuration.get("hyspark"), environment={})
    build = partial(segmentation_network, manager, input_channels, num_classes, recipe.preset)
    return memory_of_segmentation(build, configuration["patch_size"], input_channels, mixed_precision)


def memory_of_pretraining(
    build: Callable[[], MaskedAutoencoder],
    recipe: PretrainRecipe,
    patch_size: Sequence[int],
    input_channels: int,
    mixed_precision: bool,
) -> StepMemory:
    """Memory of pre-training the network that ``build`` makes."""
    patch_size = [int(n) for n in patch_size]

    def peak(batch_size: int) -> int:
        how = recipe.mask_ratio, recipe.activation_checkpointing, mixed_precision
        return pretraining_bytes(build, batch_size, input_channels, patch_size, *how)

    return line_through(peak, patch_size)


def memory_of_segmentation(
    build: Callable[[], nn.Module], patch_size: Sequence[int], input_channels: int, mixed_precision: bool
) -> StepMemory:
    """Memory of training the segmentation network that ``build`` makes."""
    patch_size = [int(n) for n in patch_size]

    def peak(batch_size: int) -> int:
        return segmentation_bytes(build, batch_size, input_channels, patch_size, mixed_precision)

    return line_through(peak, patch_size)


def line_through(peak: Callable[[int], int], patch_size: Sequence[int]) -> StepMemory:
    """The line through the peaks of a batch and of one twice as large."""
    # with fewer voxels, weights and gradients decide the peak
    batch_size = max(2, ceil(PROBED_VOXELS / prod(patch_size)))
    smaller, larger = peak(batch_size), peak(2 * batch_size)
    return StepMemory(fixed=2 * smaller - larger, per_voxel=(larger - smaller) / (batch_size * prod(patch_size)))
