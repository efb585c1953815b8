"""Reading and writing checkpoint files: nothing executed on reading, nothing half-written."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.hub import local_file
from hyspark_nnunet.checkpoints.reference import from_reference, reference_form

WEIGHT_KEYS = ("network_weights", "state_dict", "model")
# words that DDP, torch.compile, FSDP and activation checkpointing put into names, at the front or, where a part of a
# network was wrapped, in the middle
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# of a checkpoint, what goes into the metadata of a .safetensors file, as JSON: it holds strings only
METADATA = ("trainer_name", "current_epoch", "recipe", "hyspark")


class SourceWeights(NamedTuple):
    """Weights read from a file, and what the file says of itself.

    Attributes:
        state: tensors under our names.
        description: of the network, as ``checkpoints.description`` writes it; {} in files that have none.
        origin: which trainer or release the file is of, in words.
        rest: everything in the file but the weights.
        dropped: names of the release that our networks have no place for.
    """

    state: dict[str, Tensor]
    description: dict[str, Any]
    origin: str
    rest: dict[str, Any] = {}
    dropped: tuple[str, ...] = ()


def write_atomically(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint beside its place, then renames it: a reader sees the old file or the new one, whole.

    NumPy numbers become Python's, so that the file reads back without executing anything.
    """
    content = plain(checkpoint)
    with replacing(path) as beside:
        torch.save(content, beside)


def write_safetensors(state: Mapping[str, Tensor], about: Mapping[str, Any], path: str | Path) -> None:
    """Writes weights as .safetensors, whole or not at all, with what is said of them in its metadata as JSON.

    Args:
        state: the weights.
        about: a checkpoint's other parts; those named in METADATA are written.
        path: of the file.
    """
    metadata = {key: json.dumps(plain(about[key])) for key in METADATA if about.get(key) is not None}
    # separate storages: safetensors refuses tensors that share memory
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with replacing(path) as beside:
        safetensors.torch.save_file(separate, beside, metadata={"format": "pt", **metadata})


def check_whole(path: str | Path) -> None:
    """Reads a .pth file to its end and compares the checksums in it, which ``torch.load`` does not.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {_first_line(error)}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} does not fit")


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it.

    Args:
        path: of the file, or its address on the Hugging Face hub (see ``hub``).
        device: where its tensors go.
        mmap: read tensors when they are used: quick where only numbers are. For .pth files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, is no checkpoint, or would have to execute code to be read.
    """
    path = local_file(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint file at {path}: give the path of a .pth or .safetensors file, such as checkpoint_final.pth"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): its writing was cut off; take another checkpoint")
    if _is_safetensors(path):
        return _read_safetensors(path, device)
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except UnpicklingError:
        raise ValueError(
            f"{path} is refused: it is no checkpoint, or it holds objects that only running its code would restore"
        ) from None  # torch advises to run it
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
        path: a ``.pth`` or ``.safetensors`` file, or its address on the Hugging Face hub (see ``hub``); the weights
            bare or under ``network_weights``, ``state_dict`` or ``model``, with or without what DDP and
            torch.compile put into names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see ``read_checkpoint``; or the file holds no tensors.
    """
    checkpoint = read_checkpoint(path)
    weights, rest = checkpoint, {}
    while (wrapped := next((key for key in WEIGHT_KEYS if isinstance(weights.get(key), dict)), None)) is not None:
        rest.update({key: value for key, value in weights.items() if key != wrapped})
        weights = weights[wrapped]
    state = {_unwrap(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError(
            f"{path} holds no network weights: expected tensors, bare or under one of {', '.join(WEIGHT_KEYS)}; "
            f"found {', '.join(map(str, list(checkpoint)[:5])) or 'nothing'}"
        )
    described = rest.get("hyspark")
    description = described if isinstance(described, dict) else {}
    if (form := reference_form(state)) is not None:
        converted = from_reference(state)
        origin = f"HySparK release, {form.replace('_', ' ')}"
        return SourceWeights(converted.state, description, origin, rest, tuple(converted.dropped))
    return SourceWeights(state, description, str(rest.get("trainer_name", "unknown")), rest)


def _is_safetensors(path: Path) -> bool:
    """By content: the length of a JSON header, then the header. Neither torch's zip files nor pickles begin so."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            metadata = file.metadata() or {}
        return {"network_weights": state, **{key: json.loads(metadata[key]) for key in METADATA if key in metadata}}
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, or another kind of file): {_first_line(error)}"
        ) from error


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
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
