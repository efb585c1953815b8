"""How long is trained, and how: one set of lengths per work folder, the same for all arms."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.few_labels.work import read_json, write_json


# untyped result, as dataclasses.field has: the annotation beside it says the type
def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": f"{meaning} (default: {default})"})


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
    pretrain_decoder_width: int = _option(96, "width of HySparK's decoder of pre-training; 0: that of the preset")
    pretrain_warmup: float = _option(0.1, "part of the pre-training in which its learning rate rises")
    finetune_epochs: int = _option(20, "epochs of fine-tuning: points of the learning curve")
    finetune_iterations: int = _option(15, "steps of an epoch of fine-tuning")
    finetune_val_iterations: int = _option(8, "validation batches of an epoch of fine-tuning")
    finetune_batch: int = _option(2, "patches of a step of fine-tuning")
    finetune_lr: float = _option(3e-3, "learning rate of fine-tuning, but of stock nnU-Net's")
    save_every: int = _option(5, "epochs between two checkpoints")
    loader_processes: int = _option(0, "processes that draw and augment; only with 0 does a seed repeat a run")


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option per setting; one that is not given stays as the work folder has it."""
    group = parser.add_argument_group("settings, fixed by the first command on a work folder")
    for each in fields(Settings):
        group.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), help=each.metadata["help"])


def settings_of(arguments: argparse.Namespace, file: Path) -> Settings:
    """The settings of a work folder, noted in its file by the first command.

    Raises:
        ValueError: an option differs from what the folder was begun with.
    """
    given = {e.name: value for e in fields(Settings) if (value := getattr(arguments, e.name)) is not None}
    if not file.is_file():
        write_json(file, asdict(Settings(**given)))
    settings = Settings(**read_json(file))
    for name, value in given.items():
        if value != getattr(settings, name):
            raise ValueError(
                f"{file.parent} was begun with {name} {getattr(settings, name)}, not {value}: its runs are compared "
                "with each other. Leave the option out, or take another --work"
            )
    return settings
