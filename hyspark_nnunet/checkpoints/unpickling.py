"""Reading .pth files without running code in them.

PyTorch restores tensors, numbers, strings and collections. Checkpoints of others also hold other plain data: nnU-Net's
logs have numbers of NumPy, and many scripts save their command-line options. These types are restored, too; nothing of
them runs on reading.
"""

import argparse
import contextlib
import pathlib
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

# NumPy 1 and 2 have different names for the module of these functions
NUMPY_FUNCTIONS = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.array(0).__reduce__()[0]}
NUMBERS_AND_TEXT = f"{np.typecodes['AllInteger']}{np.typecodes['AllFloat']}?SU"
# a type, or a type and the name it has in files
DATA_TYPES: list[Any] = [
    *((f, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, f in NUMPY_FUNCTIONS.items()),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in NUMBERS_AND_TEXT},
    argparse.Namespace,
    # pure paths: those of one system cannot be made on another
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


def load_data(path: Path, mmap: bool) -> Any:
    """Reads a .pth file that holds tensors and other plain data.

    Args:
        path: of the file.
        mmap: read tensors when they are used.

    Raises:
        ValueError: the file holds objects of other types, the first of which is named, or is no readable checkpoint.
    """
    # earlier versions take no names of types: they read what PyTorch restores by itself
    allowed = torch.serialization.safe_globals(DATA_TYPES) if torch.__version__ >= "2.6" else contextlib.nullcontext()
    try:
        with allowed:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # bytes that are no checkpoint fail in the reader in any way
        if not isinstance(error, UnpicklingError):
            raise unreadable(path, error) from error
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise unreadable(path, UnpicklingError("not written by torch.save")) from None  # torch advises to run it
        raise ValueError(
            f"{path} is refused: it holds {refused[1]}. Only tensors and plain data are read, because restoring other "
            "objects can run code. Where the file was written, save only the tensors: "
            'torch.save(model.state_dict(), "weights.pth")'
        ) from None  # torch advises to run the code


def unreadable(path: Path, error: Exception) -> ValueError:
    """The error for bytes that are no checkpoint."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{path} is not a readable checkpoint (truncated, or another kind of file): {first_line}")
