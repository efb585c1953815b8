"""Folds that nnU-Net would train on, or fail on with somebody else's message."""

import json
from pathlib import Path

import blosc2
import numpy as np
import pytest

from hyspark_nnunet.training.data.fold_cases import listed_cases
from hyspark_nnunet.training.hyspark import HySparKPretrainTrainer
from tests.nnunet_plans import CUBIC, DATASET, DATASET_JSON, make_plans
from tests.training.conftest import make_trainer

SIX = [f"liver_{number}" for number in range(6)]


def trainer_on(root: Path, cases: list[str], split: list | None = None) -> HySparKPretrainTrainer:
    """A trainer of fold 0 with these preprocessed cases."""
    folder = root / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    for case in cases:
        blosc2.asarray(np.zeros((1, 2, 2, 2), np.float32), urlpath=str(folder / f"{case}.b2nd"))
    if split is not None:
        (folder.parent / "splits_final.json").write_text(json.dumps(split))
    return make_trainer(HySparKPretrainTrainer, make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"}))


def list_cases(root: Path, cases: list[str]) -> None:
    """What preprocessing writes when it has finished."""
    folder = root / "nnUNet_preprocessed" / DATASET / "gt_segmentations"
    folder.mkdir(parents=True)
    for case in cases:
        (folder / f"{case}.nii.gz").touch()


def test_three_cases_and_fold_0(folders: Path) -> None:
    """The message contains a split that suits them, which can then be trained."""
    trainer = trainer_on(folders, SIX[:3])
    with pytest.raises(ValueError, match="too few preprocessed cases .3. for nnU-Net's 5 folds.*fold all") as error:
        trainer.do_split()
    splits_file = folders / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    assert str(splits_file) in str(error.value)
    splits_file.write_text(str(error.value).splitlines()[1])
    assert trainer.do_split() == (SIX[1:3], SIX[:1])
    trainer.fold = "all"
    assert sorted(trainer.do_split()[1]) == SIX[:3]


def test_one_case_has_no_fold_but_all(folders: Path) -> None:
    with pytest.raises(ValueError, match="too few preprocessed cases .1. .* train on fold all$"):
        trainer_on(folders, SIX[:1]).do_split()


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (
            {"train": SIX[:5], "val": []},
            'fold 0 has no cases under "val" in .*splits_final.json: add some',
        ),
        ({"train": [], "val": SIX[:5]}, 'fold 0 has no cases under "train" in '),
        ({"train": SIX[:5], "val": ["liver_9"]}, "cases of fold 0 in .* are not preprocessed .1.: liver_9. Preprocess"),
    ],
)
def test_a_split_that_cannot_be_trained(folders: Path, fold: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_on(folders, SIX, [fold]).do_split()


def test_a_case_that_is_lost_does_not_end_a_training_that_has_begun(folders: Path) -> None:
    """Its loaders name the case and draw others."""
    trainer = trainer_on(folders, SIX[1:], [{"train": SIX[:4], "val": SIX[4:]}])
    with pytest.raises(ValueError, match="not preprocessed .1.: liver_0"):
        trainer.do_split()
    trainer.checkpoints.adopt()
    assert trainer.do_split() == (SIX[:4], SIX[4:])


def test_a_dataset_that_is_preprocessed_in_part(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before nnU-Net divides the rest; with a split or fold all a warning names what is missing."""
    trainer = trainer_on(folders, SIX[:1])
    list_cases(folders, SIX)
    said = "5 of 6 cases of the dataset are not preprocessed: liver_1, .*liver_5.*hyspark_nnunet preprocess -d 7 -c"
    with pytest.raises(ValueError, match=f"(?s){said}.*splits_final.json"):
        trainer._check_all_cases_preprocessed()
    trainer.fold = "all"
    trainer._check_all_cases_preprocessed()
    warning = capsys.readouterr().out
    assert "WARNING: 5 of 6 cases" in warning and "This training runs without them." in warning
    list_cases_again = folders / "nnUNet_preprocessed" / DATASET / "gt_segmentations"
    for case in SIX[1:]:
        (list_cases_again / f"{case}.nii.gz").unlink()
    trainer._check_all_cases_preprocessed()
    assert capsys.readouterr().out == ""


def test_the_raw_dataset_says_which_cases_there_are(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    listed = DATASET_JSON | {"dataset": {case: {"images": [f"{case}.nii.gz"], "label": None} for case in SIX}}
    assert listed_cases(raw, tmp_path, listed) == set(SIX)  # only the preprocessed data are there
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for name in ("liver_0_0000.nii.gz", "liver_0_seg_0000.nii.gz"):  # nnU-Net takes the second for a segmentation
        (raw / "imagesTr" / name).touch()
    assert listed_cases(raw, tmp_path, listed) == {"liver_0", "liver_0_seg"}


def test_folds_keep_subjects_together(folders: Path) -> None:
    cases = [f"{subject}_{scan}" for subject in "abcdef" for scan in range(2)]
    trainer = trainer_on(folders, cases)
    trainer.dataset_json = {**DATASET_JSON, "hyspark_nnunet": {"subjects": {case: case[0] for case in cases}}}
    training, validation = trainer.do_split()
    assert validation and {case[0] for case in training}.isdisjoint(case[0] for case in validation)
