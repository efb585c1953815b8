"""How long is trained, and how: one set of lengths per work folder, the same for all arms."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyspark_nnunet.atomic_files import replacing


# untyped result, as dataclasses.field has: the annotation beside it says the type
def _option(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """Lengths and rates; the defaults suit two CPU cores."""

    preset: str = _option("S", "size of HySparK's network: S, B or L")
    spacing: str = _option("", "target spacing in mm, three numbers in quotes; empty: as nnU-Net plans it")
    device: str = _option("cpu", "where to train: cpu, cuda or mps")
    pretrain_epochs: int = _option(100, "epochs of pre-training")
    pretrain_iterations: int = _option(50, "steps of an epoch of pre-training")
    pretrain_val_iterations: int = _option(4, "validation batches of an epoch of pre-training")
    pretrain_batch: int = _option(4, "patches of a step of pre-training")
    pretrain_lr: float = _option(1e-3, "learning rate of pre-training")
    pretrain_decoder_width: int = _option(
        96, "channels of the coarsest level of HySparK's decoder of pre-training; 0: those of the preset"
    )
    pretrain_warmup: float = _option(0.1, "part of the pre-training in which its learning rate rises")
    finetune_epochs: int = _option(20, "epochs of fine-tuning: points of the learning curve")
    finetune_iterations: int = _option(15, "steps of an epoch of fine-tuning")
    finetune_val_iterations: int = _option(8, "validation batches of an epoch of fine-tuning")
    finetune_batch: int = _option(2, "patches of a step of fine-tuning")
    finetune_lr: float = _option(3e-3, "learning rate of fine-tuning, but of stock nnU-Net's")
    save_every: int = _option(5, "epochs between two checkpoints")
    loader_processes: int = _option(
        0, "processes that draw and augment; with 0, the training's own, a seed repeats a run"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option per setting; one that is not given stays as the work folder has it."""
    group = parser.add_argument_group("settings, fixed by the first command on a work folder")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default: {field.default})"
        group.add_argument(name, type=type(field.default), default=None, help=text)


def read_settings(file: Path) -> Settings:
    """The settings that a work folder was begun with."""
    return Settings(**json.loads(file.read_text(encoding="utf-8")))


def settings_of(arguments: argparse.Namespace, file: Path) -> Settings:
    """The settings of a work folder, noted there by the first command.

    Args:
        arguments: of a parser with ``add_options``.
        file: where they are noted.

    Raises:
        ValueError: an option differs from what the folder was begun with.
    """
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    if not file.is_file():
        settings = Settings(**given)
        with replacing(file) as beside:
            beside.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")
        return settings
    settings = read_settings(file)
    for name, value in given.items():
        if value != getattr(settings, name):
            raise ValueError(
                f"{file.parent} was begun with {name} {getattr(settings, name)}, not {value}: its runs are compared "
                "with each other. Leave the option out, or take another --work"
            )
    return settings
