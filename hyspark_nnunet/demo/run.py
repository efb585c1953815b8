"""Pre-trains, fine-tunes, predicts and evaluates on synthetic data, on a CPU, in some minutes.

``python -m hyspark_nnunet.demo`` runs nnU-Net's own commands and prints each as one would type it. Data, results, logs
and pictures are in one folder. Synthetic data and so short a training show that everything works; they do not show how
good the method is.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.demo.commands import NNUNET_FOLDERS, Demo, DemoError, EpochLine, say
from hyspark_nnunet.demo.pictures import overlay_picture
from hyspark_nnunet.demo.synthetic_data import ORGANS, write_dataset

UNLABELLED, LABELLED = (60, "SyntheticUnlabelled"), (6, "SyntheticOrgans")
SHAPE = (48, 56, 56)  # voxels of a synthetic scan; small, so that a CPU can train on it
# GB for nnU-Net's planner, which then chooses patches of 40^3 voxels; a CPU trains on about one per second
MEMORY_TARGET = 0.2
CONFIGURATION = "3d_fullres"
PRETRAINER, FINETUNER = "HySparKPretrainTrainer", "HySparKFinetuneTrainer"
# pre-training takes every scan; fine-tuning holds a fifth out, as nnU-Net does
FOLDS = {PRETRAINER: "all", FINETUNER: "0"}
MARKER = ".hyspark_demo"
DATASETS = tuple(f"Dataset{number:03d}_{name}" for number, name in (UNLABELLED, LABELLED))
WRITTEN = (*(f"{folder}/{name}" for folder in NNUNET_FOLDERS for name in DATASETS), "predictions", "pictures", "logs")


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Creates the folder, or removes the files of an earlier demo from it; other files stay.

    Raises:
        DemoError: the folder is in use, by an earlier demo or by something else.
    """
    marker = folder / MARKER
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"{folder} is a file: choose another --folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file():
            raise DemoError(f"{folder} is not empty and was not made by this demo: choose another --folder")
        if not overwrite:
            raise DemoError(f"{folder} holds an earlier demo: --overwrite replaces it, or choose another --folder")
        for name in WRITTEN:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(
        "python -m hyspark_nnunet.demo --overwrite removes these from this folder:\n" + "\n".join(WRITTEN) + "\n"
    )


