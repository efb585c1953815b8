"""benchmarks/few_labels from data to tables on synthetic scans, by nnU-Net's real commands, with a stop on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import SimpleITK as sitk

from benchmarks.few_labels.arms import ARMS, SPARK_REFERENCE, Run
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.prepare import LABELLED, UNLABELLED
from benchmarks.few_labels.results import Results
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.training import fold_folder, pretraining_folder
from benchmarks.few_labels.work import ROOT, Work
from tests.nnunet_cases import write_balls
from tests.test_few_labels import write_splits

OPTIONS = [
    *"--pretrain-epochs 1 --pretrain-iterations 2 --pretrain-val-iterations 1 --pretrain-batch 2".split(),
    *"--save-every 1 --finetune-epochs 2 --finetune-iterations 2 --finetune-val-iterations 1".split(),
    *("--spacing", "1.25 1 1"),
]
FOLDED = Settings()  # folders depend on the preset alone


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.few_labels", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    printed, _ = process.communicate(timeout=1800)
    assert process.returncode == status, printed
    return printed


@pytest.mark.skipif(os.name != "posix", reason="the benchmark locks its runs by fcntl")
def test_from_data_to_tables(tmp_path: Path) -> None:
    labels, work = {"background": 0, "shell": 1, "core": 2}, Work(tmp_path / "work")
    data = write_balls(tmp_path, 1, "Balls", labels, shape=(32, 32, 32), n_train=9, n_test=0)
    splits = Splits.read(write_splits(data / "splits.json"))
    command = ["run", "--arms", "spark_pretrained", "--labels", "5", "--seeds", "1", "--cores", "1"]
    command += ["--work", str(work.root), "--data", str(data)]
    run = Run(ARMS["spark_pretrained"], 5, 1, 11)

    # stopped in its training with labels, when that has a checkpoint
    process = start(*command, *OPTIONS)
    folder = fold_folder(work, FOLDED, run)
    while process.poll() is None and not list(folder.glob("checkpoint_*.pth")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes" in finish(process, status=130)
    assert work.record(SPARK_REFERENCE.run).is_file() and not work.record(run.name).exists()
    pretrained = pretraining_folder(work, FOLDED, SPARK_REFERENCE) / "checkpoint_final.pth"
    made = pretrained.stat().st_mtime_ns

    # goes on, with the settings of the folder
    assert "pretrain_spark: already finished" in finish(start(*command))
    assert pretrained.stat().st_mtime_ns == made
    record = json.loads(work.record(run.name).read_text())
    log = work.log(run.name).read_text().splitlines()
    assert any("100.0% of the encoder's parameters come from the file" in line for line in log)
    trainings = [line for line in log if line.startswith("$ ") and "nnunet_train" in line]
    assert len(trainings) == 2 and trainings[1].endswith((" --c", " --val"))
    assert any("This split has 5 training and 2 validation cases." in line for line in log)

    # what is kept
    tables = record["tables"]
    assert [row["case"] for row in tables["cases"]] == sorted(splits.validation)
    row = tables["runs"][0]
    mean = sum(float(case["dice"]) for case in tables["cases"]) / len(tables["cases"])
    assert float(row["dice"]) == pytest.approx(mean, abs=1e-4)
    assert len(tables["curves"]) == 2 and row["steps"] == 4 and 0 < row["seconds"] < 4 * row["CPU seconds"]
    assert "1 threads" in row["machine"]
    recipe = record["recipe"]["recipe"]
    assert (recipe["seed"], recipe["batch_size"], recipe["initial_lr"]) == (1, 2, 3e-3)
    collect(work, tmp_path / "results")
    assert (work.root / "results" / "runs.csv").read_bytes() == (tmp_path / "results" / "runs.csv").read_bytes()
    assert Results(tmp_path / "results").table("runs")["fold"].tolist() == ["11"]
    changes = {row["layer"]: float(row["change"]) for row in tables["changes"]}
    # at a fraction of its rate the first stage moves far less than the last
    assert 0 < changes["stage 0"] < 0.1 * max(changes.values()) < 0.1
    plans = json.loads((tmp_path / "results" / "prepared.json").read_text())
    assert plans["stock"]["patch_size"] == plans["SparK pre-training"]["patch_size"] == [28, 32, 32]
    assert plans["stock"]["spacing"] == [1.25, 1, 1] and 0.9 < plans["Dice of resampled labels"] <= 1
    everything = "".join(file.read_text() for file in (tmp_path / "results").rglob("*.*"))
    assert str(tmp_path) not in everything

    # no label of a scan for pre-training is in the work folder, but the foreground that dataset prepare finds
    labelled = {file.name.removesuffix(".nii.gz") for file in (work.raw / LABELLED / "labelsTr").iterdir()}
    assert labelled == {*splits.all_labelled, *splits.validation}
    made_labels = work.raw / UNLABELLED / "labelsTr"
    assert {int(sitk.GetArrayFromImage(sitk.ReadImage(file)).max()) for file in made_labels.iterdir()} == {1}
