"""Batches of SparK's pre-training, for plans that exist: nnU-Net sizes theirs for dense training."""

import inspect
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.planning.batch_planner import PRETRAINING, BatchPlanner, gpu_in_words, in_words
from hyspark_nnunet.planning.step_memory import StepMemory, memory_of_pretraining, memory_of_segmentation
from hyspark_nnunet.recipe.recipe import FinetuneRecipe, PretrainRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.spark import SparKFamily

FAMILY = SparKFamily()


def spark_pretraining_memory(
    configuration: dict[str, Any], input_channels: int, mixed_precision: bool = True
) -> StepMemory:
    """Memory of SparKPretrainTrainer on a plan's configuration.

    Raises:
        ValueError: SparK cannot pre-train this network; says what to do.
    """
    manager = ConfigurationManager(configuration)
    recipe = resolve_recipe(PretrainRecipe, FAMILY.section(configuration), environment={})
    FAMILY.check(manager, recipe)
    build = partial(FAMILY.masked_autoencoder, manager, recipe, input_channels)
    return memory_of_pretraining(build, recipe, configuration["patch_size"], input_channels, mixed_precision)


def spark_finetuning_memory(
    configuration: dict[str, Any], input_channels: int, num_classes: int, mixed_precision: bool = True
) -> StepMemory:
    """Memory of SparKFinetuneTrainer, and so of nnU-Net's own trainer, on a plan's configuration."""
    manager = ConfigurationManager(configuration)
    recipe = resolve_recipe(FinetuneRecipe, FAMILY.section(configuration), environment={})
    build = partial(FAMILY.segmentation_network, manager, recipe, input_channels, num_classes, True)
    return memory_of_segmentation(build, configuration["patch_size"], input_channels, mixed_precision)


def memory_target_of(plans: dict[str, Any], given: float | None) -> float:
    """GB of the GPU that plans are for: as given, or the default of the planner that made them.

    Raises:
        ValueError: nothing was given, and nnU-Net does not know the planner.
    """
    if given is not None:
        return given
    # plans made by hand, moved or imported may name any planner
    planner = PlansManager(plans).experiment_planner_class if plans.get("experiment_planner_used") else None
    parameter = planner and inspect.signature(planner.__init__).parameters.get("gpu_memory_target_in_gb")
    if not parameter or not isinstance(parameter.default, (int, float)):
        raise ValueError(
            f"plans {plans['plans_name']} name the planner {plans.get('experiment_planner_used')}, whose memory target "
            "is not known: give the memory of your GPU by -gpu_memory_target GB"
        )
    return float(parameter.default)


class SparKPlanner(BatchPlanner):
    """Batches for the networks that nnU-Net's plans name.

    Args:
        dataset_name_or_id: of the dataset; its fingerprint must be there.
        gpu_memory_target_in_gb: memory of the GPU.
        preprocessor_name: of nnU-Net, for plans that are not copied from others.
        overwrite_target_spacing: of such plans, in mm.
    """

    section_name = FAMILY.section_name
    network_words = "nnU-Net's own network"

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float,
        preprocessor_name: str = "DefaultPreprocessor",
        overwrite_target_spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            "",  # no plans of its own
            overwrite_target_spacing,
        )

    def estimate_memory(self, kind: str, configuration: dict[str, Any]) -> StepMemory:
        if kind == PRETRAINING:
            return spark_pretraining_memory(configuration, self.n_channels())
        return spark_finetuning_memory(configuration, self.n_channels(), len(self.dataset_json["labels"]))

    def add_pretraining_batches(self, plans: dict[str, Any]) -> str:
        """Writes the batch of pre-training into plans of this dataset, and changes nothing else in them.

        A configuration that inherits patch and network from another inherits the batch, too.

        Args:
            plans: as their file has them.

        Returns:
            a line per configuration, for people.

        Raises:
            ValueError: SparK can pre-train none of the configurations.
        """
        lines, refused = [], []
        for name, own in plans["configurations"].items():
            if "inherits_from" in own and not {"patch_size", "architecture"} & set(own):
                continue
            configuration = PlansManager(plans).get_configuration(name).configuration
            patch = configuration["patch_size"]
            print(f"Estimating the memory of a training step: {name}", flush=True)
            try:
                memory = spark_pretraining_memory(configuration, self.n_channels())
            except ValueError as error:
                refused.append(str(error))
                lines.append(f"  {name}: left as it is: {error}")
                continue
            batch = self.batch_size(memory, patch, self.n_voxels(configuration, plans["transpose_forward"]))
            own[self.section_name] = self.with_pretraining_batch(own.get(self.section_name) or {}, batch)
            lines.append(f"  {name}: patch {' x '.join(map(str, patch))}; {in_words(memory, patch, batch)}")
        if len(refused) == len(lines):
            why = refused[0] if refused else "it has no configuration"
            raise ValueError(f"SparK can pre-train nothing of {plans['plans_name']}: {why}")
        with replacing(self.plans_folder / f"{plans['plans_name']}.json") as beside:
            beside.write_text(json.dumps(plans, indent=4), encoding="utf-8")
        heading = f"Batches of pre-training in {plans['plans_name']}, {gpu_in_words(self.memory_target)}:"
        return "\n".join([heading, *lines])
