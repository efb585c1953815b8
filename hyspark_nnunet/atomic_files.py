"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; renamed to ``path`` at the end, removed where writing fails.

    Whoever reads ``path`` meanwhile sees the old file or the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:  # on the disk before the name says so
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_half_written(folder: str | Path) -> None:
    """Removes what processes that were killed while ``replacing`` a file of this folder have left."""
    for beside in Path(folder).glob(".*.tmp"):
        if beside.stem.rpartition(".")[2].isdecimal():
            beside.unlink(missing_ok=True)
