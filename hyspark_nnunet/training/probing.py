"""The probe's part of a training: which cases it looks at, when, and what is logged of it."""

import math
from collections.abc import Sequence
from time import time
from typing import Any

from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.probe.cases import LabelledCases, cases_of_dataset
from hyspark_nnunet.training.probe.linear_probe import LinearProbe, ProbeScore, divided, has_labels
from hyspark_nnunet.training.trainer import RecipeTrainer

# lists of nnU-Net's logger: one score per epoch; and a single one, of the weights that the training starts from
PROBE_KEY = "probe_dice"
PROBE_BEFORE_KEY = "probe_dice_before"


class ProbingTrainer(RecipeTrainer):
    """A trainer whose encoder is probed with ``LinearProbe`` as it trains, on the first rank."""

    recipe: PretrainRecipe
    logged_once = (PROBE_BEFORE_KEY,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probe: LinearProbe | None = None

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.probe is None or self.current_epoch > 0 or PROBE_BEFORE_KEY in self._lists:
            return
        start, score = time(), self._score_encoder()
        self._lists[PROBE_BEFORE_KEY] = [score.mean]
        self.print_to_log_file(f"probe_dice before the first step {described(score, time() - start)}")

    def make_probe(self, dataset_tr: Any, dataset_val: Any, mirror_axes: Sequence[int]) -> None:
        """Draws the probe's patches; none for a data set without labels.

        Args:
            dataset_tr: nnU-Net's data set of the fold's training cases.
            dataset_val: that of its validation cases.
            mirror_axes: along which training mirrors.

        Raises:
            FileNotFoundError, ValueError: of ``cases_of_dataset``, on every rank.
        """
        if not self.recipe.probe_every:
            return
        cases = self._labelled_cases(dataset_tr.identifiers, dataset_val.identifiers)
        if self.rank != 0:
            return
        parts: list[list[str]] = []
        if cases is not None:
            chosen = divided(cases.training, cases.held_out, self.recipe.probe_cases)
            parts = [[key for key in part if self._is_sound(cases, key)] for part in chosen]
        if cases is None or not all(parts):
            reason = (
                "the data set has no labels" if cases is None else "it takes two cases with labels that can be read"
            )
            way_out = "HYSPARK_PROBE_DATASET=ID takes the labels of another data set that is planned alike"
            self.print_to_log_file(f"No linear probe: {reason}. ({way_out})")
            return
        patch_size = self.configuration_manager.patch_size
        fit, score = ([cases.loader(key, patch_size) for key in part] for part in parts)
        self.probe = LinearProbe.drawn_from(fit, score, patch_size, cases.label_manager.ignore_label, mirror_axes)

    def _labelled_cases(self, training: Sequence[str], held_out: Sequence[str]) -> LabelledCases | None:
        """Whom to probe on; None: there are no labels."""
        if self.recipe.probe_dataset is not None:
            return cases_of_dataset(
                self.recipe.probe_dataset, self.plans_manager, self.configuration_name, self.dataset_json
            )
        if not has_labels(self.dataset_json):
            return None
        folder = self.preprocessed_dataset_folder
        return LabelledCases(folder, self.dataset_class, self.label_manager, training, held_out)

    def probe_epoch(self, done: int) -> None:
        """Scores and logs the encoder, if it is due.

        nnU-Net's logger wants a value for every epoch, so those between get none (NaN).

        Args:
            done: epochs trained, with this one.
        """
        if self.probe is None:
            return
        curve = self._lists.setdefault(PROBE_KEY, [])
        # checkpoints of trainings without a probe, or with one that was off for a while
        curve.extend([math.nan] * (self.current_epoch - len(curve)))
        every = self.recipe.probe_every
        if done not in (1, self.num_epochs) and (every == 0 or done % every):
            self.logger.local_logger.log(PROBE_KEY, math.nan, self.current_epoch)
            return
        start, score = time(), self._score_encoder()
        self.logger.log(PROBE_KEY, score.mean, self.current_epoch)
        self.print_to_log_file(f"probe_dice {described(score, time() - start)}")

    @property
    def probe_curve(self) -> list[float] | None:
        """Dice by epoch, as far as is known; None: there is no probe."""
        return self._lists.get(PROBE_KEY)

    @property
    def probe_before(self) -> float | None:
        """Dice before the first step; None: not known."""
        return self._lists.get(PROBE_BEFORE_KEY, [None])[0]

    @property
    def _lists(self) -> dict[str, list[Any]]:
        return self.logger.local_logger.my_fantastic_logging

    def _score_encoder(self) -> ProbeScore:
        assert self.probe is not None
        self.network.eval()
        with self.autocast():
            return self.probe.score(self.bare_network.encoder, self.device)

    def _is_sound(self, cases: LabelledCases, key: str) -> bool:
        """The probe is not worth the end of a training: it leaves out what cannot be used."""
        fault = cases.fault_of(key)
        if fault is not None:
            self.print_to_log_file(f"WARNING: the linear probe leaves out a case: {fault}")
        return fault is None


def described(score: ProbeScore, seconds: float) -> str:
    """A score as the log shows it."""
    by_label = ", ".join(f"label {label} {dice:.4f}" for label, dice in score.items())
    return f"{score.mean:.4f} ({by_label}; took {seconds:.1f} s)"
