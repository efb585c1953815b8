"""The demo's own parts; its trainings run in the demo: tests of the folder hyspark_nnunet/demo."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyspark_nnunet.demo import commands
from hyspark_nnunet.demo.commands import Demo, DemoError, EpochLine
from hyspark_nnunet.demo.pictures import overlay_picture
from hyspark_nnunet.demo.run import CONFIGURATION, DATASETS, MARKER, check_plans, prepare_folder
from hyspark_nnunet.demo.synthetic_data import write_dataset


class TestPrepareFolder:
    def test_new_and_empty_folders(self, tmp_path: Path) -> None:
        prepare_folder(tmp_path / "a" / "demo", overwrite=False)
        assert (tmp_path / "a" / "demo" / MARKER).is_file()
        (tmp_path / "empty").mkdir()
        prepare_folder(tmp_path / "empty", overwrite=False)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_never_touches_a_folder_of_others(self, overwrite: bool, tmp_path: Path) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "holiday.jpg").write_text("mine")
        with pytest.raises(DemoError, match="was not made by this demo"):
            prepare_folder(tmp_path, overwrite)
        assert (tmp_path / "pictures" / "holiday.jpg").is_file()

    def test_overwrite_removes_what_the_demo_made_only(self, tmp_path: Path) -> None:
        prepare_folder(tmp_path, overwrite=False)
        made, mine = tmp_path / "nnUNet_raw" / DATASETS[0], tmp_path / "nnUNet_raw" / "Dataset007_Mine"
        for folder in (made, mine):
            folder.mkdir(parents=True)
        with pytest.raises(DemoError, match="--overwrite replaces it"):
            prepare_folder(tmp_path, overwrite=False)
        assert made.is_dir()
        prepare_folder(tmp_path, overwrite=True)
        assert not made.exists()
        assert mine.is_dir()


class TestEpochLine:
    def test_gathers_an_epoch(self) -> None:
        lines = [
            "2025-01-01 10:00:00.123456: Epoch 4",
            "2025-01-01 10:00:00.123456: Current learning rate: 0.001",
            "2025-01-01 10:00:09.123456: train_loss -0.2",
            "2025-01-01 10:00:09.123456: val_loss -0.3",
            "2025-01-01 10:00:09.123456: Pseudo dice [np.float32(0.5), np.float32(0.25)]",
            "2025-01-01 10:00:09.123456: Epoch time: 9.5 s",
        ]
        line = EpochLine(8)
        shown = [line(text) for text in lines]
        assert shown[:-1] == [None] * 5
        assert shown[-1] == "epoch 5/8   train loss -0.2   validation loss -0.3   Dice [0.5, 0.25]   9.5 s"


class TestRun:
    @pytest.fixture
    def python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "program", lambda name: sys.executable)

    @pytest.mark.usefixtures("python")
    def test_progress_log_and_environment(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = Demo(tmp_path, processes=2)
        run.headline("Say where")
        code = "import os; print('skip'); print('show', os.environ['nnUNet_raw'], os.environ['HYSPARK_PRESET'])"
        run.run(["python", "-c", code], {"HYSPARK_PRESET": "S"}, lambda line: line if "show" in line else None)
        shown = capsys.readouterr().out
        assert "HYSPARK_PRESET=S python -c" in shown
        assert f"\n      show {tmp_path / 'nnUNet_raw'} S\n" in shown
        assert (tmp_path / "logs" / "1_python.txt").read_text().startswith("skip\nshow ")

    @pytest.mark.usefixtures("python")
    def test_failure_shows_the_end_of_the_log(self, tmp_path: Path) -> None:
        code = "for n in range(100): print('line', n)\nraise SystemExit(3)"
        with pytest.raises(DemoError, match="exit code 3") as error:
            Demo(tmp_path, processes=2).run(["python", "-c", code])
        assert str(error.value).endswith("line 98\nline 99\n")
        assert "line 60\n" not in str(error.value)

    def test_missing_program(self) -> None:
        with pytest.raises(DemoError, match="nnUNetv2_no_such_program is not installed beside"):
            commands.program("nnUNetv2_no_such_program")


def test_check_plans_compares(tmp_path: Path) -> None:
    network = {"strides": [[1, 1, 1], [2, 2, 2]], "kernel_sizes": [[3, 3, 3]] * 2}
    plan = {"patch_size": [40, 40, 40], "batch_size": 2, "architecture": {"arch_kwargs": network}}
    for dataset, patch in zip(DATASETS, ([40, 40, 40], [40, 40, 48]), strict=True):
        file = tmp_path / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"configurations": {CONFIGURATION: plan | {"patch_size": patch}}}))
    with pytest.raises(DemoError, match=r"\[40, 40, 40\].*\[40, 40, 48\]"):
        check_plans(tmp_path)
    shutil.copyfile(tmp_path / "nnUNet_preprocessed" / DATASETS[0] / "nnUNetPlans.json", file)
    assert check_plans(tmp_path) == "both plans: patch 40 x 40 x 40 voxels, batch size 2, 2 stages"


def test_overlay_picture(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, 1, "Synthetic", n_train=0, n_test=2, shape=(40, 48, 48))
    with pytest.raises(FileNotFoundError, match="no prediction in"):
        overlay_picture(folder / "imagesTs", folder / "labelsTs", tmp_path, tmp_path / "none.png")
    shutil.copytree(folder / "labelsTs", tmp_path / "predictions")
    path = tmp_path / "pictures" / "organs.png"
    overlay_picture(folder / "imagesTs", folder / "labelsTs", tmp_path / "predictions", path)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert (np.ptp(picture, axis=-1) > 60).any()  # colour on grey
