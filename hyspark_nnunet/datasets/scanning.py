"""Finding scans below a folder: volumes of any name, and DICOM series."""

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hyspark_nnunet.datasets.case_names import digest
from hyspark_nnunet.datasets.dicom import NOT_DICOM, identify
from hyspark_nnunet.datasets.parallel import for_each
from hyspark_nnunet.datasets.volumes import printable, volume_ending

EXAMPLES = 3  # names of files that were skipped
WHY = {  # a file is skipped, by its ending
    **dict.fromkeys((".hdr", ".img"), "half of a pair, of NIfTI or Analyze: convert the pair to .nii.gz"),
    **dict.fromkeys((".mgz", ".mgh", ".minc", ".mnc", ".par", ".rec"), "not read by nnU-Net: convert it to .nii.gz"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"), "packed: unpack it"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"), "an image, not a volume"),
    **dict.fromkeys((".raw", ".zraw"), "voxels of a .mhd or .nhdr file"),
    **dict.fromkeys((".dcm", ".ima", "without ending"), "not DICOM: lacks the mark DICM at byte 128"),
}


class Scan(NamedTuple):
    """One volume.

    Attributes:
        relative: path inside the searched folder with "/", without ending; of a series: its folder, and where that
            holds several series, a part of the series' identifier.
        files: the file; of a DICOM series, its slices in any order.
        ending: as the file name has it, ".dcm" for a series.
        modality: of a DICOM series, such as CT or MR; "" for other files.
    """

    relative: str
    files: tuple[str, ...]
    ending: str
    modality: str = ""

    @property
    def is_series(self) -> bool:
        return self.ending == ".dcm"


class Skipped(NamedTuple):
    """Files of one kind that are not scans: how many, and the first of them."""

    number: int
    examples: tuple[str, ...]


class Found(NamedTuple):
    """What lies below a folder.

    Attributes:
        scans: sorted by path.
        skipped: files that are not scans, by kind.
        spread: the folders of each DICOM series that lies in several; the slices of a folder are a scan of their own.
    """

    scans: list[Scan]
    skipped: dict[str, Skipped]
    spread: list[tuple[str, ...]]


class _Folder(NamedTuple):
    """A folder below ``root`` whose files, as paths below ``root``, are read for DICOM series."""

    root: str
    relative: str
    paths: tuple[str, ...]


def find_scans(folder: Path, include: Sequence[str] = (), exclude: Sequence[str] = (), processes: int = 1) -> Found:
    """Finds every volume and DICOM series below a folder; hidden files and folders are skipped.

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
    scans: list[Scan] = []
    others: list[_Folder] = []
    skipped: dict[str, Skipped] = {}
    folders: dict[str, list[str]] = {}
    for relative, names, hidden in _walk(root):
        kept = []
        for name in names:
            path = f"{relative}/{name}" if relative else name
            if not _wanted(path, include, exclude):
                continue
            ending = volume_ending(name)
            if ending is None:
                kept.append(path)
            else:
                scans.append(Scan(path[: -len(ending)], (os.path.join(root, path),), ending))
        if kept:
            others.append(_Folder(str(root), relative, tuple(kept)))
        _skip(skipped, "hidden", [f"{relative}/{name}" if relative else name for name in hidden])
    if others:
        for group, (series, left) in for_each(_series_of_folder, others, processes, "looking for DICOM"):
            for kind, paths in left.items():
                _skip(skipped, kind, paths)
            home = group.relative or folder.name
            for identifier, (modality, files) in series.items():
                part = f"/series-{digest(identifier)}" if len(series) > 1 else ""
                scans.append(Scan(home + part, files, ".dcm", modality))
                folders.setdefault(identifier, []).append(home)
    if not scans:
        raise FileNotFoundError(
            f"no scans in {root}: no file that ends in .nii.gz, .nii, .nrrd, .mha, .mhd or .gipl and no DICOM series"
            + (" fits --include and --exclude" if include or exclude else "")
            + (f"; skipped: {skipped_text(skipped)}" if skipped else "")
        )
    spread = sorted(tuple(sorted(homes)) for series, homes in folders.items() if series and len(homes) > 1)
    return Found(sorted(scans, key=lambda scan: (scan.relative, scan.ending)), skipped, spread)


def skipped_text(skipped: Mapping[str, Skipped]) -> str:
    """Such as "2 .json (a.json, b.json), 1 .zip (c.zip: packed: unpack it)"."""
    texts = []
    for kind, (count, examples) in sorted(skipped.items(), key=lambda item: -item[1].number):
        named = ", ".join(printable(name) for name in examples)
        why = f": {WHY[kind]}" if kind in WHY else ""
        texts.append(f"{count} {kind} ({named}{', ...' if count > len(examples) else ''}{why})")
    return ", ".join(texts)


def spread_text(spread: Sequence[tuple[str, ...]]) -> str:
    """Which DICOM series lie in several folders, and what to do; the first few are named."""
    named = "; ".join(printable(", ".join(homes[:EXAMPLES])) for homes in spread[:EXAMPLES])
    named += "; ..." if len(spread) > EXAMPLES else ""
    return (
        f"DICOM series that lie in several folders: {len(spread)} ({named}). "
        "Each folder becomes a scan of its own: put the slices of one volume into one folder, and --exclude copies"
    )


def _wanted(path: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatch.fnmatch(path, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatch(path, pattern) for pattern in exclude)


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders, their files, and what is hidden; links to folders are followed, each folder is visited once."""
    visited = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        hidden = sorted(name for name in (*folders, *names) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, root).replace(os.sep, "/")
        yield ("" if relative == "." else relative), sorted(n for n in names if not n.startswith(".")), hidden


def _skip(skipped: dict[str, Skipped], kind: str, paths: Sequence[str]) -> None:
    if paths:
        count, examples = skipped.get(kind, Skipped(0, ()))
        skipped[kind] = Skipped(count + len(paths), (*examples, *paths)[:EXAMPLES])


def _series_of_folder(folder: _Folder) -> tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, list[str]]]:
    """Modality and files by series, and files that are not DICOM images, by kind."""
    found: dict[str, dict[str, list[str]]] = {}
    left: dict[str, list[str]] = {}
    for path in folder.paths:
        file = os.path.join(folder.root, path)
        identity = identify(file)
        if isinstance(identity, str):
            kind = os.path.splitext(file)[1].lower() or "without ending" if identity == NOT_DICOM else identity
            left.setdefault(kind, []).append(path)
        else:
            found.setdefault(identity.series, {}).setdefault(identity.modality, []).append(file)
    series = {
        identifier if len(by_modality) == 1 else f"{identifier} {modality}": (modality, tuple(files))
        for identifier, by_modality in sorted(found.items())
        for modality, files in sorted(by_modality.items())
    }
    return series, left
