"""HySparK's networks and the two trainers that ``-tr`` names."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from hyspark_nnunet.architectures.from_plans import (
    check_preset,
    encoder_arguments,
    pretraining_network,
    segmentation_network,
)
from hyspark_nnunet.architectures.presets import decoder_width
from hyspark_nnunet.building_blocks.reconstruction_decoder import check_width
from hyspark_nnunet.checkpoints.description import describe_network
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe, Recipe
from hyspark_nnunet.training.finetune import FinetuneTrainer
from hyspark_nnunet.training.network_family import NetworkFamily
from hyspark_nnunet.training.pretrain import PretrainTrainer


class HySparKFamily(NetworkFamily):
    """The hybrid encoder with strides and kernels of the plan and the sizes of the recipe's preset.

    Source: HySparK (arXiv 2408.05815).
    """

    def without_meaning(self, recipe: Recipe) -> Mapping[str, str]:
        if isinstance(recipe, PretrainRecipe):
            return {"decoder": "only SparKPretrainTrainer has a choice of decoders"}
        return {}

    def check(self, configuration: ConfigurationManager, recipe: Recipe) -> None:
        check_preset(configuration, recipe.preset)
        n_stages = len(self.strides(configuration, recipe))
        if isinstance(recipe, PretrainRecipe):
            check_width(decoder_width(n_stages, recipe.preset, recipe.decoder_width), n_stages - 1)

    def strides(self, configuration: ConfigurationManager, recipe: Recipe) -> Sequence[Sequence[int]]:
        return encoder_arguments(configuration, recipe.preset)["strides"]

    def masked_autoencoder(
        self, configuration: ConfigurationManager, recipe: PretrainRecipe, input_channels: int
    ) -> nn.Module:
        return pretraining_network(configuration, input_channels, recipe.preset, recipe.decoder_width)

    def segmentation_network(
        self,
        configuration: ConfigurationManager,
        recipe: FinetuneRecipe,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
    ) -> nn.Module:
        return segmentation_network(configuration, input_channels, num_classes, recipe.preset, deep_supervision)

    def describe(
        self,
        configuration: ConfigurationManager,
        dataset_json: dict[str, Any],
        recipe: Recipe,
        input_channels: int,
        with_heads: bool,
        names: dict[str, str],
    ) -> dict[str, Any]:
        sizes = {"preset": recipe.preset, **encoder_arguments(configuration, recipe.preset)}
        del sizes["conv_op"]
        return describe_network(configuration, dataset_json, sizes, input_channels, with_heads, names)


class HySparKPretrainTrainer(PretrainTrainer):
    """Pre-trains HySparK's masked autoencoder."""

    family = HySparKFamily()


class HySparKFinetuneTrainer(FinetuneTrainer):
    """Fine-tunes HySparKUNet for segmentation, from ``-pretrained_weights`` or from random weights."""

    family = HySparKFamily()
