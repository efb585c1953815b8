"""The results in the repository, and how two arms are compared."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

FOLDER = Path(__file__).resolve().parent / "results"
DRAWS = 10_000
SMOOTHED_OVER = 5  # epochs


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A CSV file as text; empty if there is none."""
    file = folder / f"{name}.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False) if file.is_file() else pd.DataFrame()


class Results:
    """The CSV files that ``collect`` writes; a file that is missing has no rows."""

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
    def _cases(self) -> pd.DataFrame:
        return self.table("cases").pivot(index=["arm", "labels", "seed"], columns="case", values="dice")

    @cached_property
    def _curves(self) -> pd.DataFrame:
        return self.table("curves")

    def dice(self, arm: str, labels: int) -> pd.DataFrame:
        """Dice in points (seeds, cases), mean over labels; no rows if no run is finished."""
        return self._cases.query("arm == @arm and labels == @labels").droplevel(["arm", "labels"])

    def curves(self, arm: str, labels: int) -> pd.DataFrame:
        """nnU-Net's pseudo Dice on validation patches in points (steps, seeds), each the mean of up to five epochs."""
        found = self._curves.query("arm == @arm and labels == @labels")
        table = found.pivot(index="steps", columns="seed", values="val_dice")
        return table.rolling(SMOOTHED_OVER, min_periods=1).mean()


def bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """The mean of paired differences (seeds, cases) with a 95 % bootstrap interval over seeds and cases.

    Every seed is scored on the same cases, so seeds and cases are drawn with replacement independently of each other,
    and a drawn case counts in all drawn seeds (the bootstrap of crossed factors: Owen, "The pigeonhole bootstrap",
    Annals of Applied Statistics 1 (2007) 386-411). The differences between seeds are scaled by sqrt(n / (n - 1)),
    without which the draws of n seeds would vary less than seeds do. With three seeds the interval is still too narrow.
    With one seed only cases vary.
    """
    mean, n_seeds = differences.mean(), len(differences)
    if n_seeds > 1:
        of_seeds = differences.mean(1, keepdims=True) - mean
        differences = differences + of_seeds * (np.sqrt(n_seeds / (n_seeds - 1)) - 1)
    rng = np.random.default_rng(0)
    seeds, cases = (rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64) / n for n in differences.shape)
    low, high = np.quantile((seeds @ differences * cases).sum(1), (0.025, 0.975))
    return float(mean), float(low), float(high)


def shares_to_reach(curves: pd.DataFrame, target: pd.DataFrame) -> list[float]:
    """By seed that both have, the part of the training after which a curve reaches the target's end; NaN: never."""
    seeds = curves.columns.intersection(target.columns)
    reached = (curves[seeds] >= target[seeds].iloc[-1]).to_numpy().T
    return [(by_epoch.argmax() + 1) / len(by_epoch) if by_epoch.any() else np.nan for by_epoch in reached]


def late_rise(curves: pd.DataFrame) -> float:
    """By how much ``Results.curves`` rise in the last five epochs, mean over seeds; NaN if there are fewer than ten."""
    return float(curves.diff(SMOOTHED_OVER).iloc[-1].mean()) if len(curves) >= 2 * SMOOTHED_OVER else np.nan
