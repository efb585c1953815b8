"""Which cases in a folder are done, and with which settings.

The records lie in a subfolder of the preprocessed cases, where nnU-Net does not look; nnU-Net's own command deletes
them together with the cases. Each process appends to a log of its own, so that machines that share the folder do not
write the same file. A record is written before the files get their final names. So files of a case that do not match
its last record are those of an interrupted run, or damaged.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hyspark_nnunet.atomic_files import replacing

RECORDS = ".hyspark_preprocess"
CASE_ENDINGS = ("_seg.b2nd", ".b2nd", ".pkl", "_seg.npy", ".npy", ".npz")


class Record(NamedTuple):
    """A case as it was written.

    Attributes:
        settings: digest of what preprocessing read from the plans.
        raw: sizes and times of the raw files that were read.
        files: sizes in bytes by ending.
        written: when, in seconds since 1970.
    """

    settings: str
    raw: list[list[int]]
    files: dict[str, int]
    written: float


class RecordedFolder:
    """A folder of preprocessed cases with its records.

    Args:
        folder: of a data_identifier.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own = folder / RECORDS

    def read(self) -> dict[str, Record]:
        """The last record of every case; the end of a log that was cut off does not count."""
        records: dict[str, Record] = {}
        for log in sorted(self._own.glob("*.jsonl")):
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    name, *fields = json.loads(line)
                    record = Record(*fields)
                except (ValueError, TypeError):
                    continue
                if name not in records or records[name].written < record.written:
                    records[name] = record
        return records

    def add(self, name: str, settings: str, raw: list[list[int]], files: Mapping[str, int]) -> None:
        """Appends to the log of this process; it is on the disk when this returns."""
        line = json.dumps([name, settings, raw, files, time.time()]) + "\n"
        log = self._own / f"{socket.gethostname()}.{os.getpid()}.jsonl"
        handle = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            length = os.fstat(handle).st_size
            if length and os.pread(handle, 1, length - 1) != b"\n":
                line = "\n" + line  # an earlier process of the same number was killed while it wrote
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def keep_settings(self, digest: str, settings: Mapping[str, Any]) -> None:
        """Keeps settings, so that a later run can say what has changed."""
        self._own.mkdir(parents=True, exist_ok=True)
        file = self._own / f"settings_{digest}.json"
        if not file.exists():
            with replacing(file) as beside:
                beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def settings(self, digest: str) -> dict[str, Any] | None:
        """The settings of this digest; None if they are not there."""
        file = self._own / f"settings_{digest}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def cases(self) -> dict[str, list[str]]:
        """Endings of the files that are there, by case."""
        found: dict[str, list[str]] = {}
        if self.folder.is_dir():
            for file in os.scandir(self.folder):
                ending = next((ending for ending in CASE_ENDINGS if file.name.endswith(ending)), None)
                if ending is not None:
                    found.setdefault(file.name.removesuffix(ending), []).append(ending)
        return found

    def sizes(self, name: str, endings: list[str]) -> dict[str, int]:
        """Bytes of the files of a case by ending; without those that have gone meanwhile."""
        found = {}
        for ending in endings:
            try:
                found[ending] = os.stat(self.folder / (name + ending)).st_size
            except FileNotFoundError:
                continue
        return found

    def writing_folder(self) -> Path:
        """Where cases are written before they get their names."""
        folder = self._own / "writing"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def raw_files(paths: list[str]) -> list[list[int]]:
    """Size and time (ns) of each file.

    Raises:
        OSError: one is missing.
    """
    states = [os.stat(path) for path in paths]
    return [[state.st_size, state.st_mtime_ns] for state in states]
