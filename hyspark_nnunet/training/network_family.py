"""What the trainers need to know about a family of networks; everything else of a training is the same for all."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe, Recipe
from hyspark_nnunet.training.resuming import NETWORK_FIELDS


class NetworkFamily(ABC):
    """Networks that follow from a plan and a recipe: one for pre-training, one for segmentation, with one encoder.

    Both networks have their encoder as ``encoder``. The layers of the encoder, for layer decay, are found by the names
    of its parameters (``optimization.layer_of``).

    Attributes:
        section_name: of a plan's configuration, where a training notes what its network is built from.
        section_words: names what ``section`` reads, in messages.
    """

    section_name: ClassVar[str] = "hyspark"
    section_words: ClassVar[str] = 'section "hyspark"'

    def section(self, configuration: Mapping[str, Any]) -> Mapping[str, Any]:
        """The recipe's fields that a plan's configuration sets (``recipe.sources``)."""
        return configuration.get("hyspark") or {}

    @abstractmethod
    def without_meaning(self, recipe: Recipe) -> Mapping[str, str]:
        """Fields of the recipe that these networks do not use, each with the reason; setting one is refused."""

    def network_fields(self, recipe: Recipe) -> dict[str, Any]:
        """The values of a recipe that a network is built from."""
        unused = self.without_meaning(recipe)
        return {k: v for k, v in recipe.as_dict().items() if k in NETWORK_FIELDS and k not in unused}

    @abstractmethod
    def check(self, configuration: ConfigurationManager, recipe: Recipe) -> None:
        """Refuses what this family cannot build, before anything is written.

        Raises:
            ValueError: names the value and what to do.
        """

    @abstractmethod
    def strides(self, configuration: ConfigurationManager, recipe: Recipe) -> Sequence[Sequence[int]]:
        """Strides of the encoder's stages, per axis; the mask unit is their product.

        Raises:
            ValueError: no encoder can be built for the plan.
        """

    @abstractmethod
    def masked_autoencoder(
        self, configuration: ConfigurationManager, recipe: PretrainRecipe, input_channels: int
    ) -> nn.Module:
        """The network of pre-training.

        Returns:
            a module that takes an image (B, C, *spatial), visible (B, 1, *grid) and the number of visible units, and
            returns a reconstruction (B, C, *spatial).
        """

    @abstractmethod
    def segmentation_network(
        self,
        configuration: ConfigurationManager,
        recipe: FinetuneRecipe,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool,
    ) -> nn.Module:
        """The network of fine-tuning and prediction.

        Returns:
            a module like nnU-Net's, with ``decoder.deep_supervision`` and ``decoder.seg_layers``, the coarsest first.
        """

    @abstractmethod
    def describe(
        self,
        configuration: ConfigurationManager,
        dataset_json: dict[str, Any],
        recipe: Recipe,
        input_channels: int,
        with_heads: bool,
        names: dict[str, str],
    ) -> dict[str, Any]:
        """What a checkpoint says about its network, for people and for messages.

        Args:
            configuration: of the plan.
            dataset_json: of the dataset.
            recipe: of the training.
            input_channels: of the network.
            with_heads: the network ends in heads for the dataset's labels.
            names: further entries, such as the dataset's name.
        """