def check_plans(folder: Path) -> str:
    """Compares the plans of the two datasets: weights can be loaded only where the networks agree.

    Returns:
        A line about the plan.

    Raises:
        DemoError: they differ in patch size, strides or kernel sizes.
    """
    plans = []
    for dataset in DATASETS:
        plan = json.loads((folder / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json").read_text())
        settings = plan["configurations"][CONFIGURATION]
        network = settings["architecture"]["arch_kwargs"]
        plans.append(
            {name: network[name] for name in ("strides", "kernel_sizes")}
            | {name: settings[name] for name in ("patch_size", "batch_size")}
        )
    if plans[0] != plans[1]:
        raise DemoError(f"nnU-Net planned {DATASETS[0]} and {DATASETS[1]} differently: {plans[0]} and {plans[1]}")
    patch = " x ".join(str(n) for n in plans[0]["patch_size"])
    return f"both plans: patch {patch} voxels, batch size {plans[0]['batch_size']}, {len(plans[0]['strides'])} stages"


def results_folder(folder: Path, dataset: str, trainer: str) -> Path:
    """Where nnU-Net writes a training."""
    home = folder / "nnUNet_results" / dataset / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    return home / f"fold_{FOLDS[trainer]}"


def report(demo: Demo) -> None:
    """Prints the numbers, and puts the pictures into one folder."""
    pretraining = results_folder(demo.folder, DATASETS[0], PRETRAINER)
    finetuning = results_folder(demo.folder, DATASETS[1], FINETUNER)
    losses = read_checkpoint(pretraining / "checkpoint_final.pth")["logging"]["val_losses"]
    summary = json.loads((pretraining / "validation" / "summary.json").read_text())
    say("\n    reconstruction loss")
    say(f"      first epoch               {losses[0]:.3f}")
    say(f"      last epoch                {losses[-1]:.3f}")
    say(f"      whole cases, mean         {summary['mean']['reconstruction_loss']:.3f}")
    say(f"      predicting the means      {summary['mean']['loss_of_predicting_means']:.3f}")
    for case in summary["metric_per_case"][:4]:
        say(f"        {case['case']:<23} {case['metrics']['reconstruction_loss']:.3f}")
    say(f"        ... {len(summary['metric_per_case'])} cases in {pretraining / 'validation' / 'summary.json'}")
    dice = json.loads((demo.folder / "predictions" / "summary.json").read_text())["mean"]
    say("    Dice on the test cases, which no training saw")
    for organ, value in ORGANS.items():
        if value:
            say(f"      {organ:<25} {dice[str(value)]['Dice']:.3f}")

    pictures = demo.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    copies = {"pretraining.png": pretraining / "progress.png", "finetuning.png": finetuning / "progress.png"}
    for reconstruction in sorted(pretraining.glob("reconstructions/epoch_*.png")):
        copies["reconstruction.png"] = reconstruction  # the last one stays
    for name, source in copies.items():
        if source.is_file():
            shutil.copyfile(source, pictures / name)
    labelled = demo.folder / "nnUNet_raw" / DATASETS[1]
    overlay_picture(labelled / "imagesTs", labelled / "labelsTs", demo.folder / "predictions", pictures / "organs.png")
    say("    Pictures")
    for picture in sorted(pictures.glob("*.png")):
        say(f"      {picture}")


def run_demo(arguments: argparse.Namespace) -> None:
    """All steps, in order.

    Raises:
        DemoError: a step failed.
    """
    folder: Path = arguments.folder
    prepare_folder(folder, arguments.overwrite)
    demo = Demo(folder, arguments.processes)
    device = ["-device", arguments.device]
    raw = folder / "nnUNet_raw"
    for name, value in demo.environment.items():
        say(f"export {name}={shlex.quote(value)}")

    demo.headline(
        f"Create synthetic data: {arguments.unlabelled} scans without labels, {arguments.labelled} + 4 with organs"
    )
    for (number, name), train, test in ((UNLABELLED, arguments.unlabelled, 0), (LABELLED, arguments.labelled, 4)):
        sizes = {"n_train": train, "n_test": test, "labelled": test > 0, "shape": SHAPE}
        call = f"write_dataset({str(raw)!r}, {number}, {name!r}, {', '.join(f'{k}={v}' for k, v in sizes.items())})"
        say(f'    python -c "from hyspark_nnunet.demo.synthetic_data import *; {call}"')
        write_dataset(raw, number, name, train, test, labelled=test > 0, shape=SHAPE)

    demo.headline("Plan and preprocess with nnU-Net's command; a small memory target gives patches that suit a CPU")
    command = ["nnUNetv2_plan_and_preprocess", "-d", str(UNLABELLED[0]), str(LABELLED[0]), "-c", CONFIGURATION]
    command += ["--verify_dataset_integrity", "-gpu_memory_target", str(MEMORY_TARGET)]
    demo.run([*command, "-np", demo.processes, "-npfp", demo.processes])
    say(f"      {check_plans(folder)}")

    shared = {"HYSPARK_PRESET": "S", "HYSPARK_WARMUP_FRACTION": 0.1}
    demo.headline("Pre-train on the unlabelled scans")
    epochs = arguments.epochs_pretrain
    recipe = shared | {"HYSPARK_NUM_EPOCHS": epochs, "HYSPARK_NUM_ITERATIONS_PER_EPOCH": 20}
    recipe |= {
        "HYSPARK_INITIAL_LR": 1e-3,
        "HYSPARK_NUM_VAL_ITERATIONS_PER_EPOCH": 4,
        "HYSPARK_PICTURE_EVERY": 5,
        "HYSPARK_NUM_PICTURES": 2,
    }
    train = ["nnUNetv2_train", str(UNLABELLED[0]), CONFIGURATION, FOLDS[PRETRAINER], "-tr", PRETRAINER]
    demo.run([*train, *device], recipe, EpochLine(epochs))

    demo.headline("Fine-tune on the labelled scans")
    epochs = arguments.epochs_finetune
    recipe = shared | {"HYSPARK_NUM_EPOCHS": epochs, "HYSPARK_NUM_ITERATIONS_PER_EPOCH": 15}
    recipe |= {"HYSPARK_INITIAL_LR": 2e-3, "HYSPARK_NUM_VAL_ITERATIONS_PER_EPOCH": 3}
    weights = results_folder(demo.folder, DATASETS[0], PRETRAINER) / "checkpoint_final.pth"
    train = ["nnUNetv2_train", str(LABELLED[0]), CONFIGURATION, FOLDS[FINETUNER], "-tr", FINETUNER]
    demo.run([*train, "-pretrained_weights", str(weights), *device], recipe, EpochLine(epochs))

    demo.headline("Predict the test scans (--disable_tta: no mirroring, to save time)")
    predictions = folder / "predictions"
    command = [
        "nnUNetv2_predict",
        "-d",
        str(LABELLED[0]),
        "-c",
        CONFIGURATION,
        "-f",
        FOLDS[FINETUNER],
        "-tr",
        FINETUNER,
    ]
    command += ["-i", str(raw / DATASETS[1] / "imagesTs"), "-o", str(predictions), "--disable_tta", *device]
    demo.run([*command, "-npp", "1", "-nps", "1"])

    demo.headline("Evaluate")
    command = ["nnUNetv2_evaluate_folder", str(raw / DATASETS[1] / "labelsTs"), str(predictions)]
    command += ["-djfile", str(predictions / "dataset.json"), "-pfile", str(predictions / "plans.json")]
    demo.run([*command, "-np", demo.processes])
    report(demo)
    minutes = (time.time() - demo.started) / 60
    say(f"\nDone in {minutes:.1f} minutes. Everything is in {folder}; logs in {folder / 'logs'}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hyspark_nnunet.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="output folder (default: demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output of an earlier demo in the folder")
    parser.add_argument(
        "--epochs-pretrain", type=int, default=9, help="epochs of pre-training, 20 steps each (default: 9)"
    )
    parser.add_argument(
        "--epochs-finetune", type=int, default=7, help="epochs of fine-tuning, 15 steps each (default: 7)"
    )
    parser.add_argument("--unlabelled", type=int, default=16, help="number of scans for pre-training (default: 16)")
    parser.add_argument(
        "--labelled", type=int, default=7, help="number of labelled scans; a fifth is for validation (default: 7)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    parser.add_argument(
        "--processes", type=int, default=2, help="processes of preprocessing and evaluation (default: 2)"
    )
    try:
        run_demo(parser.parse_args(arguments))
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0
