"""What is kept of a finished run: the rows of all tables, its recipe, and no path of the machine."""

import hashlib
import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.few_labels.arms import ARMS, STOCK, Pretraining, Run
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import ROOT, Work
from benchmarks.measuring import machine
from hyspark_nnunet import __version__
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.training.checkpoint_folder import FINAL
from hyspark_nnunet.training.optimization import layer_of

Row = dict[str, Any]


def keep_pretraining(work: Work, settings: Settings, threads: int, pretraining: Pretraining, folder: Path) -> None:
    """Writes the record of a pre-training.

    Args:
        work: where it is kept.
        settings: of the training.
        threads: it ran with.
        pretraining: which.
        folder: of its fold.
    """
    history, per_epoch = _checkpoint(folder)["logging"], settings.pretrain_iterations
    about = {"pretraining": pretraining.name}
    curve = _curve(about, history, per_epoch, {"train_loss": "train_losses", "val_loss": "val_losses"})
    summary = {
        **about,
        "epochs": len(curve),
        "steps": curve[-1]["steps"],
        "first loss": curve[0]["val_loss"],
        "last loss": curve[-1]["val_loss"],
        "loss of whole cases": f"{_read(folder / 'validation' / 'summary.json')['mean']['reconstruction_loss']:.4f}",
        **_circumstances(work, settings, threads, pretraining.run, history),
        "weights": fingerprint_of(folder / FINAL),
    }
    tables = {"pretrainings": [summary], "pretraining": curve}
    _keep(work, pretraining.run, pretraining.run, tables, _read(folder / "recipe.json"))


def keep_run(
    work: Work, settings: Settings, threads: int, run: Run, folder: Path, scores: Path, weights: Path | None
) -> float:
    """Writes the record of a training with labels; returns its Dice.

    Args:
        work: where it is kept.
        settings: of the training.
        threads: it ran with.
        run: which.
        folder: of its fold.
        scores: what nnUNetv2_evaluate_folder has written.
        weights: checkpoint of the pre-training that it started from; None: it started from random weights.
    """
    checkpoint, about = _checkpoint(folder), {"arm": run.arm.name, "labels": run.labels, "seed": run.seed}
    history, per_epoch = checkpoint["logging"], settings.finetune_iterations
    curve = _curve(about, history, per_epoch, {"train_loss": "train_losses", "val_dice": "mean_fg_dice"})
    dice = dice_by_case(_read(scores))
    recipe = run.arm.variables(settings, run.seed) if run.arm.family == STOCK else _read(folder / "recipe.json")
    recipe |= {"peak_rates": _peak_rates(checkpoint)}
    cases = [{**about, "case": case, **_means([labels])} for case, labels in sorted(dice.items())]
    row = {
        **about,
        "fold": run.fold,
        **_means(list(dice.values())),
        "steps": curve[-1]["steps"],
        **_circumstances(work, settings, threads, run.name, history),
        "starts from": "" if weights is None else fingerprint_of(weights),
        "trained by": digest_of(recipe),
    }
    before, after = (read_weights(file).state for file in (weights, folder / FINAL)) if weights else ({}, {})
    changes = [
        {**about, "layer": layer, "change": f"{change:.3g}"} for layer, change in layer_changes(before, after).items()
    ]
    tables = {"runs" if run.arm.name in ARMS else "ablations": [row], "cases": cases, "curves": curve}
    _keep(work, run.name, run.arm.name, {**tables, "changes": changes}, recipe)
    return float(row["dice"])


def fingerprint_of(file: Path) -> str:
    """A number for the content of a checkpoint: runs from one pre-training have the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def digest_of(recipe: Mapping[str, Any]) -> str:
    """A number for all that a recipe says but the seed; ``layer_decay`` counts by the rates it gave."""
    fields = {name: value for name, value in recipe.get("recipe", recipe).items() if "seed" not in name.lower()}
    fields |= {"layer_decay": None, "peak_rates": recipe["peak_rates"]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def dice_by_case(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Dice by case and label, from what nnU-Net has written."""
    return {
        Path(entry["prediction_file"]).name.split(".")[0]: {
            label: metrics["Dice"] for label, metrics in entry["metrics"].items()
        }
        for entry in scores["metric_per_case"]
    }


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Per layer of the encoder, the norm of the change of its weights in parts of the norm they had.

    Args:
        before: weights of a network of ours; norms and biases, of one dimension, are left out.
        after: of the same names and shapes where they are in both.
    """
    moved: dict[str, float] = defaultdict(float)
    had: dict[str, float] = defaultdict(float)
    for name, weights in after.items():
        if name.startswith("encoder.") and weights.ndim > 1 and name in before:
            moved[layer_of(name)] += float((weights - before[name]).double().square().sum())
            had[layer_of(name)] += float(before[name].double().square().sum())
    return {layer: (moved[layer] / had[layer]) ** 0.5 for layer in moved}


def _means(dice: list[dict[str, float]]) -> Row:
    """Mean over labels of the mean over cases, as nnU-Net averages, and each label's."""
    means = {label: sum(case[label] for case in dice) / len(dice) for label in sorted(dice[0])}
    labels = {f"dice_{label}": f"{mean:.5f}" for label, mean in means.items()}
    return {"dice": f"{sum(means.values()) / len(means):.5f}", **labels}


def _curve(about: Row, history: Mapping[str, list[Any]], per_epoch: int, keys: Mapping[str, str]) -> list[Row]:
    """A row per epoch."""
    epochs = range(1, len(history["train_losses"]) + 1)
    numbers = [{name: _number(history[key][epoch - 1]) for name, key in keys.items()} for epoch in epochs]
    return [{**about, "epoch": epoch, "steps": epoch * per_epoch, **numbers[epoch - 1]} for epoch in epochs]


def _number(value: float) -> float | str:
    return round(float(value), 5) if math.isfinite(value) else ""


def _circumstances(work: Work, settings: Settings, threads: int, name: str, history: Mapping[str, list[Any]]) -> Row:
    """Times (of epochs with their validation; CPU time of all commands of a run, with the last validation), origin."""
    pairs = zip(history["epoch_start_timestamps"], history["epoch_end_timestamps"], strict=True)
    spent = work.cpu_seconds(name).read_text(encoding="utf-8").split()
    begun = work.log(name).read_text(encoding="utf-8", errors="replace").count("\n$ ")
    return {
        "seconds": round(float(sum(end - start for start, end in pairs)), 1),
        # a command whose benchmark was killed left no time
        "CPU seconds": round(sum(map(float, spent)), 1) if len(spent) == begun else "",
        "commit": _commit(),
        "hyspark_nnunet": __version__,
        "nnunetv2": version("nnunetv2"),
        "torch": torch.__version__,
        "machine": machine(torch.device(settings.device), threads),
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


def _commit() -> str:
    """The commit of this repository, with "+" where its code was changed; "unknown" outside of a repository."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    code = ("hyspark_nnunet", "benchmarks/few_labels/*.py")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True, check=False)
    return "unknown" if head.returncode else head.stdout.strip() + ("+" if changed.returncode else "")


def _keep(work: Work, name: str, recipe_name: str, tables: Mapping[str, list[Row]], recipe: Row) -> None:
    record = {"name": name, "tables": tables, "recipe_name": recipe_name, "recipe": recipe}
    with replacing(work.record(name)) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n")


def _read(file: Path) -> Row:
    return json.loads(file.read_text(encoding="utf-8"))
