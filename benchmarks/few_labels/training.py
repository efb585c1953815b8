"""Runs one training to its end, from wherever it stands, and keeps what is reported of it."""

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_labels.arms import PRETRAINER, Pretraining, Run
from benchmarks.few_labels.commands import CommandFailed, Commands, alone, end_of_log
from benchmarks.few_labels.log_lines import key_lines
from benchmarks.few_labels.prepare import CONFIGURATION, LABELLED, LABELLED_ID, UNLABELLED, UNLABELLED_ID
from benchmarks.few_labels.prepare import pretraining_plans as plans_of_pretraining
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import ROOT, Work
from benchmarks.measuring import machine
from hyspark_nnunet import __version__
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.demo import say
from hyspark_nnunet.training.continuing import BEST, FINAL, LATEST, PREVIOUS


def pretraining_folder(work: Work, settings: Settings, pretraining: Pretraining) -> Path:
    """Where nnU-Net writes a pre-training."""
    base = f"{PRETRAINER}__{plans_of_pretraining(settings)}__{CONFIGURATION}"
    return work.results(pretraining.run) / UNLABELLED / base / "fold_all"


def fold_folder(work: Work, settings: Settings, run: Run) -> Path:
    """Where nnU-Net writes a training with labels."""
    base = f"{run.arm.trainer}__{run.arm.plans(settings)}__{CONFIGURATION}"
    return work.results(run.arm.name) / LABELLED / base / f"fold_{run.fold}"


def pretrain(commands: Commands, settings: Settings, pretraining: Pretraining) -> None:
    """Pre-trains on all scans without labels, unless that is done.

    Raises:
        CommandFailed: the training failed; the message has the end of its log.
    """
    work, name = commands.work, pretraining.run
    with alone(work, name) as lock:
        if not _to_be_done(work, name, lock):
            return
        folder = pretraining_folder(work, settings, pretraining)
        arguments = (UNLABELLED_ID, "all", PRETRAINER, plans_of_pretraining(settings), settings.device)
        variables = pretraining.variables(settings) | _loading(settings)
        _train(commands, name, name, folder, arguments, variables, lock)
        history = _history(folder)
        _keep(
            work,
            name,
            {
                "pretraining": pretraining.name,
                "epochs": pretraining.epochs(settings),
                "steps": pretraining.epochs(settings) * settings.pretrain_iterations,
                "seconds": _seconds(history),
                **_made_with(commands, settings),
                "curve": _curve(
                    history, {"train_loss": "train_losses", "val_loss": "val_losses", "probe": "probe_dice"}
                ),
                "reconstruction_loss": _read(folder / "validation" / "summary.json")["mean"]["reconstruction_loss"],
                "recipe": _read(folder / "recipe.json"),
                "log": key_lines(work.log(name), work),
            },
        )


def finetune(commands: Commands, settings: Settings, run: Run) -> None:
    """Trains with labels and scores the validation cases, unless that is done.

    nnU-Net predicts the validation cases at the end of a training, with the final weights and with mirroring; these
    predictions are scored. nnUNetv2_predict would make the same ones again.

    Raises:
        CommandFailed: a command failed; the message has the end of its log.
        FileNotFoundError: the pre-training has not been done.
    """
    work, name, arm = commands.work, run.name, run.arm
    with alone(work, name) as lock:
        if not _to_be_done(work, name, lock):
            return
        folder = fold_folder(work, settings, run)
        more: tuple[str, ...] = ()
        if arm.pretraining is not None:
            weights = pretraining_folder(work, settings, arm.pretraining) / FINAL
            if not work.record(arm.pretraining.run).is_file():
                raise FileNotFoundError(
                    f"{name} starts from {weights}, which is not finished: run pretrain first (of an ablation: the "
                    "ablation's command does)"
                )
            more = ("-pretrained_weights", str(weights))
        variables = arm.variables(settings, run.seed) | _loading(settings)
        arguments = (LABELLED_ID, str(run.fold), arm.trainer, arm.plans(settings), settings.device)
        _train(commands, name, arm.name, folder, arguments, variables, lock, more)
        scores = folder / "few_labels_scores.json"
        files = ("-djfile", str(folder.parent / "dataset.json"), "-pfile", str(folder.parent / "plans.json"))
        folders = (str(work.validation_labels), str(folder / "validation"))
        command = ("nnUNetv2_evaluate_folder", *folders, *files, "-o", str(scores), "-np", "1")
        commands.run(name, command, {}, arm.name, lock)
        history = _history(folder)
        _keep(
            work,
            name,
            {
                "arm": arm.name,
                "labels": run.labels,
                "seed": run.seed,
                "fold": run.fold,
                "steps": settings.finetune_steps,
                "seconds": _seconds(history),
                **_made_with(commands, settings),
                "dice": _dice_by_case(_read(scores)),
                "curve": _curve(history, {"train_loss": "train_losses", "val_dice": "mean_fg_dice"}),
                "recipe": {"environment": variables} if arm.stock else _read(folder / "recipe.json"),
                "log": key_lines(work.log(name), work),
            },
        )
        say(f"{name}: Dice {100 * mean_dice(_read(work.record(name))['dice']):.1f}")


