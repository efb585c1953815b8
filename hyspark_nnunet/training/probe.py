"""A downstream signal while pre-training: how well a linear head on the frozen encoder's features segments.

The reconstruction loss says how well blocks are rebuilt, not what the encoder is good for. Where a data set has labels,
features of a few labelled patches are fitted to the labels by ridge regression, in closed form, and scored on patches
of other cases. Patches and voxels are drawn once. Nothing flows back into the network: its training is the same with
and without.

Patches lie at random around what is labelled, and are mirrored at random as in training. Otherwise the transformer's
positions alone, which no training has to learn, tell a linear head much of what lies where.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.datasets.dataset_json import LABELS, OUR_KEY
from hyspark_nnunet.training.held_out import SEED, fixed_numpy_seed

PATCHES_PER_CASE = 4  # each placed and mirrored anew
# a patch is cut out of one this much larger: its middle lies up to a quarter of it beside a labelled voxel
ROOM = 1.5
VOXELS_PER_CLASS = 500  # of a patch, to fit
VOXELS_PER_PATCH = 20_000  # drawn evenly, to score
RIDGE = 1e-2  # of the number of voxels; features are standardised


def with_room(patch_size: Sequence[int]) -> list[int]:
    """The size of the larger patches, of which patches of this size are cut."""
    return [math.ceil(ROOM * size) for size in patch_size]


def has_labels(dataset_json: Mapping[str, Any]) -> bool:
    """Did somebody label this data set? A foreground label of ``dataset prepare`` and its like says nothing."""
    foreground = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    made = dataset_json.get(OUR_KEY, {}).get("labels") is not None or dataset_json["labels"] == LABELS
    return bool(foreground) and not made


def divided(training: Sequence[str], held_out: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Cases to fit to and cases to score on, up to ``count`` each, none in both.

    Args:
        training: cases of the fold.
        held_out: its validation cases; with fold "all" the same cases, which are then divided.
        count: of each.
    """
    rest = [key for key in training if key not in set(held_out)]
    first, second = (rest, list(held_out)) if rest else (sorted(training)[::2], sorted(training)[1::2])
    return [_spread(keys, count) for keys in (first, second)]  # type: ignore[return-value]


