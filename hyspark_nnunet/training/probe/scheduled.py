"""When a pre-training scores its encoder with the linear probe, and what it logs about it."""

import math
from collections.abc import Callable, Sequence
from time import time
from typing import Any

from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.probe.cases import LabelledCases
from hyspark_nnunet.training.probe.linear_probe import LinearProbe, ProbeScore, divided

# lists of nnU-Net's logger: a score per epoch, and a single one, of the weights that the training starts from
PROBE_KEY = "probe_dice"
PROBE_BEFORE_KEY = "probe_dice_before"


class ScheduledProbe:
    """Scores an encoder before the first step and every few epochs, on the first rank.

    Without patches (``draw``) it does nothing.

    Args:
        recipe: says how many cases are taken, and how often they are scored.
        logger: nnU-Net's.
        log: writes a line to the training log.
        score: scores the encoder with the probe.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        logger: Any,
        log: Callable[[str], object],
        score: Callable[[LinearProbe], ProbeScore],
    ) -> None:
        self.recipe, self.logger = recipe, logger
        self._log, self._score = log, score
        self.probe: LinearProbe | None = None

    def draw(self, cases: LabelledCases | None, patch_size: Sequence[int], mirror_axes: Sequence[int]) -> None:
        """Draws the patches to fit and to score; none if there are too few labelled cases.

        Args:
            cases: to choose from; None: the dataset has no labels.
            patch_size: of the encoder.
            mirror_axes: axes along which training mirrors.
        """
        parts: list[list[str]] = []
        if cases is not None:
            chosen = divided(cases.training, cases.held_out, self.recipe.probe_cases)
            parts = [[key for key in part if self._is_usable(cases, key)] for part in chosen]
        if cases is None or not all(parts):
            reason = "the dataset has no labels" if cases is None else "it needs two readable cases with labels"
            self._log(
                f"No linear probe: {reason}. (To use the labels of another dataset with the same plan, set "
                "HYSPARK_PROBE_DATASET=ID)"
            )
            return
        fit, score = ([cases.loader(key, patch_size) for key in part] for part in parts)
        self.probe = LinearProbe.drawn_from(fit, score, patch_size, cases.label_manager.ignore_label, mirror_axes)

    def score_start(self, epoch: int) -> None:
        """Scores the weights that the training starts from, once."""
        if self.probe is None or epoch > 0 or PROBE_BEFORE_KEY in self._lists:
            return
        score, text = self._timed_score(self.probe)
        self._lists[PROBE_BEFORE_KEY] = [score.mean]
        self._log(f"probe_dice before the first step {text}")

    def score_epoch(self, epoch: int) -> None:
        """Scores and logs the encoder after an epoch, if it is due.

        nnU-Net's logger requires a value for every epoch, so the epochs between get NaN.

        Args:
            epoch: number of the epoch, from 0.
        """
        if self.probe is None:
            return
        curve = self._lists.setdefault(PROBE_KEY, [])
        # checkpoints of trainings without a probe, or with a probe that was off for a while
        curve.extend([math.nan] * (epoch - len(curve)))
        every, done = self.recipe.probe_every, epoch + 1
        if done not in (1, self.recipe.num_epochs) and (every == 0 or done % every):
            self.logger.local_logger.log(PROBE_KEY, math.nan, epoch)
            return
        score, text = self._timed_score(self.probe)
        self.logger.log(PROBE_KEY, score.mean, epoch)
        self._log(f"probe_dice {text}")

    @property
    def curve(self) -> list[float] | None:
        """Dice by epoch, as far as it is known; None: there is no probe."""
        return self._lists.get(PROBE_KEY)

    @property
    def before(self) -> float | None:
        """Dice before the first step; None: not known."""
        return self._lists.get(PROBE_BEFORE_KEY, [None])[0]

    @property
    def _lists(self) -> dict[str, list[Any]]:
        return self.logger.local_logger.my_fantastic_logging

    def _timed_score(self, probe: LinearProbe) -> tuple[ProbeScore, str]:
        start, score = time(), self._score(probe)
        by_label = ", ".join(f"label {label} {dice:.4f}" for label, dice in score.items())
        return score, f"{score.mean:.4f} ({by_label}; took {time() - start:.1f} s)"

    def _is_usable(self, cases: LabelledCases, key: str) -> bool:
        """The probe must not end a training: it leaves out what cannot be used."""
        fault = cases.fault_of(key)
        if fault is not None:
            self._log(f"WARNING: the linear probe leaves out a case: {fault}")
        return fault is None
