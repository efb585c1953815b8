"""Subjects: scans of one patient, which must not be divided between training and validation."""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.dataset_json import OUR_KEY
from hyspark_nnunet.datasets.grouping import Case

SUBJECTS = "subjects"  # below this package's key of dataset.json: subject by case
SEED = 12345  # of nnU-Net's folds


def subjects_of_cases(cases: Sequence[Case], pattern: str) -> dict[str, str]:
    """The subject of each case, by case name.

    Args:
        cases: of the dataset.
        pattern: a number: that part of a scan's path below its folder, 1 the first; otherwise a regular expression that
            is searched in this path, whose first group is the subject (the whole match if it has none).

    Raises:
        ValueError: not a regular expression, or cases without a subject.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--group-by {pattern} is neither a number nor a regular expression: {error}") from error
    found, without = {}, []
    for case in cases:
        path = case.scans[0].relative
        if pattern.isdecimal():
            parts = path.split("/")
            subject = parts[int(pattern) - 1] if 1 <= int(pattern) <= len(parts) else ""
        else:
            match = expression.search(path)
            subject = (match[1] if expression.groups else match[0]) or "" if match else ""
        if subject:
            found[case.name] = subject
        else:
            without.append(path)
    if without:
        raise ValueError(f"--group-by {pattern} finds no subject in {len(without)} paths, such as {without[0]}")
    print(f"{len(set(found.values()))} subjects of {len(found)} cases")
    return found


def recorded_subjects(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Subject by case, as ``dataset prepare --group-by`` has noted; empty: nothing is noted."""
    return (dataset_json.get(OUR_KEY) or {}).get(SUBJECTS, {})


def write_splits(cases: Iterable[str], subjects: Mapping[str, str], n_folds: int, splits_file: Path) -> None:
    """Writes folds of about equal size that keep subjects together; a case without a subject is one of its own.

    Args:
        cases: to divide.
        subjects: by case.
        n_folds: number of folds.
        splits_file: nnU-Net's splits_final.json.

    Raises:
        ValueError: there are fewer subjects than folds.
    """
    groups: dict[tuple[bool, str], list[str]] = {}
    for case in sorted(cases):
        groups.setdefault((case in subjects, subjects.get(case, case)), []).append(case)
    if len(groups) < n_folds:
        raise ValueError(
            f"{len(groups)} subjects are too few for {n_folds} folds: train on fold all, or write {splits_file}"
        )
    order = sorted(groups.values())
    random.Random(SEED).shuffle(order)
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    for group in sorted(order, key=len, reverse=True):
        min(folds, key=len).extend(group)
    splits = [
        {"train": sorted(case for other in folds if other is not fold for case in other), "val": sorted(fold)}
        for fold in folds
    ]
    with replacing(splits_file) as beside:
        beside.write_text(json.dumps(splits, indent=4), encoding="utf-8")


def divided_subjects(splits: Sequence[Mapping[str, Sequence[str]]], subjects: Mapping[str, str]) -> list[str]:
    """Subjects with training and validation cases in the same fold."""
    divided = set()
    for fold in splits:
        training, validation = (
            {subjects[case] for case in fold[kind] if case in subjects} for kind in ("train", "val")
        )
        divided |= training & validation
    return sorted(divided)


def warning_of_splits(splits_file: Path, subjects: Mapping[str, str]) -> str:
    """A warning if folds divide subjects; "" if not, or if there are no folds yet."""
    if not subjects or not splits_file.is_file():
        return ""
    divided = divided_subjects(json.loads(splits_file.read_text(encoding="utf-8")), subjects)
    if not divided:
        return ""
    return (
        f"WARNING: {splits_file} divides {len(divided)} subjects between training and validation, such as "
        f"{divided[0]}: remove it, and the next training writes folds that keep subjects together"
    )
