"""The linear probe: how well a linear head on the frozen encoder's features segments.

The reconstruction loss measures how well blocks are reconstructed, not how useful the encoder is. If a dataset has
labels, features of a few labelled patches are fitted to the labels by ridge regression in closed form, and scored on
patches of other cases. Patches and voxels are drawn once. The probe does not change the training.

Patches lie at random around labelled voxels and are mirrored at random as in training. Otherwise the transformer's
position encoding, which needs no training, would tell a linear head much about the anatomy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyspark_nnunet.datasets.dataset_json import LABELS, OUR_KEY
from hyspark_nnunet.training.data.held_out import SEED, fixed_numpy_seed

if TYPE_CHECKING:
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

PATCHES_PER_CASE = 4  # each with its own position and mirroring
# a patch is cut out of a patch larger by this factor: its centre is up to a quarter of its size from a labelled voxel
ROOM = 1.5
# per patch, to fit: equally many of every label, with a limit on the total, which determines the cost of the fit
VOXELS_PER_LABEL, VOXELS_TO_FIT = 500, 1500
VOXELS_TO_SCORE = 20_000  # per patch, drawn uniformly
RIDGE = 1e-2  # times the number of voxels; features are standardised


def with_room(patch_size: Sequence[int]) -> list[int]:
    """The size of the larger patches that patches of this size are cut from."""
    return [math.ceil(ROOM * size) for size in patch_size]


def has_labels(dataset_json: Mapping[str, Any]) -> bool:
    """Does the dataset have annotations? Foreground labels made by ``dataset prepare`` do not count."""
    foreground = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    automatic = dataset_json.get(OUR_KEY, {}).get("labels") is not None or dataset_json["labels"] == LABELS
    return bool(foreground) and not automatic


def divided(training: Sequence[str], held_out: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Disjoint cases to fit to and to score on, up to ``count`` each.

    Args:
        training: cases of the fold.
        held_out: its validation cases; with fold "all" they equal the training cases, which are then divided.
        count: of each.
    """
    scored = set(held_out)
    rest = [key for key in training if key not in scored]
    first, second = (rest, list(held_out)) if rest else (sorted(training)[::2], sorted(training)[1::2])
    return [_spread(keys, count) for keys in (first, second)]  # type: ignore[return-value]


