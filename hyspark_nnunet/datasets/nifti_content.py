"""What ITK does not tell of a NIfTI file: where it ends, and voxels that are no numbers.

ITK fills up a file that is cut off with zeros, and makes NaN and infinite voxels zero, both without a word.
"""

import gzip
import os
import zlib
from typing import BinaryIO, NamedTuple

import numpy as np

PIECE = 1 << 20  # bytes read at a time
FLOATS = {16: "f4", 64: "f8"}  # NIfTI's datatype codes
NIFTI_1_SIZE, NIFTI_2_SIZE = 348, 540  # of the header, which begins with this number


class Content(NamedTuple):
    """Length of the (unpacked) content in bytes, and numbers of NaN and infinite voxels."""

    length: int
    nan: int
    infinite: int


def nifti_content(path: str) -> Content:
    """Reads a NIfTI file to its end; of a packed one that also compares gzip's checksum.

    Raises:
        ValueError: the packing is cut off or damaged.
    """
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"  # some files are called .nii.gz and were never packed
        plain.seek(0)
        if not packed:
            return _content(plain, os.path.getsize(path))
        try:
            with gzip.open(plain, "rb") as unpacked:
                return _content(unpacked, None)  # type: ignore[arg-type]
        except EOFError as error:
            raise ValueError("truncated: its gzip stream has no end") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"damaged: {error}") from error


def _content(file: BinaryIO, size: int | None) -> Content:
    header = file.read(NIFTI_2_SIZE)
    dtype, offset = _floats(header)
    if dtype is None and size is not None:
        return Content(size, 0, 0)
    length, nan, infinite = len(header), 0, 0
    rest = b""
    if dtype is not None:
        rest = header[offset:]
        while length < offset and (skipped := file.read(min(PIECE, offset - length))):
            length += len(skipped)
    while piece := file.read(PIECE):
        length += len(piece)
        if dtype is None:
            continue
        joined = rest + piece
        whole = len(joined) - len(joined) % dtype.itemsize
        bad, rest = _not_finite(joined[:whole], dtype), joined[whole:]
        nan, infinite = nan + bad[0], infinite + bad[1]
    if dtype is not None and len(rest) >= dtype.itemsize:  # a volume so small that it ends within the first piece
        bad = _not_finite(rest[: len(rest) - len(rest) % dtype.itemsize], dtype)
        nan, infinite = nan + bad[0], infinite + bad[1]
    return Content(length, nan, infinite)


def _floats(header: bytes) -> tuple[np.dtype | None, int]:
    """Type of the voxels if they are floating-point, and the byte at which they begin."""
    for order in "<>":
        kind = int(np.frombuffer(header[:4].ljust(4, b"\0"), f"{order}i4")[0])
        if kind == NIFTI_1_SIZE and len(header) >= NIFTI_1_SIZE:
            code = int(np.frombuffer(header, f"{order}i2", 1, 70)[0])
            offset = int(np.frombuffer(header, f"{order}f4", 1, 108)[0])
        elif kind == NIFTI_2_SIZE and len(header) >= NIFTI_2_SIZE:
            code = int(np.frombuffer(header, f"{order}i2", 1, 12)[0])
            offset = int(np.frombuffer(header, f"{order}i8", 1, 168)[0])
        else:
            continue
        return (np.dtype(order + FLOATS[code]) if code in FLOATS else None), offset
    return None, 0


def _not_finite(content: bytes, dtype: np.dtype) -> tuple[int, int]:
    values = np.frombuffer(content, dtype)
    missing = ~np.isfinite(values)
    nan = int(np.isnan(values).sum()) if missing.any() else 0
    return nan, int(missing.sum()) - nan
