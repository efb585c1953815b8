"""Cases in a folder that preprocessing with the current plans would not give."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from hyspark_nnunet.preprocessing.records import RecordedFolder
from hyspark_nnunet.preprocessing.settings import differences


class StaleFile(NamedTuple):
    """A file with its identity, so that one that another machine has replaced meanwhile is not removed."""

    ending: str
    identity: tuple[int, int]


class StaleCase(NamedTuple):
    """A case that must not stay.

    Attributes:
        settings: digest of the settings that it was made with; None: not recorded.
        listed: whether the dataset has it.
        files: what is there.
    """

    settings: str | None
    listed: bool
    files: tuple[StaleFile, ...]


def stale_cases(recorded: RecordedFolder, listed: set[str], digest: str) -> dict[str, StaleCase]:
    """Cases of other settings, without a record, or that the dataset does not list.

    Args:
        recorded: the folder.
        listed: the dataset's cases.
        digest: of today's settings.
    """
    # the files first: what another machine finishes in between has a record, but is not in this list
    there = {name: _identities(recorded, name, endings) for name, endings in recorded.cases().items()}
    records = recorded.read()
    stale = {}
    for name, files in there.items():
        record = records.get(name)
        if name not in listed or record is None or record.settings != digest:
            stale[name] = StaleCase(None if record is None else record.settings, name in listed, files)
    return stale


def stale_text(recorded: RecordedFolder, stale: Mapping[str, StaleCase], now: Mapping[str, Any]) -> str:
    """What is wrong with stale cases, in one line."""
    unlisted = [name for name, case in stale.items() if not case.listed]
    unrecorded = [name for name, case in stale.items() if case.listed and case.settings is None]
    parts = []
    if unlisted:
        parts.append(f"{len(unlisted)} are not in the dataset, {unlisted[0]} for one")
    if unrecorded:
        parts.append(f"{len(unrecorded)} have no record, as after nnUNetv2_preprocess, {unrecorded[0]} for one")
    digests = sorted({case.settings for case in stale.values() if case.listed and case.settings is not None})
    for digest in digests:
        count = sum(case.listed and case.settings == digest for case in stale.values())
        before = recorded.settings(digest)
        what = "other settings" if before is None else ", ".join(differences(before, now))
        parts.append(f"{count} were made before these changed: {what}")
    return f"{recorded.folder} holds {len(stale)} cases that do not fit the plans: {'; '.join(parts)}"


def remove_stale(recorded: RecordedFolder, stale: Mapping[str, StaleCase]) -> None:
    """Removes the files of stale cases, those first by which nnU-Net lists cases."""
    for name, case in stale.items():
        for ending, identity in sorted(case.files, key=lambda file: file.ending not in (".b2nd", ".npz")):
            path = recorded.folder / (name + ending)
            with contextlib.suppress(FileNotFoundError):
                if _identity(os.stat(path)) == identity:
                    path.unlink()


def _identities(recorded: RecordedFolder, name: str, endings: list[str]) -> tuple[StaleFile, ...]:
    found = []
    for ending in endings:
        with contextlib.suppress(FileNotFoundError):
            found.append(StaleFile(ending, _identity(os.stat(recorded.folder / (name + ending)))))
    return tuple(found)


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_ino, state.st_mtime_ns
