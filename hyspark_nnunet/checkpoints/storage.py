"""Reading and writing checkpoint files: nothing executed on reading, nothing half-written."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.reference import from_reference, reference_form

WEIGHT_KEYS = ("network_weights", "state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class SourceWeights(NamedTuple):
    """Weights read from a file, under our names, and what the file says of itself."""

    state: dict[str, Tensor]
    description: dict[str, Any]
    origin: str


def write_atomically(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint beside its place, then renames it: a reader sees the old file or the new one, whole.

    NumPy numbers become Python's, so that the file reads back without executing anything.
    """
    with replacing(path) as beside, open(beside, "wb") as file:
        torch.save(plain(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it.

    Args:
        path: of the file.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, is no checkpoint, or would have to execute code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint file at {path}: give the path of a .pth file, such as checkpoint_final.pth"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): its writing was cut off; take another checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no checkpoint, or it holds objects that only running its code would restore. "
            f"Reading said: {_first_line(error)}"
        ) from error
    except Exception as error:  # bytes that are no checkpoint fail in the reader in any way
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, or another kind of file): {_first_line(error)}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, but a checkpoint is a dictionary of tensors")
    return checkpoint


def read_weights(path: str | Path) -> SourceWeights:
    """Reads network weights from a file of ours or of the HySparK release.

    Args:
        path: a ``.pth`` file; the weights bare or under ``network_weights``, ``state_dict`` or ``model``, with or
            without the prefixes of DDP and torch.compile.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see ``read_checkpoint``; or the file holds no tensors.
    """
    checkpoint = read_checkpoint(path)
    wrapped = next((key for key in WEIGHT_KEYS if isinstance(checkpoint.get(key), dict)), None)
    weights = checkpoint if wrapped is None else checkpoint[wrapped]
    state = {_unwrap(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError(
            f"{path} holds no network weights: expected tensors, bare or under one of {', '.join(WEIGHT_KEYS)}; "
            f"found {', '.join(map(str, list(checkpoint)[:5])) or 'nothing'}"
        )
    description = checkpoint.get("hyspark", {}) if wrapped else {}
    if reference_form(state) is not None:
        return SourceWeights(from_reference(state).state, description, "HySparK release")
    return SourceWeights(state, description, str(checkpoint.get("trainer_name", "unknown")))


def plain(value: Any) -> Any:
    """The value with NumPy's numbers and arrays, paths and devices as Python's numbers, lists and strings."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path | torch.device):
        return str(value)
    return value


def _unwrap(name: str) -> str:
    while True:
        prefix = next((p for p in WRAPPER_PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
