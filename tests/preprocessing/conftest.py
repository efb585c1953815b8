"""A small dataset that nnU-Net's own command has preprocessed, and a project in which ours does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.nnunet_cases import write_balls
from tests.nnunet_project import Project

N_CASES = 14
NAME = "Dataset021_Balls"
DATA = "nnUNetPlans_3d_fullres"


@pytest.fixture(scope="package")
def by_nnunet(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Preprocessed by nnUNetv2_plan_and_preprocess; cases differ in size."""
    project = Project(tmp_path_factory.mktemp("by_nnunet"))
    project.make_folders()
    labels = {"background": 0, "shell": 1, "ball": 2, "ignore": 3}
    folder = write_balls(project.raw, 21, "Balls", labels, (16, 20, 18), (1.0, 0.8, 0.8), n_train=N_CASES)
    for index in range(0, N_CASES, 3):
        for file in (folder / "imagesTr" / f"ball_{index}_0000.nii.gz", folder / "labelsTr" / f"ball_{index}.nii.gz"):
            sitk.WriteImage(sitk.ReadImage(str(file))[:, : 10 + index // 3, 2:], str(file))
    project.plan_and_preprocess(21)
    return project


@pytest.fixture
def project(by_nnunet: Project, tmp_path: Path) -> Project:
    """A copy of the project without preprocessed cases."""
    copy = Project(tmp_path)
    shutil.copytree(by_nnunet.raw, copy.raw)
    (copy.preprocessed / NAME).mkdir(parents=True)
    for file in (by_nnunet.preprocessed / NAME).glob("*.json"):
        shutil.copy(file, copy.preprocessed / NAME)
    return copy


def files_of(project: Project) -> dict[str, bytes]:
    """Everything that nnU-Net reads of the preprocessed dataset, by relative path; plans apart."""
    home = project.preprocessed / NAME
    found = [*(home / DATA).glob("*"), *(home / "gt_segmentations").glob("*")]
    return {str(file.relative_to(home)): file.read_bytes() for file in found if file.is_file()}


def edit_plans(project: Project, name: str = "nnUNetPlans", **configuration: Any) -> None:
    """Changes the 3d_fullres configuration of the plans; writes them as ``name``."""
    folder = project.preprocessed / NAME
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_fullres"] |= configuration
    (folder / f"{name}.json").write_text(json.dumps(plans | {"plans_name": name}))


def damage(file: Path) -> None:
    """Cuts a file in the middle."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
