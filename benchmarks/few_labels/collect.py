"""From the records of finished runs to the files of the repository."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.few_labels.arms import ARMS
from benchmarks.few_labels.record import mean_dice
from benchmarks.few_labels.results import Results, Row
from benchmarks.few_labels.settings import read_settings
from benchmarks.few_labels.work import Work
from benchmarks.measuring import write_csv

PROVENANCE = ("commit", "hyspark_nnunet", "nnunetv2", "torch", "machine")
# what names a run in each file: rows of a run are replaced together
RUN_COLUMNS = ("arm", "labels", "seed", "pretraining")
CPU = "CPU seconds"
STARTS, TRAINED = "starts from", "trained by"
# each machine pre-trains again and gets other weights; defaults change from one commit to the next
ALIKE = {
    STARTS: (
        "start from different weights",
        "Take the pre-training of those that are there already (its folder of nnUNet_results, and its file in runs/)",
    ),
    TRAINED: (
        "were trained by different recipes or rates",
        "Compare what their files in runs/ say under recipe and peak_rates; to train some again, remove these "
        "files and their folders of nnUNet_results",
    ),
}


def collect(work: Work, to: Path, quietly: bool = False) -> None:
    """Writes CSV files, recipes and key lines of logs, beside those of other runs that are there already.

    Runs of several work folders, of several machines, come together so; all with the same settings.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: the folder holds results of other settings, or runs of an arm differ in more than labels and seed:
            in recipe, rates, or the pre-trained weights they start from.
    """
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(work.record("x").parent.glob("*.json"))]
    if not records:
        raise FileNotFoundError(f"{work.root} holds no finished run: python -m benchmarks.few_labels run --work ...")
    pretrainings = [record for record in records if "pretraining" in record]
    runs = [record for record in records if "arm" in record]
    check_settings(work, to)
    rows = {
        "runs": [_run_row(run) for run in runs if run["arm"] in ARMS],
        "ablations": [_run_row(run) for run in runs if run["arm"] not in ARMS],
        "cases": [row for run in runs for row in _case_rows(run)],
        "curves": [row for run in runs for row in _curve_rows(run)],
        "changes": [row for run in runs for row in _change_rows(run)],
        "pretraining": [row for record in pretrainings for row in _pretraining_rows(record)],
        "pretrainings": [
            {
                "pretraining": record["pretraining"],
                "epochs": record["epochs"],
                "steps": record["steps"],
                "first loss": record["curve"][0]["val_loss"],
                "last loss": record["curve"][-1]["val_loss"],
                "loss of whole cases": f"{record['reconstruction_loss']:.4f}",
                "seconds": record["seconds"],
                CPU: record["cpu_seconds"],
                **{key: record[key] for key in PROVENANCE},
                "weights": record["weights"],
            }
            for record in pretrainings
        ],
    }
    earlier = Results(to)
    merged = {
        name: sorted([*_of_other_runs(earlier.rows(name), found), *found], key=_order) for name, found in rows.items()
    }
    for name in ("runs", "ablations"):
        for column in ALIKE:
            _check_alike(merged[name], column)
    for name, both in merged.items():
        if both:
            columns = dict.fromkeys([key for row in both for key in row], "")
            write_csv(to / f"{name}.csv", [columns | row for row in both])
    for record in [*pretrainings, *runs]:
        _write_lines(to / "logs" / f"{_name(record)}.txt", record["log"])
    for name, recipe in {_recipe_name(record): _recipe(record) for record in [*pretrainings, *runs]}.items():
        _write_lines(to / "recipes" / f"{name}.json", json.dumps(recipe, indent=1).splitlines())
    for source in (work.prepared_file, work.settings_file):
        _write_lines(to / source.name, source.read_text(encoding="utf-8").splitlines())
    if not quietly:
        print(f"{len(pretrainings)} pre-trainings and {len(runs)} trainings with labels are in {to}", flush=True)


def check_settings(work: Work, results: Path) -> None:
    """Results of a folder and runs of a work folder are comparable.

    Raises:
        ValueError: their settings differ.
    """
    here, there = work.settings_file, results / work.settings_file.name
    if there.is_file() and read_settings(there) != read_settings(here):
        raise ValueError(
            f"{results} holds results of other settings than {work.root} (compare their {there.name}): results are "
            "compared with each other. Take the same settings, another folder (collect --to), or remove that one first"
        )


def _check_alike(runs: Sequence[Mapping[str, Any]], column: str) -> None:
    """All runs of an arm have the same there.

    Raises:
        ValueError: they do not.
    """
    fault, way_out = ALIKE[column]
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        if run.get(column):  # not known of the first results
            found.setdefault(run["arm"], {}).setdefault(run[column], f"{run['labels']} labels, seed {run['seed']}")
    for arm, examples in found.items():
        if len(examples) > 1:
            named = ", ".join(f"{value} ({run})" for value, run in sorted(examples.items()))
            raise ValueError(f"runs of {arm} {fault}: {named}. {way_out}, or collect into another folder (--to)")


def _of_other_runs(rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> list[Row]:
    here = {_run_of(row) for row in found}
    return [row for row in rows if _run_of(row) not in here]


def _run_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in RUN_COLUMNS if column in row)


def _order(row: Mapping[str, Any]) -> tuple[int, str, int, int]:
    """Arms in their order, then ablations; rows of a run stay as they are."""
    arm = str(row.get("arm", row.get("pretraining")))
    place = list(ARMS).index(arm) if arm in ARMS else len(ARMS)
    return place, arm, int(row.get("labels", 0)), int(row.get("seed", 0))


def _name(record: Mapping[str, Any]) -> str:
    if "pretraining" in record:
        return f"pretrain_{record['pretraining']}"
    return f"{record['arm']}_labels{record['labels']}_seed{record['seed']}"


def _recipe_name(record: Mapping[str, Any]) -> str:
    """All runs of an arm share a recipe but for the seed: that of the last is kept."""
    return _name(record) if "pretraining" in record else record["arm"]


def _recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """With the rates in force, which a recipe leaves to the start of the training where it has no ``layer_decay``."""
    return {**record["recipe"], **({"peak_rates": record["peak_rates"]} if "peak_rates" in record else {})}


def _digest(recipe: Mapping[str, Any]) -> str:
    """A number for all that a recipe says but the seed; ``layer_decay`` counts by the rates it gave."""
    fields = {name: value for name, value in recipe.get("recipe", recipe).items() if "seed" not in name.lower()}
    fields |= {"layer_decay": None, "peak_rates": recipe["peak_rates"]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    dice: dict[str, dict[str, float]] = run["dice"]
    labels = sorted(next(iter(dice.values())))
    means = {label: sum(case[label] for case in dice.values()) / len(dice) for label in labels}
    return {
        **{key: run[key] for key in ("arm", "labels", "seed", "fold")},
        "dice": f"{mean_dice(dice):.5f}",
        **{f"dice_{label}": f"{mean:.5f}" for label, mean in means.items()},
        "steps": run["steps"],
        "seconds": run["seconds"],
        CPU: run["cpu_seconds"],
        **{key: run[key] for key in PROVENANCE},
        STARTS: run["starts_from"],
        TRAINED: _digest(_recipe(run)) if "peak_rates" in run else "",
    }


def _case_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **{key: run[key] for key in ("arm", "labels", "seed")},
            "case": case,
            "dice": f"{sum(dice.values()) / len(dice):.5f}",
            **{f"dice_{label}": f"{value:.5f}" for label, value in sorted(dice.items())},
        }
        for case, dice in sorted(run["dice"].items())
    ]


def _curve_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    per_epoch = run["steps"] // len(run["curve"])
    return [
        {
            **{key: run[key] for key in ("arm", "labels", "seed")},
            "epoch": epoch,
            "steps": epoch * per_epoch,
            "train_loss": values["train_loss"],
            "val_dice": values["val_dice"],
        }
        for epoch, values in enumerate(run["curve"], start=1)
    ]


def _change_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    about = {key: run[key] for key in ("arm", "labels", "seed")}
    return [{**about, "layer": layer, "change": f"{change:.3g}"} for layer, change in run["changes"].items()]


def _pretraining_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    per_epoch = record["steps"] // record["epochs"]
    return [
        {
            "pretraining": record["pretraining"],
            "epoch": epoch,
            "steps": epoch * per_epoch,
            **{key: _or_empty(values[key]) for key in ("train_loss", "val_loss")},
        }
        for epoch, values in enumerate(record["curve"], start=1)
    ]


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