def _spread(keys: Sequence[str], count: int) -> list[str]:
    """Up to ``count`` keys, evenly spaced in sorted order: cases of one site often have consecutive names."""
    ordered, count = sorted(keys), min(count, len(keys))
    return [ordered[index * len(ordered) // count] for index in range(count)]


@dataclass(frozen=True)
class LabelledPatch:
    """A patch with the voxels that the probe uses.

    Attributes:
        image: (C, *patch).
        places: (N, d), positions of the voxels, from -1 to 1 per axis, last axis first, as for ``grid_sample``.
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
        loaders_to_fit: Sequence["nnUNetDataLoader"],
        loaders_to_score: Sequence["nnUNetDataLoader"],
        patch_size: Sequence[int],
        ignore_label: int | None,
        mirror_axes: Sequence[int] = (),
    ) -> "LinearProbe":
        """Draws ``PATCHES_PER_CASE`` patches from each loader, with a fixed seed.

        Args:
            loaders_to_fit: nnU-Net's, one per case, of patches of this size or larger (``with_room``).
            loaders_to_score: the same for other cases.
            patch_size: of the encoder.
            ignore_label: voxels with this label are left out.
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
            lambda labels: torch.randperm(len(labels), generator=generator)[:VOXELS_TO_SCORE],
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
            encoder: maps an image to features, fine to coarse.
            device: of the encoder.
        """
        if not len(self.classes):  # no voxel of any patch is annotated
            return ProbeScore()
        head, classes = RidgeRegression(len(self.classes)), self.classes.to(device)
        for patch in self.to_fit:
            head.add(_features(encoder, patch, device), (patch.labels.to(device)[:, None] == classes).float())
        head.fit()
        counts = torch.zeros(len(classes), 3, dtype=torch.long, device=device)
        for patch in self.to_score:
            predicted = head.predict(_features(encoder, patch, device)).argmax(1)
            said = F.one_hot(predicted.to(device), len(classes)).bool()
            is_so = patch.labels.to(device)[:, None] == classes
            counts += torch.stack([(said & is_so).sum(0), said.sum(0), is_so.sum(0)], 1)
        return ProbeScore(
            {
                label: 2 * hit / (said + is_so)
                for label, (hit, said, is_so) in zip(self.classes.tolist(), counts.tolist(), strict=True)
                if label != 0 and is_so > 0
            }
        )


class RidgeRegression:
    """Ridge regression on standardised features, with a constant that is not penalised.

    It keeps sums over the examples instead of the examples: its memory does not grow with their number. All is computed
    in float64 on the device of the examples, whatever autocast says: the inverse would magnify errors of float32.

    Args:
        n_targets: numbers to predict.
    """

    def __init__(self, n_targets: int) -> None:
        self.n_targets, self.count = n_targets, 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Takes in examples: (N, C) and (N, T)."""
        if not len(features):
            return
        features, targets = _in_float64(features), _in_float64(targets)
        if self.count == 0:
            n_features = features.shape[1]
            self.origin = features.mean(0)  # near the mean: no loss of precision if the mean is large
            self.sums, self.target_sums = features.new_zeros(n_features), targets.new_zeros(self.n_targets)
            self.products = features.new_zeros(n_features, n_features)
            self.target_products = features.new_zeros(n_features, self.n_targets)
        shifted = features - self.origin
        self.count += len(features)
        self.sums += shifted.sum(0)
        self.target_sums += targets.sum(0)
        self.products += shifted.T @ shifted
        self.target_products += shifted.T @ targets

    def fit(self) -> None:
        """Solves for the weights, in closed form."""
        beside_origin, target_means = self.sums / self.count, self.target_sums / self.count
        products = self.products - self.count * beside_origin[:, None] * beside_origin
        std = (products.diagonal() / (self.count - 1)).clamp_min(0).sqrt().clamp_min(1e-6)
        products = products / (std[:, None] * std)
        target_products = (self.target_products - beside_origin[:, None] * self.target_sums) / std[:, None]
        penalty = torch.full_like(std, RIDGE * self.count)
        # of features that are not standardised: no pass over them for mean and standard deviation
        self.weights = torch.linalg.solve(products + penalty.diag(), target_products) / std[:, None]
        self.constant = target_means - (self.origin + beside_origin) @ self.weights

    def predict(self, features: Tensor) -> Tensor:
        """(N, C) to (N, T)."""
        return torch.addmm(self.constant, _in_float64(features), self.weights)


def _in_float64(values: Tensor) -> Tensor:
    """On the same device, if it knows float64; an Apple GPU does not."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _placed(
    batch: Mapping[str, Tensor], patch_size: Sequence[int], mirror_axes: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Image (C, *patch) and segmentation (1, *patch) of a batch of one, cut and mirrored at random."""
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
    known = labels >= 0  # negative: outside the scanned region
    if ignore_label is not None:
        known &= labels != ignore_label
    index = known.nonzero()[:, 0]
    index = index[choose(labels[index])]
    axes = torch.unravel_index(index, segmentation.shape)
    centres = [(2 * axis + 1) / size - 1 for axis, size in zip(axes, segmentation.shape, strict=True)]
    return LabelledPatch(image, torch.stack(centres[::-1], 1), labels[index])


def _balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of voxels, equally many of every label as far as possible."""
    order, present = torch.randperm(len(labels), generator=generator), labels.unique()
    count = min(VOXELS_PER_LABEL, VOXELS_TO_FIT // max(1, len(present)))
    return torch.cat([order[:0], *(order[labels[order] == label][:count] for label in present)])


def _features(encoder: nn.Module, patch: LabelledPatch, device: torch.device) -> Tensor:
    """Features (N, channels of all stages) at the patch's voxels, interpolated linearly; float32 on the device."""
    places = patch.places.to(device).view(1, *[1] * (patch.places.shape[1] - 1), *patch.places.shape)
    sampled = [
        F.grid_sample(feature.float(), places, align_corners=False, padding_mode="border").flatten(2)[0]
        for feature in encoder(patch.image[None].to(device))
    ]
    return torch.cat(sampled).T
