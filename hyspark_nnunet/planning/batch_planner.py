"""What the planners share: batch sizes that fit the memory of a GPU."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.planning.step_memory import StepMemory
from hyspark_nnunet.training.memory.step_bytes import CUDA_RESERVE, GIB

MIN_BATCH_SIZE = 2
PRETRAINING, FINETUNING = "pre-training", "fine-tuning"


class BatchPlanner(ExperimentPlanner):
    """Batch sizes of pre-training and fine-tuning: as large as fits, and at most 5 % of the dataset's voxels.

    Args:
        dataset_name_or_id: of the dataset; its fingerprint must be there.
        gpu_memory_target_in_gb: memory of the GPU.
        more: further arguments of nnU-Net's planner.

    Attributes:
        section_name: of a configuration; the batch size of pre-training is written into it.
        network_words: names the network in messages.
    """

    section_name: ClassVar[str] = "hyspark"
    network_words: str

    def __init__(self, dataset_name_or_id: str | int, gpu_memory_target_in_gb: float, *more: Any) -> None:
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, *more)
        self.memory_target = gpu_memory_target_in_gb
        self.plans_folder = Path(str(nnUNet_preprocessed)) / self.dataset_name
        self.available_bytes = gpu_memory_target_in_gb * GIB - CUDA_RESERVE
        self._memory: dict[tuple[str, str], StepMemory] = {}
        self._first: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def estimate_memory(self, kind: str, configuration: dict[str, Any]) -> StepMemory:
        """Memory of PRETRAINING or FINETUNING on a resolved configuration."""

    def section_of_new_plans(self) -> dict[str, Any]:
        """What the section of a configuration says, beside the batch size."""
        return {}

    def memory(self, configuration: dict[str, Any]) -> tuple[StepMemory, StepMemory]:
        """Of pre-training and of fine-tuning."""
        return self.memory_of(PRETRAINING, configuration), self.memory_of(FINETUNING, configuration)

    def memory_of(self, kind: str, configuration: dict[str, Any]) -> StepMemory:
        """Of one of them; estimated once per topology, on the first patch that was asked for."""
        topology = str(configuration["architecture"])
        key = kind, topology
        if key not in self._memory:
            # a copy, because nnU-Net changes its list
            copied = {**configuration, "patch_size": list(configuration["patch_size"])}
            configuration = self._first.setdefault(topology, copied)
            patch, stages = configuration["patch_size"], configuration["architecture"]["arch_kwargs"]["n_stages"]
            print(
                f"Estimating the memory of a step of {kind}: {self.network_words}, {stages} stages, patches of "
                f"{' x '.join(map(str, patch))} voxels and smaller",
                flush=True,
            )
            self._memory[key] = self.estimate_memory(kind, configuration)
        return self._memory[key]

    def with_batch_sizes(self, configuration: dict[str, Any], n_voxels_dataset: float) -> dict[str, Any]:
        """A configuration with the batch sizes of both trainers; nnU-Net's own takes that of fine-tuning."""
        patch_size = configuration["patch_size"]
        sizes = [self.batch_size(memory, patch_size, n_voxels_dataset) for memory in self.memory(configuration)]
        section = self.with_pretraining_batch(configuration.get(self.section_name) or {}, sizes[0])
        return {**configuration, "batch_size": sizes[1], self.section_name: section}

    def batch_size(self, memory: StepMemory, patch_size: Sequence[int], n_voxels_dataset: float) -> int:
        """The batch of a training."""
        covered = round(n_voxels_dataset * self.max_dataset_covered / float(np.prod(patch_size, dtype=np.float64)))
        return max(min(memory.batch_size_for(self.available_bytes, patch_size), covered), MIN_BATCH_SIZE)

    @staticmethod
    def with_pretraining_batch(section: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """A configuration's section with the batch size of pre-training."""
        return {**section, "pretrain": {**section.get("pretrain", {}), "batch_size": batch_size}}

    def n_voxels(self, configuration: dict[str, Any], forward: Sequence[int]) -> float:
        """Voxels of all images of the dataset; in 2d every slice is an image.

        Args:
            configuration: with the median image size.
            forward: order of the axes in the plans.
        """
        shape = configuration["median_image_size_in_voxels"]
        slices = 1.0
        if len(shape) == 2:
            slices = float(np.median([whole[forward[0]] for whole in self.dataset_fingerprint["shapes_after_crop"]]))
        return float(np.prod(shape)) * slices * self.dataset_json["numTraining"]

    def n_channels(self) -> int:
        """Channels of the dataset's images."""
        # nnU-Net reads the old name, too
        return len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])

    def describe_memory(self, plans: dict[str, Any]) -> str:
        """A line per configuration: patch, batch sizes, and the memory they are estimated to take."""
        lines = [f"Batches for {self.network_words}, {gpu_in_words(self.memory_target)}:"]
        for name, own in plans["configurations"].items():
            of_pretraining = (own.get(self.section_name) or {}).get("pretrain", {}).get("batch_size")
            if of_pretraining is None:  # not planned here: inherited, or somebody's own
                continue
            configuration = PlansManager(plans).get_configuration(name).configuration
            patch, batches = configuration["patch_size"], (of_pretraining, configuration["batch_size"])
            both = zip((PRETRAINING, FINETUNING), self.memory(configuration), batches, strict=True)
            taken = [f"{what} {in_words(memory, patch, batch)}" for what, memory, batch in both]
            lines.append(f"  {name}: patch {' x '.join(map(str, patch))}; {'; '.join(taken)}")
        return "\n".join(lines)


def gpu_in_words(memory_target: float) -> str:
    """The GPU, of so many GB, that batches are for, and what it holds beside a step."""
    return f"for a GPU of {memory_target:g} GB ({CUDA_RESERVE / GIB:g} GB of each number below is CUDA's own)"


def in_words(memory: StepMemory, patch_size: Sequence[int], batch_size: int) -> str:
    """A batch and the memory of the GPU that a step of it takes."""
    return f"{batch_size} patches, {(memory.bytes_of(patch_size, batch_size) + CUDA_RESERVE) / GIB:.1f} GB"
