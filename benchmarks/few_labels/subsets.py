"""Who is trained on: cases per number of labels and seed, and the folds of nnU-Net that say so."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.few_labels.work import read_json

# folds are there for as many seeds, whether they are run or not: a fold's number does not depend on what is run
MAX_SEEDS = 10


@dataclass(frozen=True)
class Splits:
    """Who is who, as ``splits.json`` of the data fixes it.

    Attributes:
        pretrain: cases whose images are pre-trained on; labelled cases may be among them.
        labelled: by number of labels, from few to many, nested lists of cases to fine-tune on.
        validation: cases that score; in no other list.
    """

    pretrain: list[str]
    labelled: dict[int, list[str]]
    validation: list[str]

    @classmethod
    def read(cls, file: Path) -> "Splits":
        """Reads ``splits.json``: ``pretrain``, ``labelled_N`` for any numbers N, ``validation``.

        Raises:
            ValueError: a list is missing or has another length than it says, validation cases are trained on, or the
                labelled lists are not nested.
        """
        content = read_json(file)
        numbers = sorted(int(name[9:]) for name in content if re.fullmatch(r"labelled_\d+", name))
        missing = [name for name in ("pretrain", "validation") if not content.get(name)]
        if missing or not numbers:
            name = (missing or ["labelled_N"])[0]
            raise ValueError(f"{file} has no {name}: it needs pretrain, labelled_N, validation")
        fewer: set[str] = set()
        for count in numbers:
            cases = set(content[f"labelled_{count}"])
            if len(cases) != count:
                raise ValueError(f"{file}: labelled_{count} has {len(cases)} cases")
            if not fewer <= cases:
                raise ValueError(f"{file}: labelled_{count} lacks {min(fewer - cases)}: the lists must be nested")
            fewer = cases
        for name in ("pretrain", f"labelled_{numbers[-1]}"):
            if both := {*content[name]} & {*content["validation"]}:
                raise ValueError(f"{file}: {min(both)} is in {name} and in validation: validation cases only score")
        return cls(content["pretrain"], {n: content[f"labelled_{n}"] for n in numbers}, content["validation"])

    @property
    def all_labelled(self) -> list[str]:
        return list(self.labelled.values())[-1]

    def training_cases(self, labels: int, seed: int) -> list[str]:
        """The cases to fine-tune on, sorted.

        Seed 0 takes the lists of the file; every other seed an order of its own of the longest list, whose first cases
        are its subsets, so that they are nested, too. With all labels the cases are the same for all seeds.
        """
        if seed == 0:
            return sorted(self.labelled[labels])
        order = np.random.default_rng(seed).permutation(sorted(self.all_labelled))
        return sorted(map(str, order[:labels]))

    def folds(self) -> list[dict[str, list[str]]]:
        """``splits_final.json``: a fold per (labels, seed) in the order of ``fold``; all validate alike."""
        return [
            {"train": self.training_cases(labels, seed), "val": sorted(self.validation)}
            for labels in self.labelled
            for seed in range(MAX_SEEDS)
        ]

    def fold(self, labels: int, seed: int) -> int:
        """The number of a fold: 0 to 9 are the seeds with the fewest labels, 10 to 19 those with the next number.

        Raises:
            ValueError: there is no such fold.
        """
        if labels not in self.labelled:
            raise ValueError(f"no fold has {labels} labels: splits.json has {', '.join(map(str, self.labelled))}")
        return list(self.labelled).index(labels) * MAX_SEEDS + seed
