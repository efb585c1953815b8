"""Datasets that are a fingerprint: large images without the images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner

RESENC_PLANS = "nnUNetResEncUNetPlans"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def make_dataset(
    root: Path,
    number: int,
    shape: Sequence[int],
    spacing: Sequence[float],
    n: int = 200,
    channels: Sequence[str] = ("CT",),
) -> str:
    name = f"Dataset{number:03d}_Big"
    raw, preprocessed = root / "nnUNet_raw" / name, root / "nnUNet_preprocessed" / name
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    tiny = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8))
    files = [f"imagesTr/a_{index:04d}" for index in range(len(channels))]
    for file in (*files, "labelsTr/a"):
        sitk.WriteImage(tiny, str(raw / f"{file}.nii.gz"))
    content = {
        "channel_names": {str(index): channel for index, channel in enumerate(channels)},
        "labels": {"background": 0, "organ": 1},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    fingerprint = {
        "spacings": [list(spacing)] * 3,
        "shapes_after_crop": [list(shape)] * 3,
        "foreground_intensity_properties_per_channel": {
            str(index): {"mean": number, "std": 1, "percentile_00_5": 0, "percentile_99_5": 1}
            for index in range(len(channels))
        },
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return name


def written(root: Path, dataset: str, name: str) -> dict[str, Any]:
    return json.loads((root / "nnUNet_preprocessed" / dataset / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def planned_by_nnunet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Plans of nnU-Net's ResEnc planner, with one block per stage, which saves time."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            environment.setenv(name, str(root / name))
        dataset = make_dataset(root, 6, (36, 50, 36), (1.0, 1.0, 1.0), channels=("MRI",))
        ResEncUNetPlanner(6).plan_experiment()
    plans = written(root, dataset, RESENC_PLANS)
    for configuration in plans["configurations"].values():
        arguments = configuration["architecture"]["arch_kwargs"]
        arguments["n_blocks_per_stage"] = [1] * arguments["n_stages"]
    return plans


def write_plans(root: Path, dataset: str, plans: dict[str, Any]) -> Path:
    """Writes plans for a dataset."""
    file = root / "nnUNet_preprocessed" / dataset / f"{plans['plans_name']}.json"
    file.write_text(json.dumps(plans | {"dataset_name": dataset}))
    return file
