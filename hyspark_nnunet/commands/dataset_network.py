"""The network that a trainer would build for a preprocessed dataset."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from hyspark_nnunet.datasets.preprocessed import plans_in, preprocessed_folder
from hyspark_nnunet.recipe.recipe import Recipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.finetune import FinetuneTrainer
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.pretrain import PretrainTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer, SparKPretrainTrainer

TRAINERS: dict[str, type[PretrainTrainer] | type[FinetuneTrainer]] = {
    trainer.__name__: trainer
    for trainer in (HySparKPretrainTrainer, HySparKFinetuneTrainer, SparKPretrainTrainer, SparKFinetuneTrainer)
}


class DatasetNetwork(NamedTuple):
    """A network and its configuration."""

    network: nn.Module
    description: dict[str, Any]
    trainer: type[PretrainTrainer] | type[FinetuneTrainer]
    recipe: Recipe
    plans: dict[str, Any]
    dataset_json: dict[str, Any]


def plans_of_dataset(dataset: str, configuration: str, plans_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plans and the dataset.json of a preprocessed dataset.

    Args:
        dataset: number or name.
        configuration: that the plans must have.
        plans_name: name of the plans.

    Raises:
        FileNotFoundError: the dataset has no such plans.
        ValueError: the plans have no such configuration.
    """
    folder = preprocessed_folder(dataset)
    plans_file = folder / f"{plans_name}.json"
    if not plans_file.is_file():
        others = ", ".join(name for name, _ in plans_in(folder))
        raise FileNotFoundError(
            f"{plans_file} is missing: "
            + (f"choose other plans with -p ({others}), or plan the dataset" if others else "plan the dataset first")
            + f" (hyspark_nnunet plan_and_preprocess or nnUNetv2_plan_and_preprocess, -d {dataset} -c {configuration})"
        )
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if configuration not in plans["configurations"]:
        raise ValueError(
            f"{plans_file} has no configuration {configuration}: choose one of "
            f"{', '.join(plans['configurations'])} (-c)"
        )
    return plans, dataset_json


def network_of_dataset(
    dataset: str,
    configuration: str,
    plans_name: str,
    trainer: str,
    device: str = "cpu",
    sizes: dict[str, Any] | None = None,
) -> DatasetNetwork:
    """Builds the network that ``trainer`` would train on a dataset; writes nothing.

    Args:
        dataset: number or name.
        configuration: of the plans.
        plans_name: name of the plans.
        trainer: name of one of our trainers.
        device: "meta" for shapes without values.
        sizes: fields that replace those of the recipe, such as the preset.

    Raises:
        FileNotFoundError: the dataset has no such plans.
        ValueError: the plans have no such configuration, or the network cannot be built for it.
    """
    plans, dataset_json = plans_of_dataset(dataset, configuration, plans_name)
    trainer_class = TRAINERS[trainer]
    family = trainer_class.family
    section = dict(copy.deepcopy(family.section(PlansManager(plans).get_configuration(configuration).configuration)))
    # given sizes replace those of the plan, and of the environment, which otherwise counts as in a training
    if sizes:
        section[trainer_class.recipe_class.kind] = {**section.get(trainer_class.recipe_class.kind, {}), **sizes}
    environment: Mapping[str, str] = {} if sizes else os.environ
    recipe = resolve_recipe(trainer_class.recipe_class, section, environment, family.section_words)
    section[recipe.kind] = {**section.get(recipe.kind, {}), **family.network_fields(recipe)}
    plans["configurations"][configuration][family.section_name] = section
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    family.check(settings, recipe)
    input_channels = determine_num_input_channels(manager, settings, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    with torch.device(device):
        network = trainer_class.build_network_architecture(manager, settings, input_channels, heads, True)
    names = {"dataset": manager.dataset_name, "configuration": configuration, "plans": plans_name}
    description = family.describe(settings, dataset_json, recipe, input_channels, trainer_class.has_heads, names)
    return DatasetNetwork(network, description, trainer_class, recipe, plans, dataset_json)
