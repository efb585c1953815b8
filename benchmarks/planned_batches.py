"""The table of docs/nnunet_features.md: what each preset's plan is for a dataset of large CTs.

    python -m benchmarks.planned_batches

The planner sees a fingerprint: 200 cases of 300 x 400 x 400 voxels, 1.5 x 0.8 x 0.8 mm. The images themselves are not
made.
"""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE, SPACING, CASES = (300, 400, 400), (1.5, 0.8, 0.8), 200
DATASET_ID = 1


def make_fingerprint(root: Path) -> None:
    """Makes nnU-Net's folders with one tiny case, and the fingerprint of many large ones, and sets its variables."""
    name = f"Dataset{DATASET_ID:03d}_CTs"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / variable / name).mkdir(parents=True)
        os.environ[variable] = str(root / variable)
    raw = root / "nnUNet_raw" / name
    for file in ("imagesTr/case_0000.nii.gz", "labelsTr/case.nii.gz"):
        (raw / file).parent.mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8)), str(raw / file))
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    fingerprint = {
        "spacings": [list(SPACING)] * CASES,
        "shapes_after_crop": [list(SHAPE)] * CASES,
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 100, "std": 50, "percentile_00_5": -100, "percentile_99_5": 300}
        },
        "median_relative_size_after_cropping": 1.0,
    }
    path = root / "nnUNet_preprocessed" / name / "dataset_fingerprint.json"
    path.write_text(json.dumps(fingerprint), encoding="utf-8")


def rows() -> list[str]:
    """A line of the table for each preset."""
    # nnU-Net reads its variables when it is imported
    from hyspark_nnunet.planning.planner import MEMORY_TARGET, PLANS_NAME, HySparKPlanner

    lines = []
    for preset, plans_name in PLANS_NAME.items():
        with contextlib.redirect_stdout(io.StringIO()):
            planner = HySparKPlanner(DATASET_ID, preset=preset)
            planner.plan_experiment()
        plans = json.loads((planner.plans_folder / f"{plans_name}.json").read_text(encoding="utf-8"))
        planned = plans["configurations"]["3d_fullres"]
        patch = " x ".join(map(str, planned["patch_size"]))
        batches = f"{planned['hyspark']['pretrain']['batch_size']} | {planned['batch_size']}"
        lines.append(f"| {preset} | `{plans_name}` | {MEMORY_TARGET[preset]:g} GB | {patch} | {batches} |")
    return lines


def main() -> None:
    """Prints the table's rows."""
    with tempfile.TemporaryDirectory() as folder:
        make_fingerprint(Path(folder))
        print("\n".join(rows()))


if __name__ == "__main__":
    main()
