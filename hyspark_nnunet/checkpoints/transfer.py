"""Initialising a network from pre-trained weights, with a report on every tensor."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.checkpoints.adaptation import adapt_kernel, adapt_stem, adapt_upsampling
from hyspark_nnunet.checkpoints.correspondence import (
    Sizes,
    group_of,
    is_required,
    level_of_head,
    n_common_stages,
    source_name,
)
from hyspark_nnunet.checkpoints.heads import HEADS, matching_heads
from hyspark_nnunet.checkpoints.plan_sizes import PlanSizes, finetuning_trainer, network_sizes
from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.checkpoints.sizes import EncoderSizes, as_lists
from hyspark_nnunet.checkpoints.state_dicts import stored_once

MIN_ENCODER_SHARE = 0.9
ALLOW_PARTIAL = "HYSPARK_ALLOW_PARTIAL"
# transposed convolutions whose kernel is their stride, of the reconstruction decoder and of nnU-Net's decoder
UPSAMPLING = re.compile(r"decoder\.(levels\.\d+\.upsample|transpconvs\.\d+)\.weight")
# parts of a description that usually differ, and are no reason why weights would not fit
NOT_COMPARED = ("dataset", "configuration", "plans")


def transfer_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    file: str,
    source_description: Mapping[str, Any] | None = None,
    target_description: Mapping[str, Any] | None = None,
    input_channel_mapping: str | None = None,
) -> TransferReport:
    """Loads the weights that fit, adapts those that can be adapted, and reports on all of them.

    Args:
        network: of HySparK, or nnU-Net's own or its masked autoencoder; unchanged if an error is raised.
        state: weights under our names.
        file: their file, for messages.
        source_description: of the file's network (strides, channel names, labels ...).
        target_description: of this network.
        input_channel_mapping: of the recipe, see ``adaptation.channel_assignment``.

    Returns:
        report that has every tensor of the network (loaded, adapted, random) and every unused tensor of the file.

    Raises:
        ValueError: the file fills nothing of the encoder; a width of the encoder differs; the mapping is not possible;
            or less than 90 % of the encoder's parameters would be loaded (unless ``HYSPARK_ALLOW_PARTIAL=1``).
    """
    target = network.state_dict()
    transfer = Transfer(state, target, file, source_description or {}, target_description or {}, input_channel_mapping)
    report = transfer.report
    if report.encoder_share < MIN_ENCODER_SHARE and not partial_is_allowed():
        raise ValueError(
            f"{file} would fill only {report.encoder_share:.1%} of the encoder's parameters, less than "
            f"{MIN_ENCODER_SHARE:.0%}. Set {ALLOW_PARTIAL}=1 to load the matching part.\n{report.table()}"
        )
    with torch.no_grad():
        for name, value in transfer.values.items():
            target[name].copy_(value)
        for name, rows in transfer.rows.items():
            for row, value in rows.items():
                target[name][row].copy_(value)
    return report


def partial_is_allowed() -> bool:
    """Whether the user accepts a file that fills less than ``MIN_ENCODER_SHARE`` of the encoder."""
    return os.environ.get(ALLOW_PARTIAL) == "1"


class Transfer:
    """What ``transfer_weights`` would do, without changing the network.

    Args:
        state: weights under our names.
        target: the network's tensors; only their shapes are read, so they may be on the device "meta".
        file: as in ``transfer_weights``.
        source_description: as in ``transfer_weights``.
        target_description: as in ``transfer_weights``.
        input_channel_mapping: as in ``transfer_weights``.

    Attributes:
        values: new values by name.
        rows: new values of single heads, by name and head.
        report: on every tensor.

    Raises:
        ValueError: see ``transfer_weights``; a small share of the encoder is no error here.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        file: str,
        source_description: Mapping[str, Any],
        target_description: Mapping[str, Any],
        input_channel_mapping: str | None = None,
    ) -> None:
        self.state, self.target, self.file = state, stored_once(target), file
        self.source_description, self.target_description = source_description, target_description
        self.mapping = input_channel_mapping
        self.values: dict[str, Tensor] = {}
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.report = TransferReport(notes=differences(source_description, target_description))
        sizes = network_sizes(self.target)
        if sizes is None:
            raise ValueError(
                f"{file} can be loaded only into HySparK's network or nnU-Net's own ones, but this network has "
                f"{_some(target)}"
            )
        self.target_sizes: Sizes = sizes
        # the tensors of a partial file are matched by name, as if it came from this network
        self.source_sizes: Sizes = network_sizes(state) or sizes
        if self.source_sizes.stem != sizes.stem:
            raise ValueError(self._foreign_message())
        self.source_names = {name: source_name(name, self.source_sizes, sizes) for name in self.target}
        self._hows: dict[str, str] = {}
        self._whys: dict[str, str] = {}
        self._check_widths()
        self._match_groups()
        self._match_heads()
        self._write_report()
        if self.report.encoder_share == 0:
            raise ValueError(self._foreign_message())

    # ---------------------------------------------------------------------------------------------- matching

    def _fitted(self, name: str) -> tuple[Tensor | None, str]:
        """The file's tensor in the network's shape and how it was adapted, or None and why it does not fit."""
        theirs = self.source_names[name]
        if theirs is None or theirs not in self.state:
            return None, "not in the file"
        value, shape, hows = self.state[theirs], self.target[name].shape, []
        if name == self.target_sizes.stem and value.ndim == len(shape):
            value, how = adapt_stem(value, shape[1], self.source_description, self.target_description, self.mapping)
            if how:
                hows.append(how)
        if value.shape != shape and value.ndim == len(shape) > 2 and value.shape[:2] == shape[:2]:
            adapt = adapt_upsampling if UPSAMPLING.fullmatch(name) else adapt_kernel
            adapted = adapt(value, shape[2:])
            if adapted is not None:
                hows.append(f"kernel {_times(value.shape[2:])} -> {_times(shape[2:])}")
                value = adapted
        if value.shape != shape:
            return None, f"shape {_times(self.state[theirs].shape)} in the file, {_times(shape)} here"
        return value, "; ".join(hows)

    def _check_widths(self) -> None:
        wrong = []
        for name in self.target:
            theirs = self.source_names[name]
            if theirs in self.state and is_required(name, self.source_sizes, self.target_sizes):
                value, _ = self._fitted(name)
                if value is None:
                    wrong.append(name)
        if wrong:
            raise ValueError(self._width_message(wrong))

    def _match_groups(self) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.target:
            if not name.startswith(HEADS):
                # in common stages, a part of a block is loaded, too: the file may be partial
                required = is_required(name, self.source_sizes, self.target_sizes)
                groups[name if required else group_of(name)].append(name)
        for members in groups.values():
            fitted = {name: self._fitted(name) for name in members}
            misfits = [why for value, why in fitted.values() if value is None]
            for name, (value, how) in fitted.items():
                if value is None or misfits:
                    self._whys[name] = next((why for why in misfits if why != "not in the file"), misfits[0])
                else:
                    self.values[name] = value
                    self._hows[name] = how
        if isinstance(self.source_sizes, EncoderSizes) and isinstance(self.target_sizes, EncoderSizes):
            self._note_vit(self.source_sizes, self.target_sizes)
        elif self.source_sizes.n_stages != self.target_sizes.n_stages:
            common = n_common_stages(self.source_sizes, self.target_sizes)
            self.report.notes.append(
                f"{self.source_sizes.n_stages} stages in the file, {self.target_sizes.n_stages} here: the first "
                f"{common} are loaded"
            )

    def _note_vit(self, source: EncoderSizes, target: EncoderSizes) -> None:
        if "encoder.vit.norm.weight" in self.state and "encoder.vit.norm.weight" not in self.values:
            why = f"width {source.vit_width} in the file, {target.vit_width} here"
            self._whys.update({name: why for name in self.target if name.startswith("encoder.vit.")})
            self.report.notes.append(f"WARNING: the ViT is not loaded, it starts from random weights: {why}")
        elif source.n_stages != target.n_stages:
            self.report.notes.append(
                f"the ViT of stage {source.n_stages - 1} in the file is loaded into stage {target.n_stages - 1}"
            )

    def _match_heads(self) -> None:
        """Matches heads by the names of their labels, if the decoder level that they read is loaded."""
        for name in (name for name in self.target if name.startswith(HEADS)):
            theirs, level = self.source_names[name], level_of_head(name, self.target_sizes)
            if theirs is None or theirs not in self.state:
                self._whys[name] = "heads are matched by label; not in the file"
                continue
            value, target = self.state[theirs], self.target[name]
            heads, why = matching_heads(self.source_description, self.target_description, len(value), len(target))
            if value.shape[1:] != target.shape[1:] or not any(n.startswith(level) for n in self.values):
                heads, why = {}, "their decoder level is not loaded"
            self._whys[name] = f"heads are matched by label; {why}"
            if len(heads) == len(target) == len(value) and all(a == b for a, b in heads.items()):
                self.values[name] = value
                self._hows[name] = ""
            elif heads:
                self.rows[name] = {ours: value[source] for ours, source in heads.items()}
                labels = self.target_description["labels"]
                self._hows[name] = f"by label: {', '.join(labels[head] for head in sorted(heads))}"

    # ------------------------------------------------------------------------------------------------ report

    def _write_report(self) -> None:
        for name, tensor in self.target.items():
            count = tensor.numel()
            if name in self.values:
                how = self._hows[name]
                self.report.add(name, "adapted" if how else "loaded", count, how or self._moved(name))
            elif name in self.rows:
                taken = len(self.rows[name]) * (count // len(tensor))
                self.report.add(name, "adapted", taken, self._hows[name])
                if count > taken:
                    self.report.add(name, "random", count - taken, self._whys[name])
            else:
                self.report.add(name, "random", count, self._whys[name])
        used = {self.source_names[name] for name in (*self.values, *self.rows)}
        wanted = {theirs: ours for ours, theirs in self.source_names.items() if theirs is not None}
        for name, tensor in self.state.items():
            if name not in used:
                why = self._whys[wanted[name]] if name in wanted else "no such part in this network"
                self.report.add(name, "unused", tensor.numel(), why)

    def _moved(self, name: str) -> str:
        theirs = self.source_names[name]
        return "" if theirs == name or theirs is None else f"from {group_of(theirs).rstrip('.')} of the file"

    def _foreign_message(self) -> str:
        message = (
            f"{self.file} has no weights for this network's encoder: it holds {_some(self.state)}, the network has "
            f"{_some(self.target)}. "
        )
        about, command = self.source_description, "nnUNetv2_train DATASET"
        if trainer := about.get("trainer"):
            plans, configuration = about.get("plans", "PLANS"), about.get("configuration", "CONFIGURATION")
            return message + (
                f"It is a checkpoint of {trainer} on {about.get('dataset', 'another dataset')}, another architecture. "
                f"To start from it, use the same trainer and plans: {command} {configuration} FOLD -tr {trainer} "
                f"-p {plans} -pretrained_weights {self.file}"
            )
        sizes = network_sizes(self.state)
        if sizes is not None:
            network = sizes.network if isinstance(sizes, PlanSizes) else "HySparK"
            return message + (
                f"It holds a network of the kind {network}. To start from it, use the trainer and plans of that "
                f"network: {command} {about.get('configuration', 'CONFIGURATION')} FOLD "
                f"-tr {finetuning_trainer(sizes)} -p {about.get('plans', 'PLANS')} -pretrained_weights {self.file}"
            )
        return message + "Give a checkpoint of our trainers, of nnU-Net or of nnssl, or a file of the HySparK release."

    def _width_message(self, wrong: list[str]) -> str:
        name, source, target = wrong[0], self.source_sizes, self.target_sizes
        theirs = self.source_names[name] or name
        message = (
            f"{self.file} does not fit this network: {len(wrong)} tensors differ in shape, first {name}: "
            f"{tuple(self.state[theirs].shape)} in the file, {tuple(self.target[name].shape)} here."
        )
        if source.features_per_stage != target.features_per_stage:
            message += (
                f"\nWidths of the stages: {source.features_per_stage} in the file, {target.features_per_stage} here."
            )
        for line in differences(self.source_description, self.target_description):
            message += f"\n{line}"
        preset = self.source_description.get("preset") or preset_of(source)
        if preset and preset != (self.target_description.get("preset") or preset_of(target)):
            message += f"\nThe file was trained with preset {preset}: set HYSPARK_PRESET={preset}."
        return message + "\nNothing was loaded."


def preset_of(sizes: Sizes) -> str | None:
    """The preset of HySparK with these widths, if there is one."""
    if isinstance(sizes, PlanSizes):
        return None
    widths = tuple(sizes.features_per_stage)
    return next((name for name, p in PRESETS.items() if p.features_per_stage[: len(widths)] == widths), None)


def differences(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """Lists what two descriptions of networks disagree on, a line each.

    Args:
        source: description in the file.
        target: description of this network; only its keys are compared.
    """
    keys = [key for key in target if key in source and as_lists(source[key]) != as_lists(target[key])]
    return [
        f"differs: {key} is {source[key]} in the file, {target[key]} here" for key in keys if key not in NOT_COMPARED
    ]


def _times(sizes: torch.Size) -> str:
    return "x".join(map(str, sizes)) or "1"


def _some(state: Mapping[str, Tensor]) -> str:
    return ", ".join(list(state)[:3]) + (", ..." if len(state) > 3 else "")
