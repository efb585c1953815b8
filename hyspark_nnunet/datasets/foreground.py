"""Where the body is: the label that nnU-Net needs for intensity statistics and the choice of patches."""

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import generate_binary_structure, label

CT = "CT"  # the channel name by which nnU-Net, too, knows Hounsfield units
AIR_HU = -500  # halfway between air and water
LUNG_HU = -930  # a region below AIR_HU whose median is above this is lung (-870 to -750), not air (-1000)
DARK_PART = 1 / 3  # of the bright class's mean: where Otsu's dark class has more, it is tissue, not background
PART_OF_LARGEST = 0.1  # smaller pieces beside the body are table, cushions, noise
TABLE_MM = 4.0  # sheets thinner than about twice this are cut off from the body before the largest piece is sought


def body_mask(images: Sequence[sitk.Image], channel_names: Sequence[str]) -> sitk.Image:
    """The body as the union of what every channel shows.

    CT: above AIR_HU, or a lung (a crop of the thorax has lungs that are open to all sides), opened to part it from the
    table, the largest piece. Otherwise: above Otsu's threshold, pieces of at least PART_OF_LARGEST of the largest;
    everything, if what lies below the threshold is not background either (a crop inside the body). Holes are filled, in
    CT also slice by slice: trachea and bowel that are open at the ends of the volume are inside the body.

    Args:
        images: a 3D volume per channel, of equal size.
        channel_names: "CT" or anything else, per channel.

    Returns:
        uint8, 1 = body, with the geometry of the first image; all ones if no body can be separated from the background.

    Raises:
        ValueError: sizes differ, or an image is not a 3D volume of single numbers.
    """
    for image in images:
        _refuse_other_than_volumes(image)
        if image.GetSize() != images[0].GetSize():
            raise ValueError(f"channels differ in size: {images[0].GetSize()} and {image.GetSize()} voxels")
    body: sitk.Image | None = None
    for image, name in zip(images, channel_names, strict=True):
        mask = _ct_body(image) if name == CT else _otsu_body(image)
        mask.CopyInformation(images[0])
        body = mask if body is None else sitk.Or(body, mask)
    assert body is not None
    if not sitk.GetArrayViewFromImage(body).any():
        body = body + 1
    return body


def full_mask(image: sitk.Image) -> sitk.Image:
    """A label that is 1 everywhere, with the geometry of an image.

    Raises:
        ValueError: the image is not a volume.
    """
    _refuse_other_than_volumes(image)
    mask = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    mask.CopyInformation(image)
    return mask


def _refuse_other_than_volumes(image: sitk.Image) -> None:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"an image has {image.GetDimension()} axes and {image.GetNumberOfComponentsPerPixel()} numbers per voxel, "
            "but a channel is a 3D volume of single numbers; store a 2D image as a volume of one slice"
        )


def _ct_body(image: sitk.Image) -> sitk.Image:
    dense = sitk.Or(sitk.Cast(image > AIR_HU, sitk.sitkUInt8), _lungs(image))
    radius = [
        min(round(TABLE_MM / step), (n - 1) // 2) for step, n in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    opened = sitk.BinaryMorphologicalOpening(dense, radius, sitk.sitkBall) if any(radius) else dense
    largest = _pieces(opened, 1.0)
    # the opening rounds off skin, nose and ears: what is dense and touches the body is body
    grown = sitk.BinaryDilate(largest, radius, sitk.sitkBall) if any(radius) else largest
    return _filled(sitk.And(grown, dense), _head_axis(image))


def _lungs(image: sitk.Image) -> sitk.Image:
    ranked = sitk.RelabelComponent(sitk.ConnectedComponent(image <= AIR_HU), minimumObjectSize=64)
    statistics = sitk.LabelIntensityStatisticsImageFilter()
    statistics.Execute(ranked, image)
    labels = statistics.GetLabels()
    inside = {piece: int(statistics.GetMedian(piece) > LUNG_HU) for piece in labels}
    table = np.array([0, *(inside[piece] for piece in range(1, len(labels) + 1))], dtype=np.uint8)
    lungs = sitk.GetImageFromArray(table[sitk.GetArrayViewFromImage(ranked)])
    lungs.CopyInformation(image)
    return lungs


def _otsu_body(image: sitk.Image) -> sitk.Image:
    values = sitk.GetArrayFromImage(image).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return sitk.Image(image.GetSize(), sitk.sitkUInt8)
    low, high = np.percentile(values[finite], (0.5, 99.5))  # a few bright voxels would draw the threshold up
    clipped = sitk.GetImageFromArray(np.nan_to_num(values, nan=low).clip(low, high))
    if not high > low:
        return sitk.Image(image.GetSize(), sitk.sitkUInt8)
    mask = sitk.OtsuThreshold(clipped, 0, 1)
    bright = sitk.GetArrayViewFromImage(mask) > 0
    shown = sitk.GetArrayViewFromImage(clipped)
    if low >= 0 and bright.any() and shown[~bright].mean() > DARK_PART * shown[bright].mean():
        return mask * 0 + 1
    return sitk.BinaryFillhole(_pieces(mask, PART_OF_LARGEST))


def _pieces(mask: sitk.Image, part_of_largest: float) -> sitk.Image:
    """The connected pieces of at least a part of the largest one's size."""
    ranked = sitk.RelabelComponent(sitk.ConnectedComponent(mask))  # by falling size
    sizes = np.bincount(sitk.GetArrayViewFromImage(ranked).ravel())[1:]
    if len(sizes) == 0:
        return mask
    last = max(1, int(np.count_nonzero(sizes >= part_of_largest * sizes[0]))) if part_of_largest < 1 else 1
    return sitk.BinaryThreshold(ranked, 1, last, 1, 0)


def _filled(mask: sitk.Image, axis: int) -> sitk.Image:
    """Holes filled in each slice across an axis; a hole of the volume is one of its slices, too."""
    background = sitk.GetArrayFromImage(mask) == 0
    in_slice = generate_binary_structure(3, 1)
    across = 2 - axis  # NumPy's order of axes is the reverse
    for side in (0, 2):
        in_slice[tuple(side if i == across else 1 for i in range(3))] = False
    regions, count = label(background, in_slice)  # all slices at once
    outside = np.zeros(count + 1, dtype=bool)
    for i in range(3):
        if i != across:
            outside[regions.take((0, -1), axis=i)] = True
    outside[0] = False
    filled = sitk.GetImageFromArray((~outside[regions]).astype(np.uint8))
    filled.CopyInformation(mask)
    return filled


def _head_axis(image: sitk.Image) -> int:
    """The axis of the image (x, y, z) that runs from feet to head."""
    return int(np.abs(np.array(image.GetDirection()).reshape(3, 3)[2]).argmax())
