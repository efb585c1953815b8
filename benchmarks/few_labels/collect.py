"""From the records of finished runs to the files of the repository."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.few_labels.arms import ARMS
from benchmarks.few_labels.results import read_table
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import Work, read_json, write_json
from hyspark_nnunet.atomic_files import replacing

TABLES = ("runs", "ablations", "cases", "curves", "changes", "pretraining", "pretrainings")
# columns that name a run: its rows are replaced together; and how rows are sorted, the arms before the ablations
SORTED_BY = {
    "arm": lambda arm: f"{arm not in ARMS:d} {arm}",
    "labels": int,
    "seed": int,
    "pretraining": str,
}
# columns in which all runs of an arm agree: each machine pre-trains again and gets other weights; defaults change from
# one commit to the next
ALIKE = {
    "starts from": "start from different weights: {}. Take the pre-training of those that are there already (its "
    "folder of nnUNet_results, and its file in runs/)",
    "trained by": "were trained by different recipes or rates: {}. Compare the recipes in their files in runs/; to "
    "train some again, remove these files and their folders of nnUNet_results",
}


def collect(work: Work, to: Path) -> int:
    """Writes CSV files and recipes, beside those of other runs that are there already; returns the number of runs.

    So the runs of several work folders, of several machines, come together; all must have the same settings.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: the folder holds results of other settings, or runs of an arm differ in more than labels and seed:
            in recipe, rates, or the pre-trained weights they start from.
    """
    records = [read_json(file) for file in work.records()]
    if not records:
        raise FileNotFoundError(f"{work.root} holds no finished run: python -m benchmarks.few_labels run --work ...")
    settings = to / work.settings_file.name
    if settings.is_file() and Settings(**read_json(settings)) != Settings(**read_json(work.settings_file)):
        raise ValueError(
            f"{to} holds results of other settings than {work.root} (compare their {settings.name}): results are "
            "compared with each other. Take the same settings, another folder (collect --to), or remove that one first"
        )
    merged = {name: _merged(read_table(to, name), records, name) for name in TABLES}
    for name in ("runs", "ablations"):
        _check_alike(merged[name])
    for name, table in merged.items():
        if len(table):
            with replacing(to / f"{name}.csv") as beside:  # two benchmarks may share a folder
                table.to_csv(beside, index=False, lineterminator="\n")
    for record in records:
        # all runs of an arm share a recipe but for the seed: that of the last is kept
        write_json(to / "recipes" / f"{record['recipe_name']}.json", record["recipe"])
    for source in (work.prepared_file, work.settings_file):
        shutil.copyfile(source, to / source.name)
    return len(records)


def _merged(earlier: pd.DataFrame, records: list[dict[str, Any]], name: str) -> pd.DataFrame:
    """Earlier rows of other runs, and those of the records."""
    found = pd.DataFrame([row for record in records for row in record["tables"].get(name, [])]).astype(str)
    keys = [column for column in SORTED_BY if column in found or column in earlier]
    if len(earlier) and len(found):
        earlier = earlier[~earlier.set_index(keys).index.isin(found.set_index(keys).index)]
    both = pd.concat([earlier, found]).fillna("")
    return both.sort_values(keys, kind="stable", key=lambda c: c.map(SORTED_BY[c.name])) if keys else both


def _check_alike(runs: pd.DataFrame) -> None:
    """All runs of an arm agree in the columns of ``ALIKE``; the first results do not have them.

    Raises:
        ValueError: they do not.
    """
    for column in runs.columns.intersection(list(ALIKE)):
        for arm, of_arm in runs[runs[column] != ""].groupby("arm"):
            examples = of_arm.drop_duplicates(column).sort_values(column)
            if len(examples) > 1:
                named = [f"{row[column]} ({row.labels} labels, seed {row.seed})" for _, row in examples.iterrows()]
                fault = ALIKE[column].format(", ".join(named))
                raise ValueError(f"runs of {arm} {fault}, or collect into another folder (--to)")
