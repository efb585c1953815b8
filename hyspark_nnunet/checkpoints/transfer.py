"""Starting a network from pre-trained weights, with a complete account of what was done."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyspark_nnunet.atomic_files import replacing

MIN_ENCODER_SHARE = 0.9
ALLOW_PARTIAL = "HYSPARK_ALLOW_PARTIAL"
# nnU-Net's rule: the heads belong to the labels of a data set and are never transferred
HEADS = "seg_layers"


@dataclass(frozen=True)
class Entry:
    """What became of one tensor: ``fate`` is loaded, adapted, random or unused; ``why`` says more."""

    name: str
    part: str
    fate: str
    parameters: int
    why: str = ""


@dataclass
class TransferReport:
    """What ``transfer_weights`` did.

    Attributes:
        entries: one per tensor of the network, and per tensor of the file that was left unused.
        notes: differences that change no tensor.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def parameters(self, *fates: str, part_prefix: str = "") -> int:
        """Number of parameters with one of the fates, in parts whose name begins so."""
        return sum(e.parameters for e in self.entries if e.fate in fates and e.part.startswith(part_prefix))

    @property
    def encoder_share(self) -> float:
        """Share of the encoder's parameters that came from the file."""
        total = self.parameters("loaded", "adapted", "random", part_prefix="encoder")
        return self.parameters("loaded", "adapted", part_prefix="encoder") / total

    def table(self) -> str:
        """The report for people: a line per part and fate."""
        rows: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            rows[entry.part, entry.fate, entry.why].append(entry)
        lines = [f"{'part':<28}{'':<10}{'tensors':>8}{'parameters':>14}  why"]
        for (part, fate, why), entries in rows.items():
            lines.append(
                f"{part:<28}{fate:<10}{len(entries):>8}{sum(e.parameters for e in entries):>14,}  {why}".rstrip()
            )
        lines.append(f"{self.encoder_share:.1%} of the encoder's parameters come from the file.")
        return "\n".join(lines + self.notes)

    def save(self, path: Path, file: str) -> None:
        """Writes the report as JSON, beside its place and renamed."""
        content = {
            "pretrained_weights": file,
            "encoder_share": self.encoder_share,
            "notes": self.notes,
            "tensors": [vars(entry) for entry in self.entries],
        }
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=2))


def transfer_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    file: str,
    described: Mapping[str, Any] | None = None,
    description: Mapping[str, Any] | None = None,
) -> TransferReport:
    """Loads what fits by name and shape, or nothing.

    Args:
        network: HySparKUNet or HySparKMaskedAutoencoder; unchanged where an error is raised.
        state: weights under our names.
        file: their file, for messages.
        described: what the file says of its network (strides, preset ...).
        description: the same of this network.

    Returns:
        the report: every tensor of the network is loaded or left at random, every tensor of the file used or not.

    Raises:
        ValueError: the file shares no name with the network; a shape differs; or less than 90 % of the encoder's
            parameters would be loaded (unless ``HYSPARK_ALLOW_PARTIAL=1``).
    """
    target = network.state_dict()
    shared = [name for name in target if name in state and HEADS not in name]
    if not shared:
        raise ValueError(
            f"{file} shares no weight with this network: it holds {_some(state)}, the network {_some(target)}. "
            "Give a checkpoint of HySparKPretrainTrainer or HySparKFinetuneTrainer."
        )
    described, description = described or {}, description or {}
    wrong = [name for name in shared if state[name].shape != target[name].shape]
    if wrong:
        raise ValueError(_shape_message(wrong, state, target, file, described, description))

    report = TransferReport(notes=differences(described, description))
    for name, tensor in target.items():
        if name in shared:
            report.entries.append(Entry(name, part_of(name), "loaded", tensor.numel()))
        else:
            why = "heads belong to the labels" if HEADS in name else "not in the file"
            report.entries.append(Entry(name, part_of(name), "random", tensor.numel(), why))
    for name, tensor in state.items():
        if name not in shared:
            why = "heads belong to the labels" if HEADS in name else "no such part in this network"
            report.entries.append(Entry(name, part_of(name), "unused", tensor.numel(), why))
    if report.encoder_share < MIN_ENCODER_SHARE and os.environ.get(ALLOW_PARTIAL) != "1":
        raise ValueError(
            f"{file} would fill only {report.encoder_share:.1%} of the encoder's parameters, less than "
            f"{MIN_ENCODER_SHARE:.0%}; set {ALLOW_PARTIAL}=1 to go on all the same.\n{report.table()}"
        )
    with torch.no_grad():
        for name in shared:
            target[name].copy_(state[name])
    return report


def part_of(name: str) -> str:
    """The part of a network that a tensor belongs to: its first words, down to the stage or the level."""
    words = name.split(".")
    depth = 3 if len(words) > 2 and words[1] in ("stages", "levels") else 2
    return ".".join(words[: min(depth, len(words) - 1)])


def _shape_message(
    wrong: list[str],
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    file: str,
    described: Mapping[str, Any],
    description: Mapping[str, Any],
) -> str:
    name = wrong[0]
    message = (
        f"{file} does not fit this network: {len(wrong)} tensors differ in shape, first {name}: "
        f"{tuple(state[name].shape)} in the file, {tuple(target[name].shape)} here."
    )
    for line in differences(described, description):
        message += f"\n{line}"
    preset = described.get("preset")
    if preset and preset != description.get("preset"):
        message += f"\nThe file was trained with preset {preset}: set HYSPARK_PRESET={preset}."
    return message + "\nNothing was loaded."


def differences(described: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """A line per value that a file's description of its network and this network's do not share."""
    keys = [key for key in description if key in described and described[key] != description[key]]
    return [f"differs: {key} is {described[key]} in the file, {description[key]} here" for key in keys]


def _some(state: Mapping[str, Tensor]) -> str:
    return ", ".join(list(state)[:3]) + (", ..." if len(state) > 3 else "")
