"""Random small scans of many forms, each with what an independent reader says of it: a strategy of hypothesis.

NIfTI is written and read by nibabel, DICOM by pydicom; for the other formats the image that SimpleITK wrote counts.
"""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scipy.spatial.transform import Rotation

from tests.datasets.dicom_files import enhanced, save, slices

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from nibabel's axes to DICOM's
NAMES = ("a", "a b", "ä", "liver_seg", "x_0000", "p.", "A.b", "__", "n" * 120, "s-1", "a$b", "scan.nii", "#(1)")


class Truth(NamedTuple):
    """Voxels (x, y, z) and the matrix from indices to mm (LPS), as an independent reader has them."""

    voxels: np.ndarray
    affine: np.ndarray


Writer = Callable[[Path, str], Truth | None]  # folder and name -> what was written; None: nobody can read it


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    return draw(st.tuples(*[st.sampled_from((2, 3, 4, 5, 7))] * 3))


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Rotation or permutation, flips, spacings, an origin."""
    spacing = draw(st.tuples(*[st.sampled_from((0.4, 1.0, 1.5, 3.0, 7.5))] * 3))
    angles = draw(st.tuples(*[st.sampled_from((0, 0, 90, 180, 270, 17))] * 3))
    flips = draw(st.tuples(*[st.sampled_from((1, 1, -1))] * 3))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(np.multiply(spacing, flips))
    affine[:3, 3] = draw(st.tuples(*[st.sampled_from((0.0, -12.5, 100.0))] * 3))
    return affine


@st.composite
def nifti(draw: st.DrawFn) -> Writer:
    shape, affine = draw(shapes()), draw(affines())
    dtype = draw(st.sampled_from(("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "rgb")))
    slope, intercept = draw(st.sampled_from(((1, 0), (1, -1024), (0.01, 0), (-3, 7), (0, 0), (np.nan, 0), (0, 9))))
    order, ending = draw(st.sampled_from("<>")), draw(st.sampled_from((".nii", ".nii.gz", ".NII", ".nii.GZ")))
    codes = draw(st.tuples(st.sampled_from((0, 1, 2)), st.sampled_from((0, 1, 2, 4))))
    unit = draw(st.sampled_from(("mm", "mm", "unknown", "micron", "meter")))
    damage = draw(st.sampled_from(("",) * 6 + ("cut", "flip", "tail", "nan", "times", "one time", "zero axis")))
    seed = draw(st.integers(0, 99))

    def write(folder: Path, name: str) -> Truth | None:
        rng = np.random.default_rng(seed)
        full = shape + {"times": (2,), "one time": (1,)}.get(damage, ())
        if dtype == "rgb":
            values = np.zeros(full, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        else:
            values = rng.integers(0, 120, full).astype(order + dtype)
        if damage == "nan" and dtype[0] == "f":
            values[0, 0, 0] = np.nan
        header = nibabel.Nifti1Header(endianness=order)
        header.set_data_dtype(values.dtype)
        scale = {"micron": 1000.0, "meter": 0.001}.get(unit, 1.0)
        placed = np.diag([scale, scale, scale, 1]) @ affine
        image = nibabel.Nifti1Image(values, placed, header)
        image.header.set_xyzt_units(unit)
        image.set_qform(placed, codes[0])
        image.set_sform(placed, codes[1])
        plain = bytearray(image.to_bytes())
        if dtype != "rgb":
            plain[112:120] = np.array([slope, intercept], order + "f4").tobytes()
        if damage == "zero axis":
            plain[46:48] = b"\0\0"
        path = folder / f"{name}{ending}"
        content = gzip.compress(bytes(plain)) if ending.lower().endswith("gz") else bytes(plain)
        if damage == "cut":
            content = content[: -1 - seed % 20]
        elif damage == "flip" and ending.lower().endswith("gz"):
            content = content[:-6] + bytes([content[-6] ^ 255]) + content[-5:]
        elif damage == "tail":
            content += b"tail"
        path.write_bytes(content)
        if damage in ("cut", "times", "zero axis") or (damage == "nan" and dtype[0] == "f") or dtype in ("rgb", "c8"):
            return None
        if not any(codes):  # no place in the patient: only the spacing counts
            matrix = np.diag([*np.array(image.header.get_zooms()[:3]) / scale, 1.0])
            return Truth(_scaled(values, slope, intercept), matrix)
        return Truth(_scaled(values, slope, intercept), LPS @ affine)

    return write


def _scaled(values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    values = values.reshape(values.shape[:3])
    if not np.isfinite(slope) or slope == 0:
        slope, intercept = 1.0, 0.0
    return values.astype(np.float64) * np.float32(slope) + np.float32(intercept)


@st.composite
def other_formats(draw: st.DrawFn) -> Writer:
    shape, affine = draw(shapes()), draw(affines())
    dtype = draw(st.sampled_from(("u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", "i8")))
    ending = draw(st.sampled_from((".nrrd", ".mha", ".mhd", ".nhdr", ".MHA", ".gipl")))
    packed, cut = draw(st.booleans()), draw(st.sampled_from((0, 0, 0, 1, 9)))
    seed = draw(st.integers(0, 99))

    def write(folder: Path, name: str) -> Truth | None:
        values = np.random.default_rng(seed).integers(0, 120, shape[::-1]).astype(dtype)
        image = sitk.GetImageFromArray(values)
        if ending != ".gipl":  # which has no direction
            steps = np.linalg.norm(affine[:3, :3], axis=0)
            image.SetDirection((affine[:3, :3] / steps).ravel().tolist())
            image.SetSpacing(steps.tolist())
            image.SetOrigin(affine[:3, 3].tolist())
        path = folder / f"{name}{ending}"
        try:
            sitk.WriteImage(image, str(path), packed and ending != ".gipl")
        except RuntimeError:  # gipl has few types
            path.unlink(missing_ok=True)
            sitk.WriteImage(sitk.Cast(image, sitk.sitkInt16), str(path))
        if cut:
            longest = max(folder.glob(f"{name}*"), key=lambda file: (file != path or ".hdr" not in name, file != path))
            longest.write_bytes(longest.read_bytes()[:-cut])
        return None if cut else Truth(values.T.astype(float), affine if ending != ".gipl" else np.eye(4))

    return write


@st.composite
def dicom(draw: st.DrawFn) -> Writer:
    shape, affine = draw(shapes()), draw(affines())
    dtype = draw(st.sampled_from(("u2", "i2", "u1")))
    syntax = draw(st.sampled_from((ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)))
    rescale = draw(st.lists(st.sampled_from(((1.0, 0.0), (1.0, -1024.0), (0.0003, 0.5), (2.0, -1.0))), min_size=7))
    equal, modality = draw(st.booleans()), draw(st.sampled_from(("CT", "MR", "PT")))
    fault = draw(st.sampled_from(("",) * 6 + ("missing", "twice", "tilt", "turned", "size", "spacing", "short")))
    one_file, seed = draw(st.booleans()), draw(st.integers(0, 99))
    endings = draw(st.sampled_from((".dcm", "", ".IMA", ".1")))

    def write(folder: Path, name: str) -> Truth | None:
        rng = np.random.default_rng(seed)
        n = shape[2] + 2
        stored = rng.integers(0, 120, (n, *shape[1::-1])).astype(dtype)
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        turn = Rotation.from_matrix((affine[:3, :3] / steps) @ np.diag([1, 1, np.linalg.det(affine[:3, :3] / steps)]))
        axes = np.round(turn.as_matrix(), 8)
        places = [affine[:3, 3] + axes[:, 2] * steps[2] * k for k in range(n)]
        if fault == "tilt":
            places = [place + axes[:, 0] * steps[0] * k for k, place in enumerate(places)]
        values = [rescale[0 if equal else k % len(rescale)] for k in range(n)]
        truth = np.stack([one * slope + add for one, (slope, add) in zip(stored.astype(float), values, strict=True)])
        tags: dict[str, Any] = {
            "ImageOrientationPatient": [*axes[:, 0].tolist(), *axes[:, 1].tolist()],
            "PixelSpacing": [float(steps[1]), float(steps[0])],
        }
        if one_file:
            order = rng.permutation(n).tolist()
            keep = order[:-1] if fault == "missing" and order[-1] not in (0, n - 1) else order
            if fault == "twice":
                keep = [*order, order[0]]
            whole = enhanced(stored[keep], [places[k].tolist() for k in keep], modality, [values[k] for k in keep])
            shared = whole.SharedFunctionalGroupsSequence[0]
            shared.PlaneOrientationSequence[0].ImageOrientationPatient = tags["ImageOrientationPatient"]
            shared.PixelMeasuresSequence[0].PixelSpacing = tags["PixelSpacing"]
            if fault == "short":
                whole.PixelData = whole.PixelData[:-3]
            save(whole, folder / name / f"all{endings}")
            bad = len(keep) != n or fault in ("tilt", "short")
        else:
            made = slices(stored, modality, values, [place.tolist() for place in places], syntax, **tags)
            middle = n // 2
            if fault == "missing":
                del made[middle]
            elif fault == "twice":
                made.append(made[0])
            elif fault == "turned":
                made[middle].ImageOrientationPatient = [*axes[:, 1].tolist(), *axes[:, 2].tolist()]
            elif fault == "size":
                made[middle] = slices(stored[:1, :1], modality, None, [places[middle].tolist()], **tags)[0]
            elif fault == "spacing":
                made[middle].PixelSpacing = [5.0, 5.0]
            elif fault == "short":
                made[middle].PixelData = made[middle].PixelData[:-3]
            for number, index in enumerate(rng.permutation(len(made)).tolist()):
                save(made[index], folder / name / f"{number}{endings}")
            bad = bool(fault)
        if bad:
            return None
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = axes * steps, affine[:3, 3]
        return Truth(truth.T, matrix)

    return write


def scans() -> st.SearchStrategy[tuple[str, Writer]]:
    return st.tuples(st.sampled_from(NAMES), st.one_of(nifti(), other_formats(), dicom()))
