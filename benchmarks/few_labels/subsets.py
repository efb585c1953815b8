"""Who is trained on: cases per number of labels and seed, and the folds of nnU-Net that say so."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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

    pretrain: tuple[str, ...]
    labelled: dict[int, tuple[str, ...]]
    validation: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> "Splits":
        """Reads ``splits.json``: ``pretrain``, ``labelled_N`` for any numbers N, ``validation``.

        Raises:
            ValueError: a list is missing or has another length than it says, validation cases are trained on, or the
                labelled lists are not nested.
        """
        content = json.loads(file.read_text(encoding="utf-8"))
        numbers = sorted(int(match[1]) for name in content if (match := re.fullmatch(r"labelled_(\d+)", name)))
        missing = [name for name in ("pretrain", "validation") if not content.get(name)]
        if missing or not numbers:
            raise ValueError(
                f"{file} has no {(missing or ['labelled_N'])[0]}: it needs pretrain, labelled_N, validation"
            )
        labelled = {count: tuple(content[f"labelled_{count}"]) for count in numbers}
        splits = cls(tuple(content["pretrain"]), labelled, tuple(content["validation"]))
        fewer: set[str] = set()
        for count, cases in labelled.items():
            if len(set(cases)) != count:
                raise ValueError(f"{file}: labelled_{count} has {len(set(cases))} cases")
            if not fewer <= set(cases):
                raise ValueError(f"{file}: labelled_{count} lacks {min(fewer - set(cases))}: the lists must be nested")
            fewer = set(cases)
        for name, group in (("pretrain", splits.pretrain), (f"labelled_{numbers[-1]}", fewer)):
            if both := set(group) & set(splits.validation):
                raise ValueError(f"{file}: {min(both)} is in {name} and in validation: validation cases only score")
        return splits

    @property
    def all_labelled(self) -> tuple[str, ...]:
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
        if labels not in self.labelled or not 0 <= seed < MAX_SEEDS:
            raise ValueError(
                f"no fold has {labels} labels and seed {seed}: splits.json has {', '.join(map(str, self.labelled))} "
                f"labels, seeds are 0 to {MAX_SEEDS - 1}"
            )
        return list(self.labelled).index(labels) * MAX_SEEDS + seed
