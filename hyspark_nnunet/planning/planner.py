"""Plans for HySparK: nnU-Net's rules, with the memory of this network instead of a U-Net's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from hyspark_nnunet.architectures.from_plans import OWN_ARCHITECTURE, encoder_arguments
from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.planning.batch_planner import FINETUNING, MIN_BATCH_SIZE, PRETRAINING, BatchPlanner
from hyspark_nnunet.planning.fingerprint import note_sample
from hyspark_nnunet.planning.step_memory import StepMemory, finetuning_memory, pretraining_memory
from hyspark_nnunet.training.memory.step_bytes import GIB

# GB, as nnU-Net's residual encoders M, L and XL have them
MEMORY_TARGET = {"S": 8.0, "B": 24.0, "L": 40.0}
PLANS_NAME = {"S": "nnUNetHySparKSPlans", "B": "nnUNetHySparKPlans", "L": "nnUNetHySparKLPlans"}


class HySparKPlanner(BatchPlanner):
    """Plans that name HySparKUNet, with patch and batch sizes that fit its memory.

    Spacing, resampling, normalisation and the way a patch is chosen are nnU-Net's: the patch starts at the median image
    and shrinks until a batch of two fits. What has to fit is the larger of pre-training and fine-tuning, so that both
    have the same patch; each then gets a batch size of its own, as large as fits and at most 5 % of the dataset's
    voxels.

    Args:
        dataset_name_or_id: of the dataset; its fingerprint must be there.
        gpu_memory_target_in_gb: memory of the GPU; None: 8, 24 or 40 for preset S, B or L.
        preprocessor_name: of nnU-Net.
        plans_name: of the plans file; None: that of the preset.
        overwrite_target_spacing: of 3d_fullres, in mm.
        suppress_transpose: keep the order of the axes.
        preset: "S", "B" or "L".

    Raises:
        ValueError: there is no such preset, or nothing fits the target.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
        preset: str = "B",
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}, but it must be one of {', '.join(PRESETS)}")
        super().__init__(
            dataset_name_or_id,
            MEMORY_TARGET[preset] if gpu_memory_target_in_gb is None else gpu_memory_target_in_gb,
            preprocessor_name,
            PLANS_NAME[preset] if plans_name is None else plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.preset, self.network_words = preset, f"preset {preset}"
        # nnU-Net compares estimates with reference values; ours are bytes, and the reference is what is there
        self.UNet_vram_target_GB = self.available_bytes / GIB
        self.UNet_reference_val_2d = self.UNet_reference_val_3d = GIB
        self.UNet_reference_val_corresp_GB = 1
        self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = MIN_BATCH_SIZE
        self.UNet_min_batch_size = MIN_BATCH_SIZE

    def generate_data_identifier(self, configuration_name: str) -> str:
        """The preprocessed data of nnU-Net's own plans serve, where nothing about them was changed."""
        as_usual = self.overwrite_target_spacing is None and self.preprocessor_name == "DefaultPreprocessor"
        if as_usual and configuration_name in ("2d", "3d_fullres") and not self.suppress_transpose:
            return f"nnUNetPlans_{configuration_name}"
        return super().generate_data_identifier(configuration_name)

    def static_estimate_VRAM_usage(  # static in nnU-Net, which calls it on self
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """Bytes of a step of two patches: of pre-training or fine-tuning, whichever takes more.

        If fine-tuning takes more than there is, its bytes: the patch must shrink, whatever pre-training takes.

        Raises:
            ValueError: the patch has become too small for a network.
        """
        if len(arch_kwargs["strides"]) < 2 or min(patch_size) < 1:
            raise ValueError(
                f"no patch fits: the median image or the memory target of {self.memory_target:g} GB is too small for "
                f"preset {self.preset} (reached patch size {tuple(int(n) for n in patch_size)}); use a larger "
                "-gpu_memory_target" + ("" if self.preset == next(iter(PRESETS)) else " or a smaller -preset")
            )
        plain = {"architecture": _architecture(arch_class_name, arch_kwargs, arch_kwargs_req_import)}
        configuration = self.with_our_architecture({**plain, "patch_size": patch_size})
        n_bytes = self.memory_of(FINETUNING, configuration).bytes_of(patch_size, MIN_BATCH_SIZE)
        if n_bytes > self.available_bytes:  # too much already: nothing depends on pre-training
            return n_bytes
        return max(n_bytes, self.memory_of(PRETRAINING, configuration).bytes_of(patch_size, MIN_BATCH_SIZE))

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | Sequence[float],
        median_shape: np.ndarray | Sequence[int],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """nnU-Net's configuration with our architecture, batch sizes and a "hyspark" section."""
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        return self.with_batch_sizes(self.with_our_architecture(plan), approximate_n_voxels_dataset)

    def with_our_architecture(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """A configuration of a U-Net's strides and kernels as one of HySparKUNet."""
        arguments = encoder_arguments(ConfigurationManager(configuration), self.preset)
        conv_op = arguments["conv_op"]
        arguments["conv_op"] = f"{conv_op.__module__}.{conv_op.__name__}"
        return {
            **configuration,
            "architecture": _architecture(OWN_ARCHITECTURE, arguments, ["conv_op"]),
            self.section_name: self.section_of_new_plans(),
        }

    def section_of_new_plans(self) -> dict[str, Any]:
        return {"preset": self.preset}

    def estimate_memory(self, kind: str, configuration: dict[str, Any]) -> StepMemory:
        if kind == PRETRAINING:
            return pretraining_memory(configuration, self.n_channels())
        return finetuning_memory(configuration, self.n_channels(), len(self.dataset_json["labels"]))

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Saves as nnU-Net does, and prints the memory that the sizes were chosen for."""
        note_sample(plans, self.dataset_fingerprint)
        super().save_plans(plans)
        print(self.describe_memory(plans))


def _architecture(name: str, arguments: dict[str, Any], imported: Sequence[str]) -> dict[str, Any]:
    return {"network_class_name": name, "arch_kwargs": arguments, "_kw_requires_import": list(imported)}
