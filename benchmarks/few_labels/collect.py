"""From the records of finished runs to the files of the repository."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.few_labels.arms import ARMS
from benchmarks.few_labels.results import read_table
from benchmarks.few_labels.settings import read_settings
from benchmarks.few_labels.work import Work
from hyspark_nnunet.atomic_files import replacing

TABLES = ("runs", "ablations", "cases", "curves", "changes", "pretraining", "pretrainings")
# what names a run in each file: rows of a run are replaced together
RUN_COLUMNS = ["arm", "labels", "seed", "pretraining"]
# each machine pre-trains again and gets other weights; defaults change from one commit to the next
ALIKE = {
    "starts from": (
        "start from different weights",
        "Take the pre-training of those that are there already (its folder of nnUNet_results, and its file in runs/)",
    ),
    "trained by": (
        "were trained by different recipes or rates",
        "Compare the recipes in their files in runs/; to train some again, remove these files and their folders of "
        "nnUNet_results",
    ),
}


def collect(work: Work, to: Path, quietly: bool = False) -> None:
    """Writes CSV files and recipes, beside those of other runs that are there already.

    Runs of several work folders, of several machines, come together so; all with the same settings.

    Args:
        work: the folder of the runs.
        to: the folder of the results.
        quietly: do not say what was collected.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: the folder holds results of other settings, or runs of an arm differ in more than labels and seed:
            in recipe, rates, or the pre-trained weights they start from.
    """
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(work.record("x").parent.glob("*.json"))]
    if not records:
        raise FileNotFoundError(f"{work.root} holds no finished run: python -m benchmarks.few_labels run --work ...")
    settings = to / work.settings_file.name
    if settings.is_file() and read_settings(settings) != read_settings(work.settings_file):
        raise ValueError(
            f"{to} holds results of other settings than {work.root} (compare their {settings.name}): results are "
            "compared with each other. Take the same settings, another folder (collect --to), or remove that one first"
        )
    merged = {name: _merged(read_table(to, name), records, name) for name in TABLES}
    for name in ("runs", "ablations"):
        for column in ALIKE:
            _check_alike(merged[name], column)
    for folder in (to, to / "recipes"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, table in merged.items():
        if len(table):
            with replacing(to / f"{name}.csv") as beside:  # two benchmarks may share a folder
                table.to_csv(beside, index=False, lineterminator="\n")
    for record in records:
        # all runs of an arm share a recipe but for the seed: that of the last is kept
        _write(to / "recipes" / f"{record['recipe_name']}.json", json.dumps(record["recipe"], indent=1))
    for source in (work.prepared_file, work.settings_file):
        _write(to / source.name, source.read_text(encoding="utf-8").strip())
    if not quietly:
        print(f"{len(records)} runs are in {to}", flush=True)


def _merged(earlier: pd.DataFrame, records: Sequence[dict[str, Any]], name: str) -> pd.DataFrame:
    """Earlier rows of other runs, and those of the records; arms in their order, then ablations."""
    rows = [row for record in records for row in record["tables"].get(name, [])]
    found = pd.DataFrame(rows).astype(str) if rows else earlier.iloc[:0]
    keys = [column for column in RUN_COLUMNS if column in found or column in earlier]
    if len(earlier) and len(found):
        here = set(found[keys].itertuples(index=False, name=None))
        earlier = earlier[[run not in here for run in earlier[keys].itertuples(index=False, name=None)]]
    both = pd.concat([earlier, found]).fillna("")
    places = {arm: place for place, arm in enumerate(ARMS)}
    order = [
        (places.get(run[0], len(places)), run[0], *map(int, run[1:])) for run in both[keys].itertuples(index=False)
    ]
    return both.iloc[sorted(range(len(both)), key=order.__getitem__)]


def _check_alike(runs: pd.DataFrame, column: str) -> None:
    """All runs of an arm have the same there; the first results do not know it.

    Raises:
        ValueError: they do not.
    """
    fault, way_out = ALIKE[column]
    known = runs[runs[column] != ""] if column in runs else runs.iloc[:0]
    for arm, of_arm in known.groupby("arm") if len(known) else ():
        examples = of_arm.drop_duplicates(column).sort_values(column)
        if len(examples) > 1:
            named = ", ".join(f"{row[column]} ({row.labels} labels, seed {row.seed})" for _, row in examples.iterrows())
            raise ValueError(f"runs of {arm} {fault}: {named}. {way_out}, or collect into another folder (--to)")


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")
