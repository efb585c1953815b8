"""How far a training with labels moves each layer of the encoder from its pre-trained weights."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.few_labels.ablations import ABLATIONS
from benchmarks.few_labels.arms import ARMS, Arm, Run
from benchmarks.few_labels.record import fingerprint_of
from benchmarks.few_labels.settings import read_settings
from benchmarks.few_labels.training import fold_folder, pretraining_folder
from benchmarks.few_labels.work import Work
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.training.checkpoint_folder import FINAL
from hyspark_nnunet.training.optimization import layer_of


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Per layer of the encoder, the norm of the change of its weights in parts of the norm they had.

    Args:
        before: weights of a network of ours; norms and biases, of one dimension, are left out.
        after: of the same names and shapes where they are in both.
    """
    moved: dict[str, float] = defaultdict(float)
    had: dict[str, float] = defaultdict(float)
    for name, weights in after.items():
        if name.startswith("encoder.") and weights.ndim > 1 and name in before:
            moved[layer_of(name)] += float((weights - before[name]).double().square().sum())
            had[layer_of(name)] += float(before[name].double().square().sum())
    return {layer: (moved[layer] / had[layer]) ** 0.5 for layer in moved}


def changes_of_runs(work: Work, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the runs that started from a pre-training, as far as both checkpoints are still there, the same.

    Args:
        work: the folder.
        records: of its runs.
    """
    settings = read_settings(work.settings_file)
    arms: dict[str, Arm] = {arm.name: arm for name, ablation in ABLATIONS.items() for arm in ablation.arms(name)}
    arms |= ARMS
    for record in records:
        arm = arms.get(record["arm"])
        if arm is None or arm.pretraining is None:
            continue
        before = pretraining_folder(work, settings, arm.pretraining) / FINAL
        after = fold_folder(work, settings, Run(arm, record["labels"], record["seed"])) / FINAL
        if before.is_file() and after.is_file() and _fingerprint(before) == record["starts_from"]:
            for layer, change in layer_changes(_state(before), read_weights(after).state).items():
                about = {key: record[key] for key in ("arm", "labels", "seed")}
                yield {**about, "layer": layer, "change": f"{change:.3g}"}


_fingerprint = lru_cache(maxsize=1)(fingerprint_of)


@lru_cache(maxsize=1)
def _state(file: Path) -> Mapping[str, Tensor]:
    return read_weights(file).state
