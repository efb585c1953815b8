"""How two arms are compared: a bootstrap of the paired difference, and steps to reach a Dice on noisy curves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

DRAWS = 10_000
SMOOTHED_OVER = 5  # epochs


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval.

    Attributes:
        mean: over seeds and cases.
        low, high: of the interval that holds 95 % of the bootstrap's draws.
    """

    mean: float
    low: float
    high: float


def paired_difference(first: Floats, second: Floats) -> Difference:
    """The mean of ``first - second``, with a bootstrap interval over seeds and cases.

    Every seed is scored on the same cases, so seeds and cases are drawn with replacement independently of each other,
    and a drawn case counts in all drawn seeds (the bootstrap of crossed factors: Owen, "The pigeonhole bootstrap",
    Annals of Applied Statistics 1 (2007) 386-411). What seeds differ by is scaled by sqrt(n / (n - 1)), without which
    the draws of n seeds would vary less than seeds do. With three seeds it is too narrow all the same: three values
    say little of how far others may lie. With one seed only cases vary.

    Args:
        first: (seeds, cases), paired with ``second`` in both.
        second: (seeds, cases).

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"scores {first.shape} and {second.shape} are not paired: both must be (seeds, cases)")
    differences = first - second
    mean, n_seeds = differences.mean(), len(differences)
    if n_seeds > 1:
        of_seeds = differences.mean(1, keepdims=True) - mean
        differences = differences + of_seeds * (np.sqrt(n_seeds / (n_seeds - 1)) - 1)
    rng = np.random.default_rng(0)
    seeds, cases = (rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64) / n for n in differences.shape)
    means = (seeds @ differences * cases).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(mean), float(low), float(high))


def smoothed(curve: Sequence[float]) -> Floats:
    """The mean of each epoch and the ``SMOOTHED_OVER - 1`` before it, of fewer at the start."""
    return pd.Series(curve, dtype=np.float64).rolling(SMOOTHED_OVER, min_periods=1).mean().to_numpy()


def share_to_reach(curve: Sequence[float], target: float) -> float:
    """The part of a training after which its smoothed curve first reaches ``target``; infinite where it never does."""
    reached = np.flatnonzero(smoothed(curve) >= target)
    return float(reached[0] + 1) / len(curve) if len(reached) else float("inf")


def late_rise(curves: Sequence[Sequence[float]]) -> float:
    """How much the mean of the last ``SMOOTHED_OVER`` epochs is above that of as many before; mean over curves.

    NaN where the curves are too short.
    """
    if min(map(len, curves)) < 2 * SMOOTHED_OVER:
        return float("nan")
    last = [smoothed(curve) for curve in curves]
    return float(np.mean([values[-1] - values[-1 - SMOOTHED_OVER] for values in last]))
