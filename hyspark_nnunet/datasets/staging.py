"""Builds a dataset folder beside its final path and renames it, so that a reader never sees an incomplete one."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyspark_nnunet.datasets.dataset_json import DATASET_JSON, made_here


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuses an existing folder, unless this package made it and it may be overwritten.

    Raises:
        ValueError: what to do instead.
    """
    _restore(target)
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists and is not overwritten: give another -d or -n, or --overwrite to replace it")
    if not made_here(target):
        raise ValueError(
            f"{target} was not made by hyspark_nnunet (its {DATASET_JSON} does not say so), it may hold labels that "
            "exist nowhere else: --overwrite does not replace it; remove it yourself, or give another -d"
        )


@contextmanager
def built_beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that replaces ``target`` if the block succeeds, and is removed if it fails.

    Its name begins with a dot, so nnU-Net does not take it for a dataset. The next run removes what a killed run left.

    Args:
        target: the folder to make.
        overwrite: replace an existing one, once the new one is complete.

    Raises:
        ValueError: see ``refuse_existing``; also if the folder appeared in the meantime.
    """
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = new_building_folder(target.parent, f".{target.name}.building")
    try:
        yield building
        refuse_existing(target, overwrite)
        _take_place(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def new_building_folder(parent: Path, prefix: str) -> Path:
    """A new folder with this machine's name and process in its name; removes those whose process is gone."""
    prefix = f"{prefix}-{socket.gethostname()}-"
    for folder in parent.glob(f"{prefix}*"):
        process = folder.name.removeprefix(prefix)
        if process.isdigit() and not process_runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    building = parent / f"{prefix}{os.getpid()}"
    building.mkdir()
    return building


def _take_place(building: Path, target: Path) -> None:
    replaced = _replaced(target)
    if not target.exists():
        os.rename(building, target)
        return
    os.rename(target, replaced)
    try:
        os.rename(building, target)
    except OSError:
        os.rename(replaced, target)
        raise
    shutil.rmtree(replaced)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore(target: Path) -> None:
    """Moves the old dataset back if a run was killed between its two renames."""
    replaced = _replaced(target)
    if replaced.exists():
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, target)


def process_runs(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
