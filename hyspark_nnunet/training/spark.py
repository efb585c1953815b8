"""SparK's trainers: the network that nnU-Net builds from the plan, pre-trained and fine-tuned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from hyspark_nnunet.architectures.from_plans import OWN_ARCHITECTURE
from hyspark_nnunet.architectures.plan_arguments import per_axis
from hyspark_nnunet.architectures.spark import PLAN_DECODER, SparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.description import describe_network
from hyspark_nnunet.checkpoints.network_plan import by_configuration
from hyspark_nnunet.masking import mask_grid, num_visible_units, unit_size
from hyspark_nnunet.recipe.fields import variable_name
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe, Recipe
from hyspark_nnunet.training.finetune import FinetuneTrainer
from hyspark_nnunet.training.network_family import NetworkFamily
from hyspark_nnunet.training.pretrain import PretrainTrainer

ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")
# arguments of these networks that a checkpoint's description has, where the plan gives them
DESCRIBED = (
    "n_stages",
    "features_per_stage",
    "n_blocks_per_stage",
    "n_conv_per_stage",
    "n_conv_per_stage_decoder",
)


class SparKFamily(NetworkFamily):
    """nnU-Net's PlainConvUNet and ResidualEncoderUNet, with all sizes of the plan.

    A plan's section "spark" is for these networks alone; where both set a field, it overrides the section "hyspark".

    Source: SparK (arXiv 2301.03580).
    """

    section_name = "spark"
    section_words = 'section "hyspark" or "spark"'

    def section(self, configuration: Mapping[str, Any]) -> Mapping[str, Any]:
        shared, own = super().section(configuration), configuration.get(self.section_name) or {}
        if not isinstance(shared, Mapping) or not isinstance(own, Mapping):  # the recipe says what is wrong
            return own if isinstance(shared, Mapping) else shared
        merged = dict(shared)
        for name, value in own.items():
            both = isinstance(value, Mapping) and isinstance(shared.get(name), Mapping)
            merged[name] = {**shared[name], **value} if both else value
        return merged

    def without_meaning(self, recipe: Recipe) -> Mapping[str, str]:
        found = {"preset": "the plan says the sizes of nnU-Net's networks"}
        if isinstance(recipe, FinetuneRecipe):
            found["activation_checkpointing"] = (
                "fine-tuning trains nnU-Net's network as it is, which keeps its activations; "
                f"{variable_name('activation_checkpointing', 'pretrain')} sets it for pre-training alone"
            )
        elif isinstance(recipe, PretrainRecipe) and recipe.decoder == PLAN_DECODER:
            found["decoder_width"] = f"the plan says the widths of its own decoder (decoder {PLAN_DECODER})"
        return found

    def check(self, configuration: ConfigurationManager, recipe: Recipe) -> None:
        name = configuration.network_arch_class_name
        if name == OWN_ARCHITECTURE:
            raise ValueError(
                "the plan names HySparKUNet, which SparK's trainers do not train: use -tr HySparKPretrainTrainer and "
                "-tr HySparKFinetuneTrainer, or nnU-Net's own plans (-p nnUNetPlans, -p nnUNetResEncUNetLPlans)"
            )
        if name.rpartition(".")[2] not in ARCHITECTURES:
            raise ValueError(
                f"the plan names {name}, but SparK's trainers train {' and '.join(ARCHITECTURES)}: use plans with one "
                "of them (-p), or pre-train HySparK's network on this plan's patches with -tr HySparKPretrainTrainer"
            )
        strides = self.strides(configuration, recipe)
        if len(strides) < 2:
            raise ValueError(f"the plan has {len(strides)} stage, but SparK needs at least 2: choose other plans (-p)")
        if not isinstance(recipe, PretrainRecipe):
            return
        with torch.device("meta"):
            self.masked_autoencoder(configuration, recipe, 1)  # refuses modules that it cannot run
        grid = mask_grid(configuration.patch_size, unit_size(strides))
        # the last stage has a voxel per unit, and its norm needs more than one
        if (visible := num_visible_units(grid, recipe.mask_ratio)) < 2:
            raise ValueError(
                f"{visible} of {grid} mask units is visible at mask_ratio {recipe.mask_ratio}, but the norms of the "
                f"last stage, where a unit is one voxel, need at least 2: lower {variable_name('mask_ratio')} or use "
                "plans with a larger patch or fewer stages"
            )

    def strides(self, configuration: ConfigurationManager, recipe: Recipe) -> Sequence[Sequence[int]]:
        return _per_stage(configuration, "strides")

    def masked_autoencoder(
        self, configuration: ConfigurationManager, recipe: PretrainRecipe, input_channels: int
    ) -> nn.Module:
        network = _network(configuration, input_channels, 2)
        return SparKMaskedAutoencoder(network, input_channels, recipe.decoder, recipe.decoder_width)

    def segmentation_network(
        self,
        configuration: ConfigurationManager,
        recipe: FinetuneRecipe,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
    ) -> nn.Module:
        return _network(configuration, input_channels, num_classes, deep_supervision)

    def describe(
        self,
        configuration: ConfigurationManager,
        dataset_json: dict[str, Any],
        recipe: Recipe,
        input_channels: int,
        with_heads: bool,
        names: dict[str, str],
    ) -> dict[str, Any]:
        plan = configuration.network_arch_init_kwargs
        sizes = {
            "network": configuration.network_arch_class_name.rpartition(".")[2],
            **{name: plan[name] for name in DESCRIBED if name in plan},
            "kernel_sizes": _per_stage(configuration, "kernel_sizes"),
            "strides": _per_stage(configuration, "strides"),
            "spacing": configuration.spacing,
            **{name: (plan.get(name) or "").rpartition(".")[2] for name in ("norm_op", "nonlin")},
            **{name: _choices(plan.get(name)) for name in ("norm_op_kwargs", "nonlin_kwargs")},
        }
        return describe_network(configuration, dataset_json, sizes, input_channels, with_heads, names)


def _choices(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments that change what a layer computes."""
    return {name: value for name, value in (arguments or {}).items() if name != "inplace"}


def _per_stage(configuration: ConfigurationManager, name: str) -> list[tuple[int, ...]]:
    """Strides or kernel sizes of a plan's stages, per axis."""
    dims = len(configuration.patch_size)
    return [per_axis(value, dims) for value in configuration.network_arch_init_kwargs[name]]


def _network(
    configuration: ConfigurationManager, input_channels: int, num_classes: int, deep_supervision: bool = False
) -> Any:
    """The network as nnU-Net builds it, with nnU-Net's initialisation."""
    return by_configuration(configuration).build(input_channels, num_classes, deep_supervision)


class SparKPretrainTrainer(PretrainTrainer):
    """Pre-trains the encoder, and by default the decoder, of the network that the plan names."""

    family = SparKFamily()


class SparKFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes the network that the plan names, from ``-pretrained_weights`` or from random weights."""

    family = SparKFamily()
