"""Names of cases, from paths of scans."""

import os
from collections import Counter
from collections.abc import Sequence
from hashlib import sha1

LONGEST = 150  # nnU-Net appends endings, and file systems allow 255 bytes
RESERVED = "_seg"  # nnU-Net keeps the segmentation of CASE in CASE_seg.b2nd, and takes no such file for a case
NIFTI_WORDS = (".nii", ".gz", ".hdr", ".img", ".nia")  # ITK writes a.nii.nii.gz as a.nii.gz


def unique_names(keys: Sequence[tuple[str, str]]) -> list[str]:
    """Case names of paths: the same path gives the same name whatever lies beside it.

    Folders are joined by "__"; characters that file systems or shells stumble over become "-". Where that could make
    two paths one name, part of the path's hash is appended; likewise where two differ in nothing but their ending,
    where a name is very long, ends as nnU-Net calls segmentations, or in an ending of NIfTI.

    Args:
        keys: path without ending, and ending.

    Raises:
        ValueError: two keys are the same.
    """
    same = [path + ending for (path, ending), count in Counter(keys).items() if count > 1]
    if same:
        raise ValueError(f"two scans would be one case: {', '.join(same[:10])}: --exclude one of each")
    twins = Counter(_plain_name(path)[0].lower() for path, _ in keys)
    paths = Counter(path for path, _ in keys)
    names = []
    for path, ending in keys:
        name, altered = _plain_name(path)
        if paths[path] > 1 or (twins[name.lower()] > 1 and not altered):
            name += f"-{digest(path + ending)}"
        elif altered:
            name += f"-{digest(path)}"
        names.append(name)
    return names


def usable_name(name: str) -> str:
    """A case's name, with part of its hash appended if nnU-Net could not use it."""
    fits = len(name) <= LONGEST and not name.endswith(RESERVED) and not name.lower().endswith(NIFTI_WORDS)
    return name if fits else f"{name[:LONGEST]}-{digest(name)}"


def digest(text: str) -> str:
    """Eight characters of a text's hash."""
    return sha1(os.fsencode(text), usedforsecurity=False).hexdigest()[:8]


def _plain_name(path: str) -> tuple[str, bool]:
    """The name, and whether part of the path's hash must follow."""
    parts = path.split("/")
    kept = ["".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in part) for part in parts]
    ambiguous = len(parts) > 1 and any("__" in part or part[:1] == "_" or part[-1:] == "_" for part in parts)
    name = "__".join(kept).lstrip(".-")
    return name[:LONGEST] or "case", ambiguous or name != "__".join(parts) or usable_name(name) != name
