"""Labels and dataset.json for a folder that has nnU-Net's imagesTr already; the scans are not touched."""

import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.datasets.dataset_json import DATASET_JSON, RawDataset, made_here, read_dataset
from hyspark_nnunet.datasets.staging import new_building_folder

# folders of label files that ``add_to_layout`` makes
LABELS_FOLDER = re.compile(r"labelsTr(_body\d+)?")


def add_to_layout(target: Path, overwrite: bool, make: Callable[[Path, str], None]) -> None:
    """Adds what ``make`` builds: label files and pictures first, dataset.json, which refers to them, last.

    Args:
        target: the folder with imagesTr.
        overwrite: replace labels and dataset.json that this package made; other labels are never touched.
        make: builds into a folder, with the label files in the folder of that name in it.

    Raises:
        ValueError: the folder is a dataset already, or its label files lie elsewhere.
    """
    description = target / DATASET_JSON
    earlier: set[str] = set()
    if description.exists():
        if not overwrite:
            raise ValueError(f"{description} exists and is not overwritten: use --overwrite to make its labels again")
        if not made_here(target):
            if any(files.label for files in read_dataset(target).cases.values()):
                raise ValueError(
                    f"{target} has labels of its own: it pre-trains as it is, or use hyspark_nnunet dataset pool"
                )
            with replacing(description.with_name(f"{DATASET_JSON}.before_prepare")) as beside:
                shutil.copyfile(description, beside)
        else:
            earlier = _label_folders(read_dataset(target))
    labels_folder = _free_name(target)
    building = new_building_folder(target, ".building")
    try:
        make(building, labels_folder)
        for item in sorted(building.iterdir(), key=lambda path: path.name == DATASET_JSON):
            os.replace(item, target / item.name)
        for name in earlier - {labels_folder}:
            shutil.rmtree(target / name, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _label_folders(dataset: RawDataset) -> set[str]:
    """The folders of a dataset's label files, which are replaced.

    Raises:
        ValueError: one lies outside of the dataset, as those of a pool do: somebody else needs it.
    """
    labels = [Path(files.label) for files in dataset.cases.values() if files.label]
    for label in labels:
        if len(label.parts) != 2 or not LABELS_FOLDER.fullmatch(label.parts[0]):
            raise ValueError(
                f"the label files of {dataset.folder} are not its own ({label}), as in a dataset by hyspark_nnunet "
                "dataset pool: make one of its imagesTr in another folder, or pool again with --overwrite"
            )
    return {label.parts[0] for label in labels}


def _free_name(target: Path) -> str:
    """A folder's name that is not taken: the dataset refers to its old label files until the new ones are complete."""
    names = ("labelsTr" if i == 0 else f"labelsTr_body{i}" for i in count())
    return next(name for name in names if not (target / name).exists())
