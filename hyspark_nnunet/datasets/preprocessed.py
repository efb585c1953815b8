"""Where nnU-Net keeps preprocessed datasets."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def preprocessed_folder(dataset: str) -> Path:
    """The preprocessed folder of a dataset by number or name.

    Raises:
        FileNotFoundError: the variable is not set, or there is no such dataset.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise FileNotFoundError("nnUNet_preprocessed is not set: it names the folder of the preprocessed datasets")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else dataset
    found = sorted(Path(root).glob(pattern))
    if not found:
        raise FileNotFoundError(f"no dataset in {root} is called {pattern}: plan and preprocess it first")
    if len(found) > 1:
        named = ", ".join(folder.name for folder in found)
        raise FileNotFoundError(f"several datasets in {root} are called {pattern} ({named}): give the name")
    return found[0]


def plans_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and plans in the preprocessed folder of a dataset; its other JSON files have no configurations."""
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "configurations" in content:
            yield file.stem, content


def holds_cases(folder: Path | None) -> bool:
    """Whether there is anything in the folder of a configuration's preprocessed cases."""
    # hidden: what hyspark_nnunet preprocess has noted about them
    return folder is not None and folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())


def check_holds_cases(folder: Path | None, plans_manager: PlansManager, configuration_name: str) -> None:
    """Refuses a configuration that was planned, but not preprocessed.

    Args:
        folder: of its preprocessed cases; None: nnU-Net knows of none.
        plans_manager: of the dataset.
        configuration_name: which.

    Raises:
        FileNotFoundError: the folder is missing or empty; has the command that fills it.
    """
    if not holds_cases(folder):
        name = plans_manager.dataset_name
        raise FileNotFoundError(
            f"{name} is not preprocessed for configuration '{configuration_name}': {folder} is missing or empty. Run: "
            f"{preprocess_command(plans_manager, configuration_name)}"
        )


def preprocess_command(plans_manager: PlansManager, configuration_name: str) -> str:
    """The command that preprocesses a dataset for a configuration of these plans: the cases that are missing."""
    number = convert_dataset_name_to_id(plans_manager.dataset_name)
    return f"hyspark_nnunet preprocess -d {number} -c {configuration_name} -p {plans_manager.plans_name}"
