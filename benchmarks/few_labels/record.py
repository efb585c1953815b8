"""What is kept of a finished run: the rows of all tables, its recipe, and no path of the machine."""

import hashlib
import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.few_labels.arms import ARMS, STOCK, Pretraining, Run
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.work import ROOT, Work, read_json, write_json
from benchmarks.measuring import machine
from hyspark_nnunet import __version__
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.training.checkpoint_folder import FINAL
from hyspark_nnunet.training.optimization import layer_of

Row = dict[str, Any]
SUMMARY = Path("validation", "summary.json")


def keep_pretraining(work: Work, settings: Settings, pretraining: Pretraining, folder: Path) -> None:
    """Writes the record of a pre-training; ``folder`` is that of its fold."""
    history, about = _checkpoint(folder)["logging"], {"pretraining": pretraining.name}
    keys = {"train_loss": "train_losses", "val_loss": "val_losses"}
    curve = _curve(about, history, settings.pretrain_iterations, keys)
    summary = {
        **about,
        "epochs": len(curve),
        "steps": curve[-1]["steps"],
        "first loss": curve[0]["val_loss"],
        "last loss": curve[-1]["val_loss"],
        "loss of whole cases": f"{read_json(folder / SUMMARY)['mean']['reconstruction_loss']:.4f}",
        **_circumstances(work, settings, pretraining.run, history),
        "weights": fingerprint_of(folder / FINAL),
    }
    tables = {"pretrainings": [summary], "pretraining": curve}
    _keep(work, pretraining.run, pretraining.run, tables, read_json(folder / "recipe.json"))


def keep_run(work: Work, settings: Settings, run: Run, folder: Path, weights: Path | None) -> float:
    """Writes the record of a training with labels; returns its Dice.

    Args:
        work: where it is kept.
        settings: of the training.
        run: which.
        folder: of its fold.
        weights: checkpoint of the pre-training that it started from; None: it started from random weights.

    Raises:
        ValueError: nnU-Net has scored other cases than those for validation.
    """
    checkpoint, about = _checkpoint(folder), {"arm": run.arm.name, "labels": run.labels, "seed": run.seed}
    history, keys = checkpoint["logging"], {"train_loss": "train_losses", "val_dice": "mean_fg_dice"}
    curve = _curve(about, history, settings.finetune_iterations, keys)
    dice = dice_of(folder, Splits.read(work.splits_file).validation)
    recipe = run.arm.variables(settings, run.seed) if run.arm.family == STOCK else read_json(folder / "recipe.json")
    recipe |= {"peak_rates": _peak_rates(checkpoint)}
    row = {
        **about,
        "fold": run.fold,
        **dice.mean(skipna=False).map("{:.5f}".format),
        "steps": curve[-1]["steps"],
        **_circumstances(work, settings, run.name, history),
        "starts from": "" if weights is None else fingerprint_of(weights),
        "trained by": digest_of(recipe),
    }
    before, after = (read_weights(file).state for file in (weights, folder / FINAL)) if weights else ({}, {})
    tables = {
        "runs" if run.arm.name in ARMS else "ablations": [row],
        "cases": [{**about, "case": case, **scores.map("{:.5f}".format)} for case, scores in dice.iterrows()],
        "curves": curve,
        "changes": [{**about, "layer": k, "change": f"{v:.3g}"} for k, v in layer_changes(before, after).items()],
    }
    _keep(work, run.name, run.arm.name, tables, recipe)
    return float(row["dice"])


def fingerprint_of(file: Path) -> str:
    """A number for the content of a checkpoint: runs from one pre-training have the same."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def digest_of(recipe: Mapping[str, Any]) -> str:
    """A number for all that a recipe says but the seed; ``layer_decay`` counts by the rates it gave."""
    fields = {name: value for name, value in recipe.get("recipe", recipe).items() if "seed" not in name.lower()}
    fields |= {"layer_decay": None, "peak_rates": recipe["peak_rates"]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def dice_of(folder: Path, validation: Sequence[str]) -> pd.DataFrame:
    """Dice by case (rows) as nnU-Net's last validation has scored it: the mean over labels, and each label's.

    NaN, which nnU-Net writes for a label that is neither in a case nor predicted, is not left out of means.

    Args:
        folder: of the fold.
        validation: the cases.

    Raises:
        ValueError: other cases were scored.
    """
    ending, dice = read_json(folder.parent / "dataset.json")["file_ending"], {}
    for entry in read_json(folder / SUMMARY)["metric_per_case"]:
        case = Path(entry["prediction_file"]).name.removesuffix(ending)
        dice[case] = {f"dice_{label}": scores["Dice"] for label, scores in sorted(entry["metrics"].items())}
    if dice.keys() != {*validation}:
        raise ValueError(
            f"{folder / SUMMARY} has scores of {', '.join(sorted(dice))}, but splits.json names "
            f"{', '.join(sorted(validation))} for validation: remove {folder} to train again"
        )
    table = pd.DataFrame.from_dict(dice, orient="index").sort_index()
    table.insert(0, "dice", table.mean(axis=1, skipna=False))
    return table


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Per layer of the encoder, the norm of the change of its weights in parts of the norm they had.

    Norms and biases, of one dimension, and weights that are in one network alone are left out.
    """
    moved: dict[str, float] = defaultdict(float)
    had: dict[str, float] = defaultdict(float)
    for name, weights in after.items():
        if name.startswith("encoder.") and weights.ndim > 1 and name in before:
            moved[layer_of(name)] += float((weights - before[name]).double().square().sum())
            had[layer_of(name)] += float(before[name].double().square().sum())
    return {layer: (moved[layer] / had[layer]) ** 0.5 for layer in moved}


def _curve(about: Row, history: Mapping[str, list[Any]], per_epoch: int, keys: Mapping[str, str]) -> list[Row]:
    """A row per epoch."""
    rows = zip(*(map(_number, history[key]) for key in keys.values()), strict=True)
    return [
        {**about, "epoch": epoch, "steps": epoch * per_epoch, **dict(zip(keys, row, strict=True))}
        for epoch, row in enumerate(rows, 1)
    ]


def _number(value: float) -> float | str:
    return round(float(value), 5) if math.isfinite(value) else ""


def _circumstances(work: Work, settings: Settings, name: str, history: Mapping[str, list[Any]]) -> Row:
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
        "machine": machine(torch.device(settings.device), work.threads),
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
    write_json(work.record(name), {"name": name, "tables": tables, "recipe_name": recipe_name, "recipe": recipe})
