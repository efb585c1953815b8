"""What is kept of a finished run: all that tables, plots and the repository need, and no path of the machine."""

import hashlib
import json
import math
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_labels.arms import STOCK, Pretraining, Run
from benchmarks.few_labels.layer_changes import layer_changes
from benchmarks.few_labels.log_lines import key_lines
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import ROOT, Work
from benchmarks.measuring import machine
from hyspark_nnunet import __version__
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.training.checkpoint_folder import FINAL

Record = dict[str, Any]


def keep_pretraining(work: Work, settings: Settings, threads: int, pretraining: Pretraining, folder: Path) -> Record:
    """Writes and returns the record of a pre-training.

    Args:
        work: where it is kept.
        settings: of the training.
        threads: it ran with.
        pretraining: which.
        folder: of its fold.
    """
    history, steps = _checkpoint(folder)["logging"], pretraining.epochs(settings) * settings.pretrain_iterations
    keys = {"train_loss": "train_losses", "val_loss": "val_losses"}
    about = {
        "pretraining": pretraining.name,
        "epochs": pretraining.epochs(settings),
        "steps": steps,
        "weights": fingerprint_of(folder / FINAL),
        "reconstruction_loss": _read(folder / "validation" / "summary.json")["mean"]["reconstruction_loss"],
        "recipe": _read(folder / "recipe.json"),
    }
    return _keep(work, pretraining.run, about | _of_any(work, settings, threads, pretraining.run, history, keys))


def keep_run(
    work: Work, settings: Settings, threads: int, run: Run, folder: Path, scores: Path, weights: Path | None
) -> Record:
    """Writes and returns the record of a training with labels.

    Args:
        work: where it is kept.
        settings: of the training.
        threads: it ran with.
        run: which.
        folder: of its fold.
        scores: what nnUNetv2_evaluate_folder has written.
        weights: checkpoint of the pre-training that it started from; None: it started from random weights.
    """
    keys = {"train_loss": "train_losses", "val_dice": "mean_fg_dice"}
    checkpoint = _checkpoint(folder)
    about = {
        "arm": run.arm.name,
        "labels": run.labels,
        "seed": run.seed,
        "fold": run.fold,
        "steps": run.arm.epochs(settings) * settings.finetune_iterations,
        "dice": _dice_by_case(_read(scores)),
        "starts_from": "" if weights is None else fingerprint_of(weights),
        "changes": {} if weights is None else _changes(weights, folder / FINAL),
        "recipe": run.arm.variables(settings, run.seed) if run.arm.family == STOCK else _read(folder / "recipe.json"),
        "peak_rates": _peak_rates(checkpoint),
    }
    return _keep(work, run.name, about | _of_any(work, settings, threads, run.name, checkpoint["logging"], keys))


def fingerprint_of(file: Path) -> str:
    """A number for the content of a checkpoint: runs from one pre-training have the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def mean_dice(by_case: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over labels of the mean over cases, as nnU-Net averages.

    Args:
        by_case: Dice by case and label.
    """
    labels = next(iter(by_case.values()))
    return sum(sum(case[label] for case in by_case.values()) / len(by_case) for label in labels) / len(labels)


def _of_any(
    work: Work, settings: Settings, threads: int, name: str, history: Mapping[str, list[Any]], keys: Mapping[str, str]
) -> Record:
    return {
        "seconds": _seconds(history),
        "cpu_seconds": _cpu_seconds(work, name),
        "commit": _commit(),
        "hyspark_nnunet": __version__,
        "nnunetv2": version("nnunetv2"),
        "torch": torch.__version__,
        "machine": machine(torch.device(settings.device), threads),
        "curve": _curve(history, keys),
        "log": key_lines(work.log(name), work),
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    """The final one, with nnU-Net's values per epoch."""
    # stock nnU-Net's checkpoints hold NumPy's numbers, which only a full load restores; this file was made here
    return torch.load(folder / FINAL, map_location="cpu", weights_only=False)


def _peak_rates(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The rate before its schedule, of each of the optimizer's groups: recipes do not tell those of layers."""
    groups = checkpoint["optimizer_state"]["param_groups"]
    # six digits: 1/128 to the power of 1/7 is not 0.5 to the last bit
    return {str(group.get("name", number)): float(f"{group['initial_lr']:.6g}") for number, group in enumerate(groups)}


def _changes(before: Path, after: Path) -> dict[str, float]:
    changes = layer_changes(read_weights(before).state, read_weights(after).state)
    return {layer: float(f"{change:.3g}") for layer, change in changes.items()}


def _seconds(history: Mapping[str, list[Any]]) -> float:
    """Of all epochs, with their validation; what an interruption cost is not counted."""
    pairs = zip(history["epoch_start_timestamps"], history["epoch_end_timestamps"], strict=True)
    return round(float(sum(end - start for start, end in pairs)), 1)


def _cpu_seconds(work: Work, name: str) -> float:
    """Of all commands of a run, with the last validation: what else the machine did does not count."""
    return round(sum(map(float, work.cpu_seconds(name).read_text(encoding="utf-8").split())), 1)


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


def _commit() -> str:
    """The commit of this repository, with "+" where its code was changed; "unknown" outside of a repository."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    code = ("hyspark_nnunet", "benchmarks/few_labels/*.py")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _keep(work: Work, name: str, record: Record) -> Record:
    with replacing(work.record(name)) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
