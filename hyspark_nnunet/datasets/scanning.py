"""Finding scans below a folder: volumes of any name, and DICOM series."""

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.volumes import dicom_tags, volume_ending


class Scan(NamedTuple):
    """One volume.

    Attributes:
        relative: path inside the searched folder with "/", without ending; of a series: its folder, and where that
            holds several series, a part of the series' identifier.
        files: the file; of a DICOM series, its slices in any order.
        ending: as the file name has it, ".dcm" for a series.
        modality: as DICOM says it, such as CT or MR; "" for other files.
    """

    relative: str
    files: tuple[str, ...]
    ending: str
    modality: str = ""

    @property
    def is_series(self) -> bool:
        return self.ending == ".dcm"


class Found(NamedTuple):
    """Scans, sorted by path, and how many files of other kinds were passed over, by ending."""

    scans: list[Scan]
    passed_over: Counter[str]


class _Folder(NamedTuple):
    """A folder whose files are read for DICOM series."""

    relative: str
    files: tuple[str, ...]


def find_scans(folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = (), processes: int = 1) -> Found:
    """Finds every volume and DICOM series below a folder; hidden files and folders are passed over.

    Args:
        folder: where to begin; where it has ``imagesTr``, only that is searched: nnU-Net's layout.
        include: patterns of paths below the folder (``*/ct.nii.gz``); empty: all.
        exclude: patterns that are left out.
        processes: that read DICOM headers.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give the folder that holds the scans")
    root = folder / "imagesTr" if (folder / "imagesTr").is_dir() else folder
    scans, others, passed_over = [], [], Counter[str]()
    for relative, names in _walk(root):
        kept = []
        for name in names:
            path = f"{relative}/{name}" if relative else name
            if not _wanted(path, include, exclude):
                continue
            ending = volume_ending(name)
            if ending is None:
                kept.append(os.path.join(root, path))
            else:
                scans.append(Scan(path[: -len(ending)], (os.path.join(root, path),), ending))
        if kept:
            others.append(_Folder(relative, tuple(kept)))
    if others:
        for group, (series, left) in for_each(_series_of_folder, others, processes, "looking for DICOM"):
            passed_over += left
            home = group.relative or folder.name
            for identifier, (modality, files) in series.items():
                part = f"/series-{_digest(identifier)}" if len(series) > 1 else ""
                scans.append(Scan(home + part, files, ".dcm", modality))
    if not scans:
        raise FileNotFoundError(
            f"no scans in {root}: nothing that ends in .nii.gz, .nii, .nrrd, .mha, .mhd or .gipl and no DICOM series"
            + (" fits --include and --exclude" if include or exclude else "")
            + (f"; passed over: {passed_over_text(passed_over)}" if passed_over else "")
        )
    return Found(sorted(scans, key=lambda scan: (scan.relative, scan.ending)), passed_over)


def passed_over_text(passed_over: Counter[str]) -> str:
    """Such as "12 .json, 3 .txt"."""
    return ", ".join(f"{count} {ending}" for ending, count in passed_over.most_common())


def unique_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Case names of paths: the same path gives the same name whatever lies beside it.

    Folders are joined by "__"; characters that file systems or shells stumble over become "-". Where that could make
    two paths one name, part of the path's hash is appended; likewise where two differ in nothing but their ending.

    Args:
        keys: path without ending, and ending.

    Raises:
        ValueError: two keys are the same.
    """
    twins = Counter(_plain_name(path)[0].lower() for path, _ in keys)
    paths = Counter(path for path, _ in keys)
    names = []
    for path, ending in keys:
        name, altered = _plain_name(path)
        if paths[path] > 1 or (twins[name.lower()] > 1 and not altered):
            name += f"-{_digest(path + ending)}"
        elif altered:
            name += f"-{_digest(path)}"
        names.append(name)
    same = [key for key, count in Counter(keys).items() if count > 1]
    if same:
        raise ValueError(f"two scans would be one case, {same[0][0]}{same[0][1]}: --exclude one")
    return names


def _plain_name(path: str) -> tuple[str, bool]:
    parts = path.split("/")
    kept = ["".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in part) for part in parts]
    ambiguous = len(parts) > 1 and any("__" in part or part[:1] == "_" or part[-1:] == "_" for part in parts)
    name = "__".join(kept).lstrip(".-")
    return name or "case", ambiguous or name != "__".join(parts)


def _digest(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()[:8]


def _wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatch.fnmatch(path, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatch(path, pattern) for pattern in exclude)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and their files; links to folders are followed, each folder is visited once."""
    visited = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, root).replace(os.sep, "/")
        yield ("" if relative == "." else relative), sorted(name for name in names if not name.startswith("."))


def _series_of_folder(folder: _Folder) -> tuple[dict[str, tuple[str, tuple[str, ...]]], Counter[str]]:
    """Modality and files by series, and what is no DICOM image, by ending."""
    series: dict[str, tuple[str, list[str]]] = {}
    left = Counter[str]()
    for file in folder.files:
        tags = dicom_tags(file)
        if tags is None:
            left[os.path.splitext(file)[1].lower() or "without ending"] += 1
        else:
            series.setdefault(tags[0], (tags[1], []))[1].append(file)
    return {identifier: (modality, tuple(files)) for identifier, (modality, files) in sorted(series.items())}, left
