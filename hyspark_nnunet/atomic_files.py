"""Files that are written completely or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# unique among the processes of all machines that share the disk; earlier versions took the number of the process
_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{16}|\d+)\.tmp")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; renames it to ``path`` at the end, removes it if writing fails.

    A reader of ``path`` sees the old file or the new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as file:  # on the disk before it has the final name
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_half_written(folder: str | Path) -> None:
    """Removes temporary files of processes that were killed while ``replacing`` a file of this folder."""
    for beside in Path(folder).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(beside.name):
            beside.unlink(missing_ok=True)
