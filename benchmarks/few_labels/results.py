"""The results in the repository, as they are read for tables and plots."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from benchmarks.few_labels.comparison import Floats

FOLDER = Path(__file__).resolve().parent / "results"


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A CSV file as text; empty if there is none."""
    file = folder / f"{name}.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False) if file.is_file() else pd.DataFrame()


class Results:
    """The CSV files that ``collect`` writes; a file that is not there has no rows.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def table(self, name: str) -> pd.DataFrame:
        """A file, with numbers of labels, seeds, steps and Dice as numbers, Dice in points."""
        table = read_table(self.folder, name)
        for column in table.columns.intersection(["labels", "seed", "steps"]):
            table[column] = table[column].astype(int)
        for column in table.columns.intersection(["dice", "val_dice"]):
            table[column] = 100 * pd.to_numeric(table[column])
        return table

    @cached_property
    def runs(self) -> pd.DataFrame:
        """All trainings with labels: those of the arms, then those of ablations."""
        return pd.concat([self.table("runs"), self.table("ablations")], ignore_index=True)

    @cached_property
    def cases(self) -> pd.DataFrame:
        """Dice by arm, number of labels and seed (rows), and case (columns)."""
        return self.table("cases").pivot(index=["arm", "labels", "seed"], columns="case", values="dice")

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Rows of epochs by arm, number of labels and seed."""
        return self.table("curves").set_index(["arm", "labels", "seed"]).sort_index(kind="stable")

    @property
    def labels(self) -> list[int]:
        """Numbers of labelled cases."""
        return sorted(set(self.runs["labels"]))

    def seeds(self, labels: int, *arms: str) -> list[int]:
        """Seeds that are finished in all of these arms."""
        runs = self.runs[self.runs["labels"] == labels]
        return sorted(set.intersection(*(set(runs[runs["arm"] == arm]["seed"]) for arm in arms)))

    def dice(self, arm: str, labels: int, seeds: Sequence[int]) -> Floats:
        """Dice (seeds, cases) in points, mean over labels; cases in the order of their names."""
        return self.cases.loc[[(arm, labels, seed) for seed in seeds]].to_numpy()

    def curve(self, arm: str, labels: int, seed: int) -> tuple[list[int], list[float]]:
        """Steps, and nnU-Net's pseudo Dice on validation patches in points, per epoch."""
        found = self.curves.loc[[(arm, labels, seed)]]
        return found["steps"].tolist(), found["val_dice"].tolist()
