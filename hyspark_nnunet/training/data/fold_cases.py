"""The cases of a fold, checked before a training starts on them."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyspark_nnunet.datasets.dataset_json import read_dataset

SPLITS = "splits_final.json"
# of the cross-validation that nnU-Net creates
N_FOLDS = 5
# in messages; the rest is counted
NAMES_SHOWN = 10


def listed_cases(raw_folder: Path | None, preprocessed_folder: Path, dataset_json: Mapping[str, Any]) -> set[str]:
    """The cases that a dataset lists: in its raw folder, else as far as its preprocessed folder knows.

    Args:
        raw_folder: of the dataset; None or missing on machines that only train.
        preprocessed_folder: of the dataset, with ``gt_segmentations`` once preprocessing has finished.
        dataset_json: of the preprocessed dataset.
    """
    try:
        if raw_folder is not None:
            return set(read_dataset(raw_folder).cases)
    except (OSError, ValueError):
        pass  # training does not need the raw data; dataset check reports what is wrong with them
    if "dataset" in dataset_json:
        return set(dataset_json["dataset"])
    ending = dataset_json["file_ending"]
    return {file.name.removesuffix(ending) for file in (preprocessed_folder / "gt_segmentations").glob(f"*{ending}")}


def raw_folder_of(dataset_name: str) -> Path | None:
    """The raw folder of a dataset; None: nnUNet_raw is not set."""
    raw = os.environ.get("nnUNet_raw")
    return Path(raw) / dataset_name if raw else None


def check_can_be_split(cases: Collection[str], splits_file: Path) -> None:
    """nnU-Net creates a cross-validation of five folds if there is no splits_final.json.

    Raises:
        ValueError: there are fewer cases than folds; contains a split with one validation case per fold.
    """
    if len(cases) >= N_FOLDS:
        return
    message = f"too few preprocessed cases ({len(cases)}) for nnU-Net's {N_FOLDS} folds: train on fold all"
    if len(cases) > 1:
        split = [{"train": [case for case in sorted(cases) if case != held], "val": [held]} for held in sorted(cases)]
        message += f", or hold out one case per fold with this file {splits_file}:\n{json.dumps(split)}"
    raise ValueError(message)


def check_fold(fold: int | str, training: Sequence[str], validation: Sequence[str], splits_file: Path) -> None:
    """Refuses a fold that cannot be trained.

    Raises:
        ValueError: it has no training or no validation cases.
    """
    for kind, cases in (("train", training), ("val", validation)):
        if not len(cases):
            raise ValueError(
                f'fold {fold} has no cases under "{kind}" in {splits_file}: add some, or train on fold all, which '
                "validates on the training cases"
            )


def check_fold_is_preprocessed(
    fold: int | str, cases: Sequence[str], preprocessed: Collection[str], splits_file: Path
) -> None:
    """Compares the cases of a fold with the preprocessed ones.

    Raises:
        ValueError: some are not preprocessed; names them.
    """
    missing = sorted(set(map(str, cases)) - set(preprocessed))
    if missing:
        raise ValueError(
            f"cases of fold {fold} in {splits_file} are not preprocessed ({len(missing)}): {_some(missing)}. "
            "Preprocess the dataset again, or remove them from that file"
        )


def missing_cases(
    listed: Collection[str], preprocessed: Collection[str], command: str, splits_file: Path | None
) -> str | None:
    """A warning that names the cases which a dataset lists and which are not preprocessed; None: there are none.

    Args:
        listed: cases of the dataset.
        preprocessed: cases that can be trained on.
        command: that preprocesses the dataset.
        splits_file: nnU-Net's, of the fold; None: fold all.

    Raises:
        ValueError: cases are missing, and nnU-Net is about to divide the others into folds.
    """
    missing = sorted(set(listed) - set(preprocessed))
    if not missing:
        return None
    message = (
        f"{len(missing)} of {len(listed)} cases of the dataset are not preprocessed: {_some(missing)}. To include "
        f"them, run: {command}"
    )
    if splits_file is not None and not splits_file.is_file():
        raise ValueError(
            f"{message}\nTo train without them, write {splits_file}; nnU-Net would divide the incomplete dataset into "
            "folds and keep these"
        )
    return f"{message}. This training runs without them."


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
