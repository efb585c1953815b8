"""Where nnU-Net keeps preprocessed data sets."""

import os
from pathlib import Path


def preprocessed_folder(dataset: str) -> Path:
    """The preprocessed folder of a data set by number or name.

    Raises:
        FileNotFoundError: the variable is not set, or there is no such data set.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise FileNotFoundError("nnUNet_preprocessed is not set: it names the folder of the preprocessed data sets")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else dataset
    found = sorted(Path(root).glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} data sets in {root} are called {pattern}, but it must be one")
    return found[0]
