"""The results in the repository, as they are read for tables and plots."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.few_labels.comparison import Floats

FOLDER = Path(__file__).resolve().parent / "results"
Row = dict[str, str]


@dataclass(frozen=True)
class Results:
    """The CSV files that ``collect`` writes; a file that is not there has no rows.

    Args:
        folder: of the files.
    """

    folder: Path

    def rows(self, name: str) -> list[Row]:
        """Rows of a file."""
        file = self.folder / f"{name}.csv"
        if not file.is_file():
            return []
        with open(file, newline="", encoding="utf-8") as text:
            return list(csv.DictReader(text))

    def seeds(self, labels: int, *arms: str) -> list[int]:
        """Seeds that are finished in all of these arms."""
        found = [
            {int(r["seed"]) for r in self._runs() if r["arm"] == arm and int(r["labels"]) == labels} for arm in arms
        ]
        return sorted(set.intersection(*found))

    def dice(self, arm: str, labels: int, seeds: Sequence[int]) -> Floats:
        """Dice (seeds, cases) in points, mean over labels; cases in the order of their names."""
        by_seed: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
        for row in self.rows("cases"):
            if row["arm"] == arm and int(row["labels"]) == labels and int(row["seed"]) in by_seed:
                by_seed[int(row["seed"])][row["case"]] = 100 * float(row["dice"])
        cases = sorted(next(iter(by_seed.values())))
        return np.array([[by_seed[seed][case] for case in cases] for seed in seeds])

    def curve(self, arm: str, labels: int, seed: int) -> tuple[list[int], list[float]]:
        """Steps, and nnU-Net's pseudo Dice on validation patches in points, per epoch."""
        rows = [
            row
            for row in self.rows("curves")
            if (row["arm"], int(row["labels"]), int(row["seed"])) == (arm, labels, seed)
        ]
        return [int(row["steps"]) for row in rows], [100 * float(row["val_dice"] or "nan") for row in rows]

    def ablations(self) -> Iterable[tuple[str, int]]:
        """Names of ablations with their numbers of labels, in the order of the file."""
        return dict.fromkeys((row["arm"], int(row["labels"])) for row in self.rows("ablations"))

    def _runs(self) -> list[Row]:
        return self.rows("runs") + self.rows("ablations")
