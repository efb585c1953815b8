"""Synthetic volumes that look like small CT scans of a trunk: data for trials, without patients or downloads.

Every case has the same organs at about the same place, of its own size, shape and texture, so that what is hidden in a
block can be guessed from its surroundings, but not copied from another case. Nothing here imitates a disease or a
scanner: the volumes are for demonstrations and tests, not for research.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

# what a small network learns in a few minutes; kidneys, heart and aorta are in the images, but have no label
ORGANS = {"background": 0, "liver": 1, "spine": 2, "lungs": 3}
BODY = {"background": 0, "body": 1}
BODY_THRESHOLD_HU = -300.0
EXTENT_MM = np.array([180.0, 160.0, 160.0])  # of a whole volume, (z, y, x): a voxel is this over the shape
FILE_ENDING = ".nii.gz"


@dataclass(frozen=True)
class SyntheticCase:
    """One synthetic scan.

    Attributes:
        image: (z, y, x) in Hounsfield units; z to the head, y to the back, x to the patient's left.
        organs: (z, y, x), values as in ``ORGANS``. A lesion inside the liver counts as liver.
        spacing: size of a voxel (z, y, x) in mm.
    """

    image: FloatArray
    organs: npt.NDArray[np.uint8]
    spacing: tuple[float, float, float]


def synthetic_case(seed: int | Sequence[int], shape: tuple[int, int, int] = (72, 80, 80)) -> SyntheticCase:
    """Makes one scan; the same seed and shape make the same scan.

    Args:
        seed: what ``numpy.random.default_rng`` takes.
        shape: voxels (z, y, x), at least 32 each.

    Raises:
        ValueError: the shape is too small to hold the organs.
    """
    if min(shape) < 32:
        raise ValueError(f"shape {shape} is too small to hold the organs: take at least 32 voxels on each axis")
    rng = np.random.default_rng(seed)
    depth, height, width = (EXTENT_MM / np.array(shape) * rng.uniform(0.95, 1.05, 3)).round(3).tolist()
    where = _deformed_coordinates(shape, rng)
    body, fat, chest = _body(where, rng)

    liver_distance = _ellipsoid(where, _jitter(rng, (-0.1, -0.05, -0.36)), _jitter(rng, (0.48, 0.42, 0.40), 0.08))
    liver = (liver_distance < 1) & body & ~fat
    spine_core, spine, canal = _spine(where, rng)
    kidney_distance = np.minimum(
        _ellipsoid(where, _jitter(rng, (-0.52, 0.30, -0.42)), _jitter(rng, (0.36, 0.21, 0.20), 0.05)),
        _ellipsoid(where, _jitter(rng, (-0.45, 0.30, 0.42)), _jitter(rng, (0.36, 0.21, 0.20), 0.05)),
    )
    kidneys = (kidney_distance < 1) & body & ~fat & ~spine
    heart = _ellipsoid(where, _jitter(rng, (0.62, -0.22, 0.08)), _jitter(rng, (0.34, 0.26, 0.24), 0.08)) < 1
    aorta = _tube(where, (0.20, 0.09), 0.065 * rng.uniform(0.9, 1.15))
    lung_radii = _jitter(rng, (0.82, 0.48, 0.33), 0.06)
    lungs = np.minimum(
        _ellipsoid(where, _jitter(rng, (0.80, 0.03, -0.43)), lung_radii),
        _ellipsoid(where, _jitter(rng, (0.80, 0.03, 0.43)), lung_radii),
    )
    in_lungs = (lungs < 1) & (liver_distance > 1.3) & chest & ~spine & ~heart & ~aorta & ~kidneys
    liver &= ~kidneys & ~spine

    image = np.full(shape, -1000.0, dtype=np.float32)
    image[body] = (15 + 32 * _texture(shape, 2.5, rng))[body]
    image[fat] = (-100 + 12 * _texture(shape, 1.5, rng))[fat]
    image[heart & body] = 110
    image[aorta & body] = 180
    image[liver] = (105 + 8 * _texture(shape, 0.8, rng))[liver]
    lesion_centre = _jitter(rng, (-0.1, -0.08, -0.40), 0.2)
    lesion = (_ellipsoid(where, lesion_centre, np.full(3, rng.uniform(0.09, 0.15))) < 1) & liver
    image[lesion] = (20 + 15 * _texture(shape, 1.0, rng))[lesion]
    image[kidneys] = np.where(kidney_distance > 0.45, 230, 90)[kidneys]
    trabeculae = 400 + 110 * _texture(shape, 0.7, rng)
    image[spine] = np.where(spine_core, trabeculae, 520)[spine]
    image[canal & body] = 25
    image[in_lungs] = (-820 + 30 * _texture(shape, 2.0, rng))[in_lungs]
    vessels = _vessels(shape, rng) & in_lungs
    image[vessels] = 20

    image = ndimage.gaussian_filter(image, 0.55)  # a voxel at an edge holds some of both tissues
    image += rng.normal(0, 12, shape).astype(np.float32)

    organs = np.zeros(shape, dtype=np.uint8)
    for name, mask in {"liver": liver, "spine": spine, "lungs": in_lungs}.items():
        organs[mask] = ORGANS[name]
    return SyntheticCase(np.clip(image, -1024, 1500).round(), organs, (depth, height, width))


def write_dataset(
    raw_folder: Path | str,
    dataset_id: int,
    name: str,
    n_train: int,
    n_test: int = 0,
    labelled: bool = True,
    seed: int = 0,
    shape: tuple[int, int, int] = (72, 80, 80),
) -> Path:
    """Writes synthetic scans as a raw dataset of nnU-Net.

    nnU-Net wants a label file for every training case. For ``labelled=False`` it is the body: a threshold at -300 HU
    with the holes of each axial slice filled, so that the lungs count, as they do where they have a label, when nnU-Net
    looks at the intensities. No knowledge of the organs goes into it.

    Args:
        raw_folder: nnU-Net's raw folder (``nnUNet_raw``).
        dataset_id: 1 to 999.
        name: what follows ``Dataset001_``.
        n_train: cases in imagesTr and labelsTr.
        n_test: cases in imagesTs and labelsTs.
        labelled: organs, or only the body.
        seed: other seeds, other cases.
        shape: voxels (z, y, x) of every case.

    Returns:
        The dataset's folder.

    Raises:
        FileExistsError: the dataset's folder exists already.
    """
    folder = Path(raw_folder) / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or choose another dataset id, name or raw folder")
    labels = ORGANS if labelled else BODY
    for split, cases in {"Tr": range(n_train), "Ts": range(n_train, n_train + n_test)}.items():
        for part in ("images", "labels") if cases else ():
            (folder / f"{part}{split}").mkdir(parents=True)
        for index in cases:
            case = synthetic_case((seed, dataset_id, index), shape)
            segmentation = case.organs if labelled else _threshold_body(case.image)
            identifier = f"synthetic_{index:03d}"
            _write(case.image.astype(np.int16), case.spacing, folder / f"images{split}" / f"{identifier}_0000")
            _write(segmentation, case.spacing, folder / f"labels{split}" / identifier)
    generate_dataset_json(
        str(folder),
        {0: "CT"},
        labels,
        n_train,
        FILE_ENDING,
        dataset_name=name,
        description="Synthetic volumes, not scans of people; see hyspark_nnunet/demo/synthetic_data.py",
    )
    return folder


def _threshold_body(image: FloatArray) -> npt.NDArray[np.uint8]:
    filled = [ndimage.binary_fill_holes(plane) for plane in image > BODY_THRESHOLD_HU]
    return np.stack(filled).astype(np.uint8)


def _write(array: np.ndarray, spacing: Sequence[float], stem: Path) -> None:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing([float(s) for s in reversed(spacing)])  # SimpleITK counts x, y, z
    sitk.WriteImage(volume, str(stem) + FILE_ENDING, useCompression=True, compressionLevel=1)


def _jitter(rng: np.random.Generator, values: Sequence[float], spread: float = 0.04) -> FloatArray:
    """The values, each moved by up to ``spread``."""
    return np.asarray(values, np.float32) + rng.uniform(-spread, spread, len(values)).astype(np.float32)


def _deformed_coordinates(shape: tuple[int, int, int], rng: np.random.Generator) -> FloatArray:
    """Coordinates (3, z, y, x) from -1 to 1, moved by a smooth random field: shapes drawn in them come out deformed."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    coarse = rng.uniform(-0.055, 0.055, (3, 4, 4, 4)).astype(np.float32)
    zoom = np.array(shape) / 4
    return np.stack([axis + ndimage.zoom(field, zoom, order=3) for axis, field in zip(axes, coarse, strict=True)])


