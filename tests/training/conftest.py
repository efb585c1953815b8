"""Trainers without a dataset, in a nnU-Net project of their own."""

from pathlib import Path

import pytest
import torch

from hyspark_nnunet.training.trainer import RecipeTrainer
from tests.nnunet_plans import DATASET_JSON


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def make_trainer(trainer_class: type[RecipeTrainer], plans: dict) -> RecipeTrainer:
    return trainer_class(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
