"""Small scans for the tests of datasets."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def ct(seed: int = 0, shape: tuple[int, ...] = (6, 10, 12), spacing: tuple[float, ...] = (2.0, 2.0, 3.0)) -> sitk.Image:
    """A block of tissue in air, noise of its own."""
    array = np.full(shape, -1000, dtype=np.float32)
    array[1:-1, 2:-2, 2:-2] = 40
    array += np.random.default_rng(seed).normal(0, 8, shape).astype(np.float32)
    image = sitk.GetImageFromArray(array.round().astype(np.int16))
    image.SetSpacing(spacing)
    return image


def mr(seed: int = 0, shape: tuple[int, ...] = (6, 10, 12)) -> sitk.Image:
    """The same block with positive intensities in a dark background, float32."""
    array = np.random.default_rng(seed).uniform(0, 20, shape).astype(np.float32)
    array[1:-1, 2:-2, 2:-2] += 300
    return sitk.GetImageFromArray(array)


def write(image: sitk.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return path


def array_of(path: Path | str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def write_dicom_series(
    image: sitk.Image,
    folder: Path,
    names: list[str],
    uid: str = "1.2.826.0.1.3680043.2.1125.1",
    skip: tuple[int, ...] = (),
) -> None:
    """One file per slice, named as asked and not in the order of the slices' places; ``skip`` leaves slices out."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    orientation = "\\".join(str(value) for value in (*direction[:, 0], *direction[:, 1]))
    for k in range(image.GetSize()[2]):
        if k in skip:
            continue
        plane = image[:, :, k]
        tags = {
            "0008|0060": "CT",
            "0020|000e": uid,
            "0020|000d": uid + ".7",
            "0008|0018": f"{uid}.{k + 100}",
            "0020|0037": orientation,
            "0020|0032": "\\".join(str(v) for v in image.TransformIndexToPhysicalPoint((0, 0, k))),
            "0020|0013": str(1),  # of no use: all alike
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / names[k]))
        writer.Execute(plane)