def _ellipsoid(where: FloatArray, centre: FloatArray, radii: FloatArray) -> FloatArray:
    """Squared distance from the centre in radii: below 1 inside."""
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(where, centre, radii, strict=True))


def _tube(where: FloatArray, centre: tuple[float, float], radius: float) -> BoolArray:
    """A tube along z around (y, x)."""
    return (where[1] - centre[0]) ** 2 + (where[2] - centre[1]) ** 2 < radius**2


def _body(where: FloatArray, rng: np.random.Generator) -> tuple[BoolArray, BoolArray, BoolArray]:
    """The trunk; as its rim, the fat under the skin; and what the chest wall leaves to the lungs."""
    depth, width = 0.72 * rng.uniform(0.95, 1.05), 0.90 * rng.uniform(0.96, 1.04)
    distance = np.abs(where[1] / depth) ** 2.4 + np.abs(where[2] / (width - 0.05 * where[0] ** 2)) ** 2.4
    return distance < 1, (distance < 1) & (distance > rng.uniform(0.80, 0.88)), distance < 0.66


def _spine(where: FloatArray, rng: np.random.Generator) -> tuple[BoolArray, BoolArray, BoolArray]:
    """Trabecular inside, the whole spine (vertebrae with arches, and the discs' place left free) and its canal."""
    z, y, x = where
    radius = 0.145 * rng.uniform(0.93, 1.07)
    vertebra = (z / 0.36 + rng.uniform()) % 1.0
    waist = 1 - 0.10 * np.sin(np.pi * vertebra)
    squared = ((y - 0.40) ** 2 + (x / 1.12) ** 2) / (radius * waist) ** 2
    body = (squared < 1) & (vertebra > 0.16)
    from_canal = (y - 0.575) ** 2 + x**2
    arch = (from_canal < 0.115**2) & (from_canal > 0.06**2) & (squared > 1) & (vertebra > 0.3)
    return (squared < 0.72) & body, body | arch, (from_canal < 0.06**2) & (squared > 1)


