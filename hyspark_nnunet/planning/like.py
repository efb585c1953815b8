"""Plans for one dataset with the topology of another's: pre-train on the first, fine-tune on the second.

In place of nnU-Net's dance (extract a fingerprint, nnUNetv2_move_plans_between_datasets, preprocess), and with the
intensity statistics of the dataset that is planned for, which moved plans do not have.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.preprocessed import plans_in, preprocessed_folder
from hyspark_nnunet.planning.fingerprint import note_sample
from hyspark_nnunet.planning.planner import PLANS_NAME, HySparKPlanner


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
        there = f"it has {', '.join(others)}: name one with -like_plans, or plan it" if others else "plan it"
        command = "hyspark_nnunet plan" if file.stem in PLANS_NAME.values() else "nnUNetv2_plan_experiment"
        number = folder.name[7:10].lstrip("0")
        raise FileNotFoundError(f"{folder.name} has no plans {file.name}; {there} first: {command} -d {number}")
    return json.loads(file.read_text(encoding="utf-8"))


def plan_like(planner: HySparKPlanner, source: dict[str, Any], plans_name: str | None = None) -> str:
    """Writes plans for the planner's dataset with the topology of other plans.

    From the other plans: target spacing, patch size, strides and kernels, the order of the axes, resampling: so a
    voxel, a mask unit and a stage mean the same size in both datasets, which is what makes the weights fit. From the
    dataset itself: normalisation by its own channels, intensity statistics of its own fingerprint, batch sizes and
    reader.

    Args:
        planner: for the dataset to plan for.
        source: the other plans.
        plans_name: of the new plans; None: the other's name with "Like" and the other dataset's number.

    Returns:
        the name of the new plans.

    Raises:
        ValueError: the other plans are of this dataset.
    """
    if source["dataset_name"] == planner.dataset_name:
        raise ValueError(f"--like names {planner.dataset_name} itself: name the dataset whose topology is to be taken")
    name = plans_name or f"{source['plans_name']}Like{source['dataset_name'][7:10]}"
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
    for configuration_name, configuration in plans["configurations"].items():
        if "data_identifier" in configuration:
            configuration["data_identifier"] = f"{name}_{configuration_name}"
        if "patch_size" not in configuration:  # inherits the rest
            continue
        spacing, axes = configuration["spacing"], forward[-len(configuration["spacing"]) :]
        shapes = [
            compute_new_shape([shape[a] for a in axes], [old[a] for a in axes], spacing)
            for shape, old in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
        ]
        median_shape = np.median(shapes, 0)
        # in 2d every slice is an image
        slices = (
            1 if len(axes) == 3 else float(np.median([shape[forward[0]] for shape in fingerprint["shapes_after_crop"]]))
        )
        n_voxels = float(np.prod(median_shape)) * slices * planner.dataset_json["numTraining"]
        configuration |= {
            "median_image_size_in_voxels": median_shape,
            "normalization_schemes": schemes,
            "use_mask_for_norm": masked,
            "hyspark": {"preset": planner.preset, **(configuration.get("hyspark") or {})},
        }
        plans["configurations"][configuration_name] = planner.with_batch_sizes(configuration, n_voxels)
    folder = planner.plans_folder
    recursive_fix_for_json_export(plans)
    shutil.copy(Path(planner.raw_dataset_folder) / "dataset.json", folder / "dataset.json")
    with replacing(folder / f"{name}.json") as beside:
        beside.write_text(json.dumps(plans, indent=4), encoding="utf-8")
    print(f"Plans with the topology of {source['dataset_name']} ({source['plans_name']}): {folder / name}.json")
    print(planner.describe_memory(plans))
    return name
