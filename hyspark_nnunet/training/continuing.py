"""The checkpoint that a training goes on from: the newest that is whole, and always one before it."""

import os
import shutil
from pathlib import Path
from typing import Any

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.checkpoints.storage import check_whole, read_checkpoint

FINAL, LATEST, PREVIOUS, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "previous", "best"))


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """How far a training had come: epochs done, and steps of the next."""
    return checkpoint["current_epoch"], (checkpoint.get("inside_epoch") or {}).get("iterations", 0)


def newest_whole(folder: str | Path) -> tuple[Path, list[str]]:
    """The checkpoint of a fold's folder that has come farthest and can be read to its end.

    nnU-Net takes the final one, then the latest, then the best, whatever is in them.

    Returns:
        the file, and what is wrong with those passed over.

    Raises:
        ValueError: none is whole.
    """
    faults, found = [], []
    for name in (FINAL, LATEST, PREVIOUS, BEST):
        path = Path(folder) / name
        if path.is_file():
            try:
                # only its numbers are read here
                found.append((progress_of(read_checkpoint(path, mmap=True)), path))
            except (ValueError, KeyError, AttributeError) as error:
                faults.append(str(error) if isinstance(error, ValueError) else f"{path} is no checkpoint of a training")
    for _, path in sorted(found, key=lambda entry: entry[0], reverse=True):
        try:
            check_whole(path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path, faults
    raise ValueError("no checkpoint can be continued from:\n" + "\n".join(faults))


def keep_as_previous(latest: str | Path) -> None:
    """Gives the latest checkpoint a second name, under which it stays when the next one takes its place."""
    latest = Path(latest)
    with replacing(latest.with_name(PREVIOUS)) as beside:
        try:
            os.link(latest, beside)
        except OSError:  # a file system without hard links
            shutil.copy2(latest, beside)