def _texture(shape: tuple[int, int, int], sigma: float, rng: np.random.Generator) -> FloatArray:
    """Smooth noise with mean 0 and standard deviation 1; ``sigma`` is its grain in voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3)
    return noise / noise.std()


def _vessels(shape: tuple[int, int, int], rng: np.random.Generator) -> BoolArray:
    """Two trees of tubes that branch from the middle of the chest outwards."""
    thickness = np.zeros(shape, dtype=np.float32)  # radius in voxels, at the tubes' centre lines
    size = np.array(shape)
    for side in (-1.0, 1.0):
        tips = [(np.array([0.55, 0.05, side * 0.16]), np.array([-0.35, 0.1, side * 0.9]), 0.22, 1.9)]
        for _ in range(6):
            grown = []
            for start, direction, length, radius in tips:
                steps = start + np.linspace(0, 1, 24)[:, None] * direction * length
                voxels = np.rint((steps + 1) / 2 * (size - 1)).astype(int)
                voxels = voxels[((voxels >= 0) & (voxels < size)).all(1)]
                index = tuple(voxels.T)
                thickness[index] = np.maximum(thickness[index], radius)
                for _ in range(3):
                    turned = direction + rng.normal(0, 0.7, 3)
                    grown.append((steps[-1], turned / np.linalg.norm(turned), length * 0.8, radius * 0.75))
            tips = grown
    distance, nearest = ndimage.distance_transform_edt(thickness == 0, return_indices=True)
    return distance < thickness[tuple(nearest)]
