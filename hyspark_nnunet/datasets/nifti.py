"""What ITK does not say about a NIfTI file: where it ends, voxels that are not finite, and voxels that ITK misreads.

ITK fills a truncated file up with zeros, turns NaN and infinite voxels into zeros, and takes the voxels of ``a.nii``
for those of ``a.nii.gz`` beside it, all without a message. So the file is read again, with nibabel's header.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

PIECE = 1 << 20  # bytes read at a time
NIFTI_ENDINGS = (".nii.gz", ".nii")
HEADERS = {348: Nifti1Header, 540: Nifti2Header}  # by size, the first number of a file
SINGLE_FILE = (b"n+1", b"n+2")  # magic words of a header that stands before its voxels
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # per unit of length: unknown, metre, millimetre, micrometre
COMPLEX = (32, 1792, 2048)  # NIfTI's codes of voxel types
SPACING_TOLERANCE = 0.01
REWRITE = "write it again, with nibabel: nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine), NEW)"


class NotFinite(NamedTuple):
    """Numbers of NaN and of infinite voxels."""

    nan: int
    infinite: int


def read_nifti_header(path: str) -> Nifti1Header:
    """Reads the header of a NIfTI file, and refuses what ITK reads differently or not at all.

    Raises:
        ValueError: no NIfTI header; axes of no voxel; complex or unknown voxel types; two spacings.
    """
    with _opened(path) as file:
        header = _header(file)
    if isinstance(header, Nifti2Header):
        raise ValueError(f"it is NIfTI-2, which nnU-Net's SimpleITKIO cannot read: {REWRITE}")
    shape = _shape(header)
    if min(shape, default=0) < 1:
        raise ValueError(f"empty: {' x '.join(map(str, shape))} voxels")
    _dtype(header)
    _slope_and_intercept(header)
    _refuse_two_spacings(header)
    return header


def two_orientations(path: str) -> bool:
    """Whether qform and sform place the volume differently, and ITK follows the qform where nibabel takes the sform."""
    with _opened(path) as file:
        header = _header(file)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if qform <= 0 or sform <= 1:  # ITK, too, prefers the sform of a scanner
        return False
    by_qform, by_sform = header.get_qform(), header.get_sform()
    corners = np.array(np.meshgrid(*((0, n - 1) for n in (*_shape(header), 1, 1)[:3]))).reshape(3, -1)
    apart = (by_qform - by_sform)[:3, :3] @ corners + (by_qform - by_sform)[:3, 3:]
    return bool(np.abs(apart).max() > np.abs(header["pixdim"][1:4]).min())


def compare_with_file(path: str, image: sitk.Image) -> NotFinite:
    """Reads a NIfTI file to its end, which compares gzip's checksum, and compares its voxels with those of ITK.

    Args:
        path: of the file.
        image: that ITK has made of it.

    Returns:
        the voxels that are not finite in the file; ITK makes them zero.

    Raises:
        ValueError: the file is truncated or damaged, or ITK's voxels are not the file's.
    """
    with _opened(path) as file:
        header = _header(file)
        dtype = _dtype(header)
        slope, intercept = _slope_and_intercept(header)
        offset = max(header.get_data_offset(), header.sizeof_hdr + 4)
        needed = math.prod(_shape(header)) * dtype.itemsize
        parts = dtype.fields is not None  # RGB: bytes
        comparable = image.GetNumberOfComponentsPerPixel() == (len(dtype.fields or ()) or 1)
        read = sitk.GetArrayViewFromImage(image).reshape(-1)
        if comparable and read.size != math.prod(_shape(header)) * (len(dtype.fields or ()) or 1):
            raise ValueError(f"ITK reads {read.size} voxels instead of {math.prod(_shape(header))}: {REWRITE}")
        if parts:
            dtype = np.dtype(np.uint8)
        position = _skip(file, header.sizeof_hdr, offset)
        start = nan = infinite = 0
        rest = b""
        while position < offset + needed and (piece := file.read(min(PIECE, offset + needed - position))):
            position += len(piece)
            joined = rest + piece
            end = len(joined) - len(joined) % dtype.itemsize
            stored, rest = np.frombuffer(joined[:end], dtype), joined[end:]
            finite = np.isfinite(stored)
            if not finite.all():
                nan += int(np.isnan(stored).sum())
                infinite += int(np.isinf(stored).sum())
            if comparable:
                _compare(path, stored, read[start : start + len(stored)], slope, intercept)
            start += len(stored)
        if position < offset + needed:
            raise ValueError(f"truncated: {position} bytes instead of the {offset + needed} that its header promises")
        while file.read(PIECE):  # gzip compares the checksum at the end
            pass
    return NotFinite(nan, infinite)


def read_to_end(path: str) -> None:
    """Reads a file, packed with gzip or not.

    Raises:
        ValueError: the gzip stream has no end or another checksum.
    """
    with _opened(path) as file:
        while file.read(PIECE):
            pass


def _compare(path: str, stored: np.ndarray, read: np.ndarray, slope: float, intercept: float) -> None:
    finite = np.isfinite(stored)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
        found = read.astype(np.float32)
        near = np.abs(found - expected) <= 1e-5 * (np.abs(expected) + abs(slope))
    wrong = np.flatnonzero(~(near | (found == expected)) & finite)
    if len(wrong):
        first = wrong[0]
        twin = _twin(path)
        way_out = (
            f"it takes the voxels of {twin} beside it; move one of the two, or let prepare --link or --copy rename it"
            if twin
            else REWRITE
        )
        raise ValueError(
            f"ITK, and therefore nnU-Net, reads voxels that differ from the file's ({found[first]:g} instead of "
            f"{expected[first]:g}): {way_out}"
        )


def _twin(path: str) -> str | None:
    """The file whose voxels ITK's NIfTI reader prefers to those of ``path``."""
    stem = path[: -len(".gz")] if path.lower().endswith(".gz") else path
    return os.path.basename(stem) if stem != path and os.path.exists(stem) else None


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The unpacked content; errors of gzip as ValueError."""
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"  # some files are called .nii.gz and were never packed
        plain.seek(0)
        if not packed:
            yield plain
            return
        with gzip_errors(), gzip.open(plain, "rb") as unpacked:
            yield unpacked  # type: ignore[misc]


@contextmanager
def gzip_errors() -> Iterator[None]:
    """Errors of gzip as ValueError, with what to do."""
    try:
        yield
    except EOFError as error:
        raise ValueError("truncated: its gzip stream has no end; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"damaged: {error}; copy it again, or unpack and pack it with gzip") from error


def _header(file: BinaryIO) -> Nifti1Header:
    first = file.read(4)
    for order in ("little", "big"):
        size = int.from_bytes(first, order)
        if size not in HEADERS or len(first) < 4:
            continue
        block = first + file.read(size - 4)
        if len(block) < size:
            break
        header = HEADERS[size](block, endianness="<" if order == "little" else ">", check=False)
        if bytes(header["magic"]).rstrip(b"\0")[:3] not in SINGLE_FILE:
            raise ValueError("not a single NIfTI file: its header is that of a pair .hdr and .img, or of Analyze")
        return header
    raise ValueError("unreadable: truncated, or no NIfTI file")


def _shape(header: Nifti1Header) -> tuple[int, ...]:
    n_axes = int(header["dim"][0])
    if not 1 <= n_axes <= 7:
        raise ValueError(f"unreadable: its header says {n_axes} axes")
    return tuple(int(n) for n in header["dim"][1 : 1 + n_axes])


def _dtype(header: Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code in COMPLEX:
        raise ValueError("its voxels are complex numbers, which nnU-Net cannot use: store their magnitude")
    try:
        dtype = header.get_data_dtype()
    except HeaderDataError:
        dtype = np.dtype("V")
    if dtype.fields is None and (dtype.kind not in "iuf" or dtype.itemsize > 8):
        raise ValueError(f"its voxels are of NIfTI's type {code}, which nnU-Net cannot read: {REWRITE}")
    return dtype


def _slope_and_intercept(header: Nifti1Header) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise ValueError(f"its header is damaged ({error}): {REWRITE}") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept))


def _refuse_two_spacings(header: Nifti1Header) -> None:
    """Where ITK follows the sform, it still takes the spacing of pixdim."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 or (qform > 0 and sform != 1):  # ITK takes the qform, which has pixdim's spacing
        return
    unit = MM.get(int(header["xyzt_units"]) & 7, 1.0)
    of_sform = np.linalg.norm(header.get_sform()[:3, :3], axis=0) * unit
    of_pixdim = np.abs(np.asarray(header["pixdim"][1:4], np.float64)) * unit
    n = min(3, len(_shape(header)))
    if not np.allclose(of_sform[:n], of_pixdim[:n], rtol=SPACING_TOLERANCE):
        said = " and ".join(" x ".join(f"{step:g}" for step in steps[:n]) for steps in (of_pixdim, of_sform))
        raise ValueError(
            f"its header gives two spacings, {said} mm (pixdim and sform): correct the wrong one, with nibabel "
            "header.set_zooms or image.set_sform"
        )


def _skip(file: BinaryIO, position: int, offset: int) -> int:
    while position < offset and (skipped := file.read(min(PIECE, offset - position))):
        position += len(skipped)
    return position
