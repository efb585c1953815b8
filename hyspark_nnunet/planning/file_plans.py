"""The plans that a checkpoint's network was trained on, as far as the file says them."""

import copy
from collections.abc import Mapping
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from hyspark_nnunet.checkpoints.network_plan import NetworkPlan, network_plan, plan_in
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, required_sizes
from hyspark_nnunet.checkpoints.storage import SourceWeights, read_weights
from hyspark_nnunet.checkpoints.transfer import preset_of

PLANS_NAME = "nnUNetPlansLikeFile"
# GB: nnssl's models are as large as nnU-Net's ResEnc L
MEMORY_TARGET = 24.0


class FilePlans:
    """The plans of a checkpoint.

    A file of our trainers or of nnU-Net's holds complete plans. Others, such as nnssl's, say the network, the patch and
    perhaps the spacing; everything else is nnU-Net's default.

    Args:
        file: a checkpoint.

    Attributes:
        plans: in the file; None if it has none.
        preset: of HySparK's network; None: the network is one of nnU-Net's.
        plans_name: of the new plans; None: after those in the file.
        memory_target: GB of the GPU that are taken if none are given; None: those of the planner in the plans.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not say enough; says what to do.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        weights = read_weights(file)
        sizes = required_sizes(weights.state, file, weights.origin)
        self.preset = None if isinstance(sizes, PlanSizes) else weights.description.get("preset") or preset_of(sizes)
        self.plans = _complete_plans(weights, sizes.network if isinstance(sizes, PlanSizes) else None)
        self.memory_target = None if self.plans is not None else MEMORY_TARGET
        self.plans_name = None if self.plans is not None else PLANS_NAME
        if self.plans is not None:
            return
        if not isinstance(sizes, PlanSizes):
            raise ValueError(
                f"{file} holds HySparK's network, but not the plans of its training: plan the dataset without --like, "
                f"for example with -preset {self.preset or 'B'}, or name the dataset of the pre-training"
            )
        self._network: NetworkPlan = network_plan(sizes, weights.rest, weights.description)
        if self._network.patch_size is None:
            raise ValueError(
                f"{file} does not say the patch size of its training: plan the dataset with nnU-Net's planner, or name "
                "a dataset that is planned (--like ID)"
            )

    @property
    def says_spacing(self) -> bool:
        """Whether the file has the spacing of its training."""
        return self.plans is not None or self._network.spacing is not None

    def for_dataset(self, planner: ExperimentPlanner) -> dict[str, Any]:
        """Plans to take the topology from (``like.plan_like``).

        Args:
            planner: for the dataset to plan for; its target spacing is taken if the file has none.
        """
        if self.plans is not None:
            return self.plans
        network, dims = self._network, len(self._network.patch_size or ())
        spacing = network.spacing
        if spacing is None:
            spacing = [float(s) for s in planner.determine_fullres_target_spacing()][-dims:]
            print(
                f"{self.file} does not say the spacing of its training. The plans have the target spacing of "
                f"{planner.dataset_name}, {' x '.join(f'{s:.3g}' for s in spacing)} mm; -overwrite_target_spacing sets "
                "another one."
            )
        data, data_options, segmentation, segmentation_options = planner.determine_resampling()
        probabilities, probabilities_options = planner.determine_segmentation_softmax_export_fn()
        configuration = {
            "data_identifier": "",
            "preprocessor_name": planner.preprocessor_name,
            "batch_size": 2,
            "patch_size": list(network.patch_size or ()),
            "spacing": list(spacing),
            "resampling_fn_data": data.__name__,
            "resampling_fn_seg": segmentation.__name__,
            "resampling_fn_data_kwargs": data_options,
            "resampling_fn_seg_kwargs": segmentation_options,
            "resampling_fn_probabilities": probabilities.__name__,
            "resampling_fn_probabilities_kwargs": probabilities_options,
            "architecture": {
                "network_class_name": network.class_name,
                "arch_kwargs": copy.deepcopy(network.arguments),
                "_kw_requires_import": list(network.requires_import),
            },
            "batch_dice": True,
        }
        return {
            "dataset_name": "",
            "plans_name": PLANS_NAME,
            # the file does not say how its axes were ordered
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"2d" if dims == 2 else "3d_fullres": configuration},
            "experiment_planner_used": ExperimentPlanner.__name__,
            "label_manager": "LabelManager",
        }


def _complete_plans(weights: SourceWeights, network: str | None) -> dict[str, Any] | None:
    """The plans in a checkpoint of nnU-Net's trainers or ours; None for other files.

    Args:
        weights: of the file.
        network: of nnU-Net's, which the plans must name; None: the network is HySparK's, which any plans serve.
    """
    plan = plan_in(weights.rest)
    if plan is None or not plan.patch_size or not plan.spacing:
        return None
    if network and not plan.class_name.endswith(f".{network}"):
        return None
    plans: Mapping[str, Any] = weights.rest["init_args"]["plans"]
    return {key: value for key, value in copy.deepcopy(dict(plans)).items() if key != "continue_training"}
