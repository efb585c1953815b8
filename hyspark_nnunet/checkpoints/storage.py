"""Reading and writing checkpoint files: reading executes no code, an interrupted write leaves the old file."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints import nnssl
from hyspark_nnunet.checkpoints.heads import HEADS, head_labels
from hyspark_nnunet.checkpoints.hub import local_file
from hyspark_nnunet.checkpoints.network_plan import plan_in
from hyspark_nnunet.checkpoints.reference import from_reference, reference_form
from hyspark_nnunet.checkpoints.state_dicts import find_state_dicts
from hyspark_nnunet.checkpoints.unpickling import load_data, unreadable

# parts of a checkpoint that go into the metadata of a .safetensors file, as JSON: metadata are strings
METADATA = ("trainer_name", "current_epoch", "recipe", "hyspark", nnssl.KEY)


class SourceWeights(NamedTuple):
    """Weights read from a file, and what the file says about itself.

    Attributes:
        state: tensors under our names; those of nnU-Net's networks under the first of their names.
        description: of the network, see ``description.describe_network``; of other checkpoints of nnU-Net and of nnssl
            what their plans say; {} in files without any.
        origin: trainer or release that wrote the file, in words, and which network of several was read.
        rest: everything in the file except the weights.
        dropped: names of the release that our networks have no place for.
    """

    state: dict[str, Tensor]
    description: dict[str, Any]
    origin: str
    rest: dict[str, Any] = {}
    dropped: tuple[str, ...] = ()

    @property
    def heads(self) -> list[Tensor]:
        """Segmentation heads; none in files of nnssl, whose pre-training has its output under the same names."""
        if nnssl.KEY in self.rest and "labels" not in self.description:
            return []
        return [tensor for name, tensor in self.state.items() if name.startswith(HEADS)]


def write_atomically(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint to a temporary file and renames it: a reader sees the old file or the complete new one.

    NumPy's numbers become Python's.
    """
    content = plain(checkpoint)
    with replacing(path) as beside:
        torch.save(content, beside)


def write_safetensors(state: Mapping[str, Tensor], about: Mapping[str, Any], path: str | Path) -> None:
    """Writes weights as .safetensors, with ``METADATA`` as JSON; a reader sees the old file or the complete new one.

    Args:
        state: the weights.
        about: a checkpoint's other parts; those named in ``METADATA`` are written.
        path: of the file.
    """
    metadata = {key: json.dumps(plain(about[key])) for key in METADATA if about.get(key) is not None}
    # separate storages: safetensors refuses tensors that share memory
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    with replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # by the umask; safetensors makes files that nobody else can read
        safetensors.torch.save_file(separate, beside, metadata={"format": "pt", **metadata})
        beside.chmod(mode)


def check_whole(path: str | Path) -> None:
    """Reads a .pth file to its end and compares its checksums, which ``torch.load`` does not.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error or type(error).__name__}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} does not match")


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint without running code in it.

    Args:
        path: of a .pth or .safetensors file, which are recognised by their content, or its address on the Hugging Face
            hub (see ``hub``).
        mmap: read tensors of .pth files when they are used, which is fast if only numbers are needed.

    Returns:
        content of the file; of a .safetensors file ``network_weights`` and the ``METADATA`` in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, is no checkpoint, or holds objects that only running code restores.
    """
    path = local_file(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".pth", ".safetensors"))
        raise FileNotFoundError(
            f"{path} is a folder: give a checkpoint file, such as {path / (inside or ['checkpoint_final.pth'])[-1]}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint file at {path}: give the path of a .pth or .safetensors file, such as checkpoint_final.pth"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): its writing was interrupted; use another checkpoint")
    if _is_safetensors(path):
        return _read_safetensors(path)
    checkpoint = load_data(path, mmap)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, but a checkpoint is a dictionary: save the tensors by name, "
            'torch.save(model.state_dict(), "weights.pth")'
        )
    return checkpoint


def read_weights(path: str | Path) -> SourceWeights:
    """Reads network weights from a file of this package, of nnU-Net, of nnssl or of the HySparK release.

    Args:
        path: of a ``.pth`` or ``.safetensors`` file, or its address on the Hugging Face hub (see ``hub``); the weights
            at the top level or under any key, with or without prefixes, see ``state_dicts``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see ``read_checkpoint``; or the file holds no tensors.
    """
    checkpoint = read_checkpoint(path)
    found = find_state_dicts(checkpoint)
    if not found:
        raise ValueError(
            f"{path} holds no network weights: it has no tensors with names, but the keys "
            f"{', '.join(map(str, checkpoint)) or '(none)'}"
        )
    state, rest = found[0].tensors, found[0].rest
    origin = str(rest.get("trainer_name", "unknown"))
    dropped: tuple[str, ...] = ()
    if (form := reference_form(state)) is not None:
        try:
            state, names = from_reference(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        origin, dropped = f"HySparK release, {form.replace('_', ' ')}", tuple(names)
    description = rest.get("hyspark")
    if not isinstance(description, dict):
        origin += "" if description is None else "; the description of the network in its metadata is not readable"
        description = description_by_nnunet(rest)
        if isinstance(plan := rest.get(nnssl.KEY), Mapping):
            origin = "nnssl" if origin == "unknown" else f"nnssl, {origin}"
            description = nnssl.describe(plan)
    if len(found) > 1:
        others = ", ".join(other.place or "the top level" for other in found[1:])
        origin += f"; weights of {found[0].place or 'the top level'}, not of {others}"
    return SourceWeights(state, description, origin, rest, dropped)


def description_by_nnunet(rest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of any of nnU-Net's trainers says about its network; {} for other files.

    Besides ``trainer``, ``dataset``, ``configuration`` and ``plans`` the entries of ``description.describe_network``
    that a plan and a dataset.json have.
    """
    arguments = rest.get("init_args")
    if not isinstance(arguments, Mapping):
        return {}
    plans, dataset_json = arguments.get("plans"), arguments.get("dataset_json")
    plans = plans if isinstance(plans, Mapping) else {}
    found = {
        "trainer": rest.get("trainer_name"),
        "dataset": plans.get("dataset_name"),
        "configuration": arguments.get("configuration"),
        "plans": plans.get("plans_name"),
    }
    found = {key: value for key, value in found.items() if isinstance(value, str)}
    if (plan := plan_in(rest)) is not None:
        found["patch_size"], found["spacing"] = plan.patch_size, plan.spacing
        found["strides"] = plan.arguments.get("strides")
    if isinstance(dataset_json, Mapping):
        found["channel_names"] = dataset_json.get("channel_names")
        found["labels"], found["regions"] = head_labels(dataset_json.get("labels", {}))
    return found


def _is_safetensors(path: Path) -> bool:
    """By content: the length of a JSON header, then the header. torch's zip files and pickles begin differently."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise unreadable(path, error) from error
    return {"network_weights": state, **{key: _from_json(metadata[key]) for key in METADATA if key in metadata}}


def _from_json(text: str) -> Any:
    """The value of a piece of metadata; other programs write plain text under the same keys."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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
    if isinstance(value, PurePath | torch.device):
        return str(value)
    return value
