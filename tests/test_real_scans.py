"""nnU-Net's real commands on the real scans, where they are at hand."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from hyspark_nnunet.datasets.prepare import PrepareOptions, prepare
from tests.nnunet_project import FINETUNER, PRETRAINER, Project

DATA = Path(os.environ.get("HYSPARK_REAL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
HIPPOCAMPUS, CT = DATA / "hippocampus", DATA / "ct"


def write_dataset_json(folder: Path, channel: str, labels: dict[str, int], cases: int) -> None:
    content = {"channel_names": {"0": channel}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))


def copy_unlabelled(images: list[Path], folder: Path, channel: str) -> None:
    """Images, and a body label of each: what nnU-Net needs to preprocess them."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for path in images:
        shutil.copy(path, folder / "imagesTr")
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(
            sitk.OtsuThreshold(image, 0, 1), str(folder / "labelsTr" / path.name.replace("_0000", "")), True
        )
    write_dataset_json(folder, channel, {"background": 0, "body": 1}, len(images))


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason=f"the real MR scans are not at hand: {HIPPOCAMPUS}")
def test_mr_from_pretraining_to_evaluation(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.make_folders()
    splits = json.loads((HIPPOCAMPUS / "splits.json").read_text())
    unlabelled, labelled = (project.raw / name for name in ("Dataset060_Unlabelled", "Dataset006_Hippocampus"))
    copy_unlabelled([HIPPOCAMPUS / f"imagesTr/{c}_0000.nii.gz" for c in splits["pretrain"][:6]], unlabelled, "MRI")
    for images, labels, cases in (("Tr", "Tr", splits["labelled_5"]), ("Ts", "Ts", splits["validation"][:2])):
        (labelled / f"images{images}").mkdir(parents=True)
        (labelled / f"labels{labels}").mkdir()
        for case in cases:
            shutil.copy(HIPPOCAMPUS / f"imagesTr/{case}_0000.nii.gz", labelled / f"images{images}")
            shutil.copy(HIPPOCAMPUS / f"labelsTr/{case}.nii.gz", labelled / f"labels{labels}")
    write_dataset_json(labelled, "MRI", {"background": 0, "anterior": 1, "posterior": 2}, 5)
    project.plan_and_preprocess(60, 6)

    # 30 steps: enough to leave the loss of predicting each block's mean behind
    recipe = {"HYSPARK_NUM_EPOCHS": "2", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "15", "HYSPARK_BATCH_SIZE": "2"}
    project.train(
        60, "all", PRETRAINER, **recipe, HYSPARK_INITIAL_LR="2e-3", HYSPARK_WARMUP_FRACTION="0.1", HYSPARK_SEED="1"
    )
    pretrained = project.fold_folder("Dataset060_Unlabelled", PRETRAINER, "all")
    summary = json.loads((pretrained / "validation/summary.json").read_text())
    assert len(summary["metric_per_case"]) == 6
    assert summary["mean"]["reconstruction_loss"] < 0.97

    weights = str(pretrained / "checkpoint_final.pth")
    project.train(6, "all", FINETUNER, "-pretrained_weights", weights)
    predicted = tmp_path / "predicted"
    project.predict(labelled.name, "all", FINETUNER, predicted)
    files = (str(project.preprocessed / labelled.name / name) for name in ("dataset.json", "nnUNetPlans.json"))
    dataset, plans = files
    folders = (str(labelled / "labelsTs"), str(predicted))
    project.run("nnUNetv2_evaluate_folder", *folders, "-djfile", dataset, "-pfile", plans)
    assert len(json.loads((predicted / "summary.json").read_text())["metric_per_case"]) == 2


@pytest.mark.skipif(not CT.is_dir(), reason=f"the real CT scans are not at hand: {CT}")
def test_ct_with_the_plan_nnunet_makes(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.make_folders()
    prepare(PrepareOptions(str(CT), 61, "CT"), project.raw)
    project.plan_and_preprocess(61)
    recipe = {"HYSPARK_NUM_EPOCHS": "1", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "1", "HYSPARK_BATCH_SIZE": "1"}
    project.train(61, "all", PRETRAINER, **recipe)
    pretrained = project.fold_folder("Dataset061_CT", PRETRAINER, "all")
    summary = json.loads((pretrained / "validation/summary.json").read_text())
    losses = [entry["metrics"]["reconstruction_loss"] for entry in summary["metric_per_case"]]
    assert len(losses) == 3 and np.all(np.isfinite(losses)) and np.all(np.array(losses) > 0)
