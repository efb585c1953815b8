"""Every block of docs/quick_start.md, run one after another in one shell, as a reader would, on synthetic data."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.demo.synthetic_data import ORGANS, write_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/quick_start.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RUN = [block for block in BLOCKS if "pip install" not in block]
# variables of one trainer win over those of both, which the page exports
SHORTER = {
    f"HYSPARK_{trainer}_{field}": value
    for trainer in ("PRETRAIN", "FINETUNE")
    for field, value in {
        "NUM_EPOCHS": "1",
        "NUM_ITERATIONS_PER_EPOCH": "2",
        "NUM_VAL_ITERATIONS_PER_EPOCH": "1",
    }.items()
} | {"HYSPARK_PRETRAIN_NUM_PICTURES": "1"}
TRAINED = "nnUNet_results/Dataset{}__3d_fullres"
PRETRAINED = TRAINED.format("060_HippocampusScans/HySparKPretrainTrainer__nnUNetPlansLike004") + "/fold_all"
FINETUNED = TRAINED.format("004_Hippocampus/HySparKFinetuneTrainer__nnUNetPlans") + "/fold_0"


def write_decathlon_task(folder: Path) -> None:
    """Writes synthetic scans in the Decathlon's layout: Task04_Hippocampus with imagesTr, labelsTr, imagesTs."""
    source = write_dataset(folder / "synthetic", 4, "Hippocampus", n_train=5, n_test=2, shape=(32, 32, 32))
    task = folder / "Task04_Hippocampus"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (task / part).mkdir(parents=True)
        for file in (source / part).iterdir():
            # there, files of one channel have no number for it
            shutil.move(file, task / part / file.name.replace("synthetic", "hippocampus").replace("_0000", ""))
    description = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {str(value): organ for organ, value in ORGANS.items()},
        "numTraining": 5,
        "numTest": 2,
        "training": [],
        "test": [],
    }
    (task / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the blocks were run, and what they printed."""
    folder = tmp_path_factory.mktemp("quick_start")
    write_decathlon_task(folder)
    ours = ("HYSPARK_", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # nnU-Net's own: processes of augmentation and of export
    environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", **SHORTER}
    script = "".join(f"echo {shlex.quote(f'block {number}')}\n{block}" for number, block in enumerate(RUN))
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return folder, done.stdout


def test_every_block_of_the_page_is_one_that_is_run() -> None:
    """No other kind of block hides a command: neither fenced otherwise nor indented."""
    assert PAGE.count("```") == 2 * len(BLOCKS) and len(RUN) == len(BLOCKS) - 1 > 8
    outside = re.sub(r"^```bash\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(    |\t)", outside, re.MULTILINE)


def test_the_installation_is_that_of_the_readme() -> None:
    """And of the Makefile: torch first, then the package from the clone, then a torchvision that fits."""
    (block,) = (block for block in BLOCKS if block not in RUN)
    *commands, mend = block.strip().splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    in_readme = [line.split("#")[0].strip() for line in readme.splitlines() if line.startswith("    pip install")]
    assert commands == in_readme == ["pip install torch", "pip install ."]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    order = [recipe.index(part) for part in ("'$(TORCH)' '$(NNUNETV2)' |", "--editable '.[dev]'", f"$(BIN)/{mend}")]
    assert order == sorted(order)


def test_the_installation_is_examined(reader: tuple[Path, str]) -> None:
    assert "ok    trainers: " in reader[1] and "FAIL" not in reader[1]


def test_the_scans_without_labels_become_a_dataset(reader: tuple[Path, str]) -> None:
    folder, _ = reader
    made = folder / "nnUNet_raw/Dataset060_HippocampusScans"
    description = json.loads((made / "dataset.json").read_text())
    listed = [file for case in description["dataset"].values() for file in case["images"]]
    assert sorted(Path(file).name for file in listed) == ["hippocampus_005_0000.nii.gz", "hippocampus_006_0000.nii.gz"]
    assert not (made / "imagesTr").exists()


def test_both_datasets_are_planned_alike(reader: tuple[Path, str]) -> None:
    folder, _ = reader
    names = {"Dataset004_Hippocampus": "nnUNetPlans", "Dataset060_HippocampusScans": "nnUNetPlansLike004"}
    plans = [folder / "nnUNet_preprocessed" / dataset / f"{name}.json" for dataset, name in names.items()]
    one, other = (json.loads(file.read_text())["configurations"]["3d_fullres"] for file in plans)
    assert one["patch_size"] == other["patch_size"]
    assert one["architecture"] == other["architecture"]


def test_pretraining_leaves_what_the_page_says(reader: tuple[Path, str]) -> None:
    pretrained = reader[0] / PRETRAINED
    assert (pretrained / "progress.png").is_file() and list(pretrained.glob("reconstructions/*.png"))
    checkpoint = read_checkpoint(pretrained / "checkpoint_final.pth")
    losses = checkpoint["logging"]["val_losses"]
    assert len(losses) == 1 and 0 < losses[0] < 2
    summary = json.loads((pretrained / "validation/summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2


def test_finetuning_starts_from_it_and_is_scored(reader: tuple[Path, str]) -> None:
    folder, printed = reader
    report = json.loads((folder / FINETUNED / "pretrained_weights_report.json").read_text())
    encoder = [entry for entry in report["tensors"] if entry["name"].startswith("encoder.")]
    assert encoder and {entry["fate"] for entry in encoder} == {"loaded"}
    dice = json.loads((folder / FINETUNED / "validation/summary.json").read_text())["foreground_mean"]["Dice"]
    assert 0 <= dice <= 1 and str(dice) in printed.splitlines()


def test_every_scan_is_predicted(reader: tuple[Path, str]) -> None:
    folder, _ = reader
    images = sorted((folder / "nnUNet_raw/Dataset004_Hippocampus/imagesTs").iterdir())
    assert len(images) == 2
    for image in images:
        predicted = sitk.ReadImage(str(folder / "predictions" / image.name.replace("_0000", "")))
        assert predicted.GetSize() == sitk.ReadImage(str(image)).GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= set(ORGANS.values())
