"""Plans for one dataset with the topology of another's: pre-train on the first, fine-tune on the second.

One command instead of nnU-Net's three (extract a fingerprint, nnUNetv2_move_plans_between_datasets, preprocess). The
intensity statistics are those of the dataset that is planned for, which moved plans do not have.
"""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.preprocessed import plans_in, preprocessed_folder
from hyspark_nnunet.planning.batch_planner import BatchPlanner
from hyspark_nnunet.planning.fingerprint import note_sample
from hyspark_nnunet.planning.planner import PLANS_NAME


def is_file(like: str) -> bool:
    """Whether ``--like`` names a checkpoint, and no dataset."""
    if like.isdecimal() or like.startswith("Dataset"):
        return False
    return like.startswith("hf://") or Path(like).suffix != "" or os.path.isfile(like)


def source_plans_of(like: str, preset: str, plans_name: str | None) -> dict[str, Any]:
    """The plans to take the topology from.

    Args:
        like: number or name of a planned dataset.
        preset: whose plans, where no name is given.
        plans_name: of the plans; None: those of HySparKPlanner for the preset.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = preprocessed_folder(like)
    file = folder / f"{plans_name or PLANS_NAME[preset]}.json"
    if not file.is_file():
        others = [name for name, _ in plans_in(folder)]
        choice = f"It has {', '.join(others)}: choose one with -like_plans, or plan it" if others else "Plan it"
        command = f"nnUNetv2_plan_experiment -d {int(folder.name[7:10])}"
        for name, plans in PLANS_NAME.items():
            if plans == file.stem:
                command = f"hyspark_nnunet plan -d {int(folder.name[7:10])} -preset {name}"
        raise FileNotFoundError(f"{folder.name} has no plans {file.name}. {choice} first: {command}")
    return json.loads(file.read_text(encoding="utf-8"))


def existing_plans(dataset: str | int, plans_name: str) -> dict[str, Any]:
    """The plans of a dataset by name.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = preprocessed_folder(str(dataset))
    file = folder / f"{plans_name}.json"
    if not file.is_file():
        others = ", ".join(name for name, _ in plans_in(folder))
        raise FileNotFoundError(
            f"{file} is missing: -p names plans that exist{f' ({others})' if others else ''}. Make them first by "
            f"nnU-Net's planner, for example: nnUNetv2_plan_experiment -d {int(folder.name[7:10])} -pl "
            "nnUNetPlannerResEncL"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def plan_like(
    planner: BatchPlanner, source: dict[str, Any], plans_name: str | None = None, origin: str | None = None
) -> str:
    """Writes plans for the planner's dataset with the topology of other plans.

    Taken from the other plans: target spacing, patch size, strides and kernels, order of the axes, resampling. So a
    voxel, a mask unit and a stage have the same size in both datasets, and the weights fit. Taken from the dataset
    itself: normalisation of its channels, intensity statistics of its fingerprint, batch sizes and reader.

    Args:
        planner: for the dataset to plan for.
        source: the other plans.
        plans_name: of the new plans; None: the other's name with "Like" and the other dataset's number.
        origin: file that the other plans are from; None: the other dataset's.

    Returns:
        the name of the new plans.

    Raises:
        ValueError: the other plans are of this dataset, or their names cannot be those of files.
    """
    if origin is None and source["dataset_name"] == planner.dataset_name:
        raise ValueError(f"--like names {planner.dataset_name} itself: name the dataset whose topology is to be taken")
    name = plans_name or f"{source['plans_name']}Like{source['dataset_name'][7:10]}"
    for part in (name, *source["configurations"]):  # a file from elsewhere must not choose where is written
        if part != Path(part).name or "\\" in part:
            raise ValueError(
                f"the plans of {origin or source['dataset_name']} have the name '{part}', which cannot be a file's: "
                "correct it there"
            )
    plans = copy.deepcopy(source)
    forward = plans["transpose_forward"]
    fingerprint = planner.dataset_fingerprint
    schemes, masked = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    plans |= {
        "dataset_name": planner.dataset_name,
        "plans_name": name,
        "original_median_spacing_after_transp": np.median(fingerprint["spacings"], 0)[forward],
        "original_median_shape_after_transp": np.median(fingerprint["shapes_after_crop"], 0)[forward].astype(int),
        "image_reader_writer": planner.determine_reader_writer().__name__,
        "foreground_intensity_properties_per_channel": fingerprint["foreground_intensity_properties_per_channel"],
    }
    note_sample(plans, fingerprint)
    manager = PlansManager(source)
    for configuration_name, own in source["configurations"].items():
        # nnU-Net's manager resolves what is inherited, and the architecture of plans before nnU-Net 2.5
        resolved = manager.get_configuration(configuration_name).configuration
        inherits = "inherits_from" in own
        # what is inherited stays so
        configuration = copy.deepcopy(own if inherits else resolved)
        if "data_identifier" in own:
            configuration["data_identifier"] = f"{name}_{configuration_name}"
        if not inherits or "patch_size" in own:
            data = {
                "median_image_size_in_voxels": _median_shape(planner, resolved["spacing"], forward),
                "normalization_schemes": schemes,
                "use_mask_for_norm": masked,
                planner.section_name: planner.section_of_new_plans() | (resolved.get(planner.section_name) or {}),
            }
            sized = planner.with_batch_sizes({**resolved, **data}, planner.n_voxels(data, forward))
            configuration |= {key: sized[key] for key in (*data, "batch_size")}
        plans["configurations"][configuration_name] = configuration
    folder = planner.plans_folder
    recursive_fix_for_json_export(plans)
    shutil.copy(Path(planner.raw_dataset_folder) / "dataset.json", folder / "dataset.json")
    with replacing(folder / f"{name}.json") as beside:
        beside.write_text(json.dumps(plans, indent=4), encoding="utf-8")
    origin = origin or f"{source['dataset_name']} ({source['plans_name']})"
    print(f"Plans with the topology of {origin}: {folder / name}.json")
    print(planner.describe_memory(plans))
    return name


def _median_shape(planner: BatchPlanner, spacing: Sequence[float], forward: Sequence[int]) -> np.ndarray:
    """Voxels per axis of the dataset's median image at a spacing."""
    fingerprint, axes = planner.dataset_fingerprint, forward[-len(spacing) :]
    shapes = [
        compute_new_shape([shape[a] for a in axes], [old[a] for a in axes], spacing)
        for shape, old in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
    ]
    return np.median(shapes, 0)
