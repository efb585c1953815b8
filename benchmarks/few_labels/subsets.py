"""Who is trained on: cases per number of labels and seed, and the folds of nnU-Net that say so."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LABELS = (5, 10, 20)  # labelled cases
# folds are there for as many seeds, whether they are run or not: a fold's number does not depend on what is run
MAX_SEEDS = 10


@dataclass(frozen=True)
class Splits:
    """Who is who, as ``splits.json`` of the data fixes it.

    Attributes:
        pretrain: cases whose images are pre-trained on.
        labelled: by number of labels, nested lists of cases to fine-tune on.
        validation: cases that score.
    """

    pretrain: tuple[str, ...]
    labelled: dict[int, tuple[str, ...]]
    validation: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> "Splits":
        """Reads ``splits.json``.

        Raises:
            ValueError: lists overlap or are not nested; names them.
        """
        content = json.loads(file.read_text(encoding="utf-8"))
        labelled = {count: tuple(content[f"labelled_{count}"]) for count in LABELS}
        splits = cls(tuple(content["pretrain"]), labelled, tuple(content["validation"]))
        groups = {"pretrain": splits.pretrain, "labelled_20": labelled[20], "validation": splits.validation}
        for first, second in (("pretrain", "labelled_20"), ("pretrain", "validation"), ("labelled_20", "validation")):
            if both := set(groups[first]) & set(groups[second]):
                raise ValueError(f"{file}: {sorted(both)[0]} is in {first} and in {second}: a case has one role")
        if not set(labelled[5]) <= set(labelled[10]) <= set(labelled[20]):
            raise ValueError(f"{file}: labelled_5, labelled_10 and labelled_20 must be nested")
        return splits

    def training_cases(self, labels: int, seed: int) -> list[str]:
        """The cases to fine-tune on, sorted.

        Seed 0 takes the lists of the file; every other seed an order of the twenty of its own, whose first 5 and 10
        are its subsets, so that they are nested, too. With 20 labels the cases are the same for all seeds.
        """
        if seed == 0:
            return sorted(self.labelled[labels])
        order = np.random.default_rng(seed).permutation(sorted(self.labelled[20]))
        return sorted(map(str, order[:labels]))

    def folds(self) -> list[dict[str, list[str]]]:
        """``splits_final.json``: a fold per (labels, seed) in the order of ``fold_number``; all validate alike."""
        return [
            {"train": self.training_cases(labels, seed), "val": sorted(self.validation)}
            for labels in LABELS
            for seed in range(MAX_SEEDS)
        ]


def fold_number(labels: int, seed: int) -> int:
    """0 to 9 are the seeds with 5 labels, 10 to 19 those with 10, 20 to 29 those with 20.

    Raises:
        ValueError: there is no such fold.
    """
    if labels not in LABELS or not 0 <= seed < MAX_SEEDS:
        raise ValueError(
            f"no fold has {labels} labels and seed {seed}: labels are {', '.join(map(str, LABELS))}, seeds 0 to "
            f"{MAX_SEEDS - 1}"
        )
    return LABELS.index(labels) * MAX_SEEDS + seed