def _spread(keys: Sequence[str], count: int) -> list[str]:
    """Up to ``count`` of the sorted keys, spread evenly: sites and scanners often name their cases in series."""
    ordered, count = sorted(keys), min(count, len(keys))
    return [ordered[index * len(ordered) // count] for index in range(count)]


@dataclass(frozen=True)
class LabelledPatch:
    """A patch with the voxels that are looked at.

    Attributes:
        image: (C, *patch).
        places: (N, d), where the voxels lie, from -1 to 1 per axis, the last axis first, as ``grid_sample`` wants them.
        labels: LongTensor (N).
    """

    image: Tensor
    places: Tensor
    labels: Tensor


class ProbeScore(dict[int, float]):
    """Dice by label; absent labels are left out."""

    @property
    def mean(self) -> float:
        return sum(self.values()) / len(self) if self else float("nan")


class LinearProbe:
    """Fits and scores the linear head.

    Args:
        to_fit: patches of labelled cases.
        to_score: patches of other cases.
    """

    def __init__(self, to_fit: Sequence[LabelledPatch], to_score: Sequence[LabelledPatch]) -> None:
        self.to_fit, self.to_score = to_fit, to_score
        self.classes = torch.cat([patch.labels for patch in to_fit]).unique()

    @classmethod
    def drawn_from(
        cls,
        loaders_to_fit: Sequence[nnUNetDataLoader],
        loaders_to_score: Sequence[nnUNetDataLoader],
        patch_size: Sequence[int],
        ignore_label: int | None,
        mirror_axes: Sequence[int] = (),
    ) -> "LinearProbe":
        """Draws ``PATCHES_PER_CASE`` patches of each loader, with a fixed seed.

        Args:
            loaders_to_fit: nnU-Net's, one per case, of patches of this size or larger (``with_room``).
            loaders_to_score: the same of other cases.
            patch_size: of the encoder.
            ignore_label: voxels of it are left out.
            mirror_axes: spatial axes along which training mirrors.
        """
        generator = torch.Generator().manual_seed(SEED)
        with fixed_numpy_seed(SEED):  # nnU-Net's loaders draw from NumPy's global generator
            batches = [
                [loader.generate_train_batch() for loader in part for _ in range(PATCHES_PER_CASE)]
                for part in (loaders_to_fit, loaders_to_score)
            ]
        pick: list[Callable[[Tensor], Tensor]] = [
            lambda labels: _balanced(labels, generator),
            lambda labels: torch.randperm(len(labels), generator=generator)[:VOXELS_PER_PATCH],
        ]
        parts = [
            [_labelled(*_placed(batch, patch_size, mirror_axes, generator), ignore_label, choose) for batch in part]
            for part, choose in zip(batches, pick, strict=True)
        ]
        return cls(*parts)

    @torch.no_grad()
    def score(self, encoder: nn.Module, device: torch.device) -> ProbeScore:
        """Dice of every label on the patches to score.

        Args:
            encoder: image to features, fine to coarse.
            device: of the encoder.
        """
        features = torch.cat([_features(encoder, patch, device) for patch in self.to_fit])
        labels = torch.cat([patch.labels for patch in self.to_fit])
        mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
        design = _with_constant((features - mean) / std)
        targets = (labels[:, None] == self.classes).double()
        penalty = torch.full((design.shape[1],), RIDGE * len(design), dtype=torch.float64)
        penalty[-1] = 0  # of the constant
        head = torch.linalg.solve(design.T @ design + penalty.diag(), design.T @ targets)
        counts = torch.zeros(len(self.classes), 3, dtype=torch.float64)
        for patch in self.to_score:
            design = _with_constant((_features(encoder, patch, device) - mean) / std)
            predicted = (design @ head).argmax(1)
            for index, label in enumerate(self.classes):
                said, is_so = predicted == index, patch.labels == label
                counts[index] += torch.stack([(said & is_so).sum(), said.sum(), is_so.sum()])
        return ProbeScore(
            {
                int(label): float(2 * hit / (said + is_so))
                for label, (hit, said, is_so) in zip(self.classes, counts, strict=True)
                if label != 0 and is_so > 0
            }
        )


def _placed(
    batch: Mapping[str, Tensor], patch_size: Sequence[int], mirror_axes: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Image (C, *patch) and segmentation (1, *patch) of a batch of one, cut anywhere, mirrored along some axes."""
    image, segmentation = batch["data"][0], batch["target"][0]
    starts = [
        int(torch.randint(there - size + 1, (1,), generator=generator))
        for there, size in zip(image.shape[1:], patch_size, strict=True)
    ]
    window = (slice(None), *(slice(start, start + size) for start, size in zip(starts, patch_size, strict=True)))
    tossed = torch.rand(len(mirror_axes), generator=generator).tolist()
    flipped = [1 + axis for axis, value in zip(mirror_axes, tossed, strict=True) if value < 0.5]
    return image[window].flip(flipped), segmentation[window].flip(flipped)


def _labelled(
    image: Tensor, segmentation: Tensor, ignore_label: int | None, choose: Callable[[Tensor], Tensor]
) -> LabelledPatch:
    segmentation = segmentation[0]
    labels = segmentation.flatten().long()
    known = labels >= 0  # negative: outside of what was scanned
    if ignore_label is not None:
        known &= labels != ignore_label
    index = known.nonzero()[:, 0]
    index = index[choose(labels[index])]
    axes = torch.unravel_index(index, segmentation.shape)
    centres = [(2 * axis + 1) / size - 1 for axis, size in zip(axes, segmentation.shape, strict=True)]
    return LabelledPatch(image, torch.stack(centres[::-1], 1), labels[index])


def _balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Up to VOXELS_PER_CLASS indices of every label."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[:0], *(order[labels[order] == label][:VOXELS_PER_CLASS] for label in labels.unique())])


def _features(encoder: nn.Module, patch: LabelledPatch, device: torch.device) -> Tensor:
    """Features (N, channels of all stages) at the patch's voxels, interpolated linearly; float64 on the CPU."""
    places = patch.places.to(device).view(1, *[1] * (patch.places.shape[1] - 1), *patch.places.shape)
    sampled = [
        F.grid_sample(feature.float(), places, align_corners=False, padding_mode="border").flatten(2)[0]
        for feature in encoder(patch.image[None].to(device))
    ]
    return torch.cat(sampled).T.cpu().double()  # an Apple GPU knows no float64


def _with_constant(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)