def _loading(settings: Settings) -> dict[str, str]:
    return {"nnUNet_n_proc_DA": str(settings.loader_processes)}


def mean_dice(by_case: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over labels of the mean over cases, as nnU-Net averages."""
    labels = next(iter(by_case.values()))
    return sum(sum(case[label] for case in by_case.values()) / len(by_case) for label in labels) / len(labels)


def _to_be_done(work: Work, name: str, lock: int | None) -> bool:
    if lock is None:
        say(f"{name}: another benchmark is at it; left to that one")
    elif work.record(name).is_file():
        say(f"{name}: finished before")
    else:
        say(f"{name}: begins; what it says is in {work.log(name)}")
        return True
    return False


def _train(
    commands: Commands,
    name: str,
    arm: str,
    folder: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    lock: int | None,
    more: Sequence[str] = (),
) -> None:
    """nnUNetv2_train from where the fold's folder stands: new, continued, or its last validation alone.

    Args:
        commands: of the work folder.
        name: of the run.
        arm: whose folder of results is nnU-Net's.
        folder: of the fold.
        arguments: data set, fold, trainer, plans, device.
        variables: the recipe.
        lock: on the run.
        more: words of a new training alone.

    Raises:
        CommandFailed: the training failed, or ended before its end.
    """
    dataset, fold, trainer, plans, device = arguments
    words = [dataset, CONFIGURATION, fold, "-tr", trainer, "-p", plans, "-device", device]
    if (folder / FINAL).is_file():
        words += ["--val"]
    elif any((folder / checkpoint).is_file() for checkpoint in (LATEST, PREVIOUS, BEST)):
        words += ["--c"]
    else:
        words += more
    summary = folder / "validation" / "summary.json"
    if not ((folder / FINAL).is_file() and summary.is_file()):
        threads = commands.threads
        # nnU-Net's CPU trainings take every core
        part = device == "cpu" and threads != os.cpu_count()
        program = ("python", "-m", "benchmarks.few_labels.nnunet_train", str(threads)) if part else ("nnUNetv2_train",)
        commands.run(name, [*program, *words], variables, arm, lock)
    if not summary.is_file():
        # a signal ends our trainers in order, with status 0
        log = end_of_log(commands.work.log(name))
        raise CommandFailed(f"{name} ended before its end; the same command continues it. {log}")


def _history(folder: Path) -> dict[str, list[Any]]:
    """nnU-Net's values per epoch, of the final checkpoint."""
    # stock nnU-Net's checkpoints hold NumPy's numbers, which only a full load restores; ours made this file just now
    return torch.load(folder / FINAL, map_location="cpu", weights_only=False)["logging"]


def _seconds(history: Mapping[str, list[Any]]) -> float:
    """Of all epochs, with their validation; what an interruption cost is not counted."""
    pairs = zip(history["epoch_start_timestamps"], history["epoch_end_timestamps"], strict=True)
    return round(float(sum(end - start for start, end in pairs)), 1)


def _curve(history: Mapping[str, list[Any]], keys: Mapping[str, str]) -> list[dict[str, float | None]]:
    """A value per epoch and name; None where there is none."""
    epochs = range(len(history["train_losses"]))
    missing = [math.nan] * len(epochs)
    return [{name: _number(history.get(key, missing)[epoch]) for name, key in keys.items()} for epoch in epochs]


def _number(value: float) -> float | None:
    return round(float(value), 5) if math.isfinite(value) else None


def _dice_by_case(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        Path(entry["prediction_file"]).name.removesuffix(".nii.gz"): {
            label: metrics["Dice"] for label, metrics in entry["metrics"].items()
        }
        for entry in scores["metric_per_case"]
    }


def _made_with(commands: Commands, settings: Settings) -> dict[str, str]:
    """The code, the versions and the machine."""
    return {
        "commit": _commit(),
        "hyspark_nnunet": __version__,
        "nnunetv2": version("nnunetv2"),
        "torch": torch.__version__,
        "machine": machine(torch.device(settings.device), commands.threads),
    }


def _commit() -> str:
    """The commit of this repository, with "+" where its code was changed; "unknown" outside of a repository."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    code = ("hyspark_nnunet", "benchmarks/few_labels/*.py")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _keep(work: Work, name: str, content: Mapping[str, Any]) -> None:
    with replacing(work.record(name)) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
