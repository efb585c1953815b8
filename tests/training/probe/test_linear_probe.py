"""The linear probe: what it fits and scores, and when it is on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from hyspark_nnunet.commands.dataset_network import DatasetNetwork
from hyspark_nnunet.commands.probe_checkpoints import probe_of
from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.training.hyspark import HySparKPretrainTrainer
from hyspark_nnunet.training.probe.cases import LabelledCases, cases_of_dataset, preprocessed_cases
from hyspark_nnunet.training.probe.linear_probe import (
    PATCHES_PER_CASE,
    RIDGE,
    LinearProbe,
    RidgeRegression,
    divided,
    has_labels,
    with_room,
)
from hyspark_nnunet.training.probe.scheduled import ScheduledProbe
from hyspark_nnunet.visualisation import progress_picture
from tests.host_reads import HostReads
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans


class Loader:
    """A case whose second class lies where the image is bright, seen through noise that differs from case to case."""

    def __init__(self, spatial: tuple[int, ...]) -> None:
        self.spatial = spatial

    def generate_train_batch(self) -> dict:
        target = np.zeros(self.spatial, np.int16)
        starts = [np.random.randint(1, n // 2) for n in self.spatial]
        target[tuple(slice(a, a + n // 3) for a, n in zip(starts, self.spatial, strict=True))] = 1
        target[..., 0], target[..., -1] = 7, -1  # not annotated; outside
        image = target.clip(0, 1) + np.random.normal(0, 0.3, self.spatial)
        batch = {"data": image, "target": target}
        return {name: torch.from_numpy(array)[None, None].float() for name, array in batch.items()}


class Half(Loader):
    """The second class is the first half of every patch."""

    def generate_train_batch(self) -> dict:
        batch = super().generate_train_batch()
        batch["target"].zero_()[:, :, : self.spatial[0] // 2] = 1
        return batch


class Encoder(nn.Module):
    """Two stages: the image, or noise in its place; and a coarser one without meaning."""

    def __init__(self, sees: bool) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, image: Tensor) -> list[Tensor]:
        pool = {3: nn.functional.avg_pool1d, 4: nn.functional.avg_pool2d, 5: nn.functional.avg_pool3d}[image.ndim]
        first = image if self.sees else torch.randn_like(image)
        return [torch.cat([first, first.square()], 1), torch.randn_like(pool(image, 2))]


def make(spatial: tuple[int, ...], mirror_axes: Sequence[int] = (0, 1)) -> LinearProbe:
    return LinearProbe.drawn_from([Loader(spatial)] * 3, [Loader(spatial)] * 3, spatial, 7, mirror_axes)


@pytest.mark.parametrize("spatial", [(12, 16, 12), (24, 32)])
def test_features_that_tell_the_classes_apart_score_high(spatial: tuple[int, ...]) -> None:
    probe, cpu = make(spatial), torch.device("cpu")
    seeing, blind = (probe.score(Encoder(sees), cpu) for sees in (True, False))
    assert set(seeing) == {1} and seeing.mean == seeing[1]
    assert seeing.mean > 0.6 > 0.3 > blind.mean


def test_the_probe_stays_on_the_device() -> None:
    """The host reads the labels and the counts, once each: nothing per patch."""
    probe = make((12, 16, 12))
    with HostReads() as reads:
        probe.score(Encoder(True), torch.device("cpu"))
    assert reads.count == 2


def test_patches_and_voxels_are_the_same_in_every_run_and_numpy_is_left_alone() -> None:
    np.random.seed(1)
    first, expected = make((12, 16, 12)), np.random.rand()
    np.random.seed(1)
    second = make((12, 16, 12))
    for one, two in zip([*first.to_fit, *first.to_score], [*second.to_fit, *second.to_score], strict=True):
        assert torch.equal(one.image, two.image) and torch.equal(one.places, two.places)
    assert np.random.rand() == expected
    np.random.seed(1)
    assert np.random.rand() == expected


def test_places_are_the_voxels_of_the_labels() -> None:
    """grid_sample at a place gives the voxel itself: brightness and label belong together."""
    for patch in make((12, 16, 12)).to_score:
        assert set(patch.labels.tolist()) == {0, 1}
        places = patch.places.view(1, -1, 1, 1, 3).to(patch.image)
        sampled = nn.functional.grid_sample(patch.image[None], places, align_corners=False).flatten()
        assert sampled[patch.labels == 1].mean() == pytest.approx(1, abs=0.05)
        assert sampled[patch.labels == 0].mean() == pytest.approx(0, abs=0.05)
        assert len({tuple(place) for place in patch.places.tolist()}) == len(patch.places) == 12 * 16 * 10


def test_many_labels_share_the_voxels_to_fit() -> None:
    class Many(Loader):
        def generate_train_batch(self) -> dict:
            batch = super().generate_train_batch()
            batch["target"] = torch.arange(batch["target"].numel()).view(batch["target"].shape) % 100
            return batch

    probe = LinearProbe.drawn_from([Many((20, 20, 20))], [Many((20, 20, 20))], (20, 20, 20), None)
    for patch in probe.to_fit:
        assert torch.equal(patch.labels.unique(return_counts=True)[1], torch.full((100,), 15))
    few = LinearProbe.drawn_from([Half((20, 20, 20))], [Half((20, 20, 20))], (20, 20, 20), None)
    assert {tuple(patch.labels.bincount().tolist()) for patch in few.to_fit} == {(500, 500)}


def test_the_head_is_that_of_all_examples_at_once() -> None:
    """Features far from zero; targets that are not all linear in them; parts of unequal size, one of none."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator, dtype=torch.float64) * torch.tensor([1e-3, 1, 1, 5, 1]) + 1e4
    targets = torch.stack([(features[:, 1] > 1e4).double(), features[:, 3] - features[:, 0]], 1)
    head = RidgeRegression(2)
    for part in ((0, 0), (0, 10), (10, 60)):
        head.add(features[slice(*part)], targets[slice(*part)])
    head.fit()
    design = (features - features.mean(0)) / features.std(0)
    design = torch.cat([design, torch.ones(60, 1, dtype=torch.float64)], 1)
    penalty = torch.tensor([RIDGE * 60] * 5 + [0], dtype=torch.float64)
    weights = torch.linalg.solve(design.T @ design + penalty.diag(), design.T @ targets)
    torch.testing.assert_close(head.predict(features), design @ weights, rtol=1e-9, atol=1e-9)


class Place(nn.Module):
    """Sees nothing of the image and knows where it is in the patch."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return [torch.linspace(-1, 1, image.shape[2]).view(1, 1, -1, 1, 1).expand(1, 1, *image.shape[2:])]


@pytest.mark.parametrize(("axes", "low", "high"), [((), 0.99, 1), ((1, 2), 0.99, 1), ((0, 1, 2), 0, 0.7)])
def test_mirroring_takes_away_what_place_alone_tells(axes: tuple[int, ...], low: float, high: float) -> None:
    probe = LinearProbe.drawn_from([Half((12, 16, 12))] * 8, [Half((12, 16, 12))] * 8, (12, 16, 12), None, axes)
    assert low <= probe.score(Place(), torch.device("cpu")).mean <= high


def test_patches_lie_anywhere_in_the_larger_ones() -> None:
    """The border between the classes, in the middle of what is drawn, lies in the middle half of every patch."""
    assert with_room((8, 15)) == [12, 23]
    probe = LinearProbe.drawn_from([Half((12, 16, 12))] * 8, [Half((12, 16, 12))], (8, 16, 8), None)
    assert {patch.image.shape for patch in probe.to_fit} == {(1, 8, 16, 8)}
    shares = {patch.labels.float().mean().item() for patch in probe.to_score}
    assert shares <= {n / 8 for n in range(2, 7)} and len(shares) > 1
    assert len(probe.to_fit) == 8 * PATCHES_PER_CASE


def test_a_class_that_is_nowhere_has_no_score() -> None:
    probe = make((12, 16, 12))
    for patch in probe.to_score:
        patch.labels.zero_()
    score = probe.score(Encoder(True), torch.device("cpu"))
    assert score == {} and math.isnan(score.mean)


def test_the_log_has_a_value_for_every_epoch_also_of_an_older_checkpoint(tmp_path: Path) -> None:
    """nnU-Net's logger refuses gaps; a checkpoint from before the probe has no such list at all."""
    logger, lines = MetaLogger(str(tmp_path), False), []
    scheduled = ScheduledProbe(
        PretrainRecipe(probe_every=10),
        logger,
        lines.append,
        lambda probe: probe.score(Encoder(True), torch.device("cpu")),
    )
    log = logger.local_logger.my_fantastic_logging
    scheduled.score_start(0)
    scheduled.score_epoch(0)
    assert "probe_dice" not in log and scheduled.curve is scheduled.before is None  # no patches, no probe
    scheduled.probe = make((12, 16, 12))
    scheduled.score_start(8)  # where the untrained encoder stood is not known any more
    for epoch in (8, 9):  # the second is due
        scheduled.score_epoch(epoch)
    assert [math.isnan(dice) for dice in scheduled.curve] == [True] * 9 + [False]
    assert len(lines) == 1 and lines[0].startswith("probe_dice 0.") and scheduled.before is None
    scheduled.score_start(0)
    assert scheduled.before > 0.5 and lines[1].startswith("probe_dice before the first step 0.")
    pictures = {"without": (), "with": (scheduled.curve,), "with_start": (scheduled.curve, 0.5)}
    for name, probe in pictures.items():
        progress_picture({"train_losses": [1.0]}, tmp_path / f"{name}.png", *probe)
    without, with_curve, with_start = (imread(tmp_path / f"{name}.png") for name in pictures)
    assert with_curve.shape[1] > without.shape[1]
    assert with_curve.shape == with_start.shape and (with_curve != with_start).any()


def test_cases_to_fit_and_to_score_are_different_cases() -> None:
    cases = [f"case_{index:02d}" for index in range(40)]
    fit, score = divided(cases[:30], cases[30:], 4)
    assert fit == ["case_00", "case_07", "case_15", "case_22"] and score == ["case_30", "case_32", "case_35", "case_37"]
    # fold "all" validates on its training cases
    fit, score = divided(cases, cases, 50)
    assert len(fit) == len(score) == 20 and not set(fit) & set(score)
    assert divided(["one"], ["one"], 8) == [["one"], []]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"labels": {"background": 0, "liver": 1}}, True),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, True),
        ({"labels": {"background": 0, "ignore": 1}}, False),
        ({"labels": {"background": 0, "body": 1}}, False),
        ({"labels": {"background": 0, "liver": 1}, "hyspark_nnunet": {"labels": "foreground"}}, False),
    ],
)
def test_which_datasets_are_labelled(content: dict, expected: bool) -> None:
    assert has_labels(content) is expected


class TestAnotherDataset:
    """Dataset 7 is trained on; dataset 8 has the labels."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
        folder = tmp_path / "Dataset008_Labelled"
        (folder / "data").mkdir(parents=True)
        # files of a dataset that are no plans
        (folder / "splits_final.json").write_text("[]")
        (folder / "dataset_fingerprint.json").write_text("{}")
        self.write(folder, labels={"background": 0, "liver": 1})
        for case in ("b", "a", "c"):
            image = np.ones((1, 16, 16, 16), np.float32)
            image[0, 0] = np.inf if case == "c" else 0
            file = str(folder / "data" / case)
            nnUNetDatasetBlosc2.save_case(image, np.ones((1, 16, 16, 16), np.int16), {"class_locations": {}}, file)
        return folder

    def write(self, folder: Path, plans_name: str = "nnUNetPlans", **changes) -> None:
        """Its plans and dataset.json: those of dataset 7 but for these entries."""
        labels = changes.pop("labels", DATASET_JSON["labels"])
        (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": labels}))
        plans = self.plans(data_identifier="data", **changes)
        (folder / f"{plans_name}.json").write_text(json.dumps(plans))

    def plans(self, transpose: tuple[int, ...] = (0, 1, 2), **changes) -> dict:
        return make_plans([16, 16, 16], CUBIC, **changes) | {"transpose_forward": list(transpose)}

    def cases(self, dataset: str = "8") -> LabelledCases:
        return cases_of_dataset(dataset, PlansManager(self.plans()), "3d_fullres", DATASET_JSON)

    @pytest.mark.usefixtures("folder")
    def test_its_cases_are_those_to_look_at(self) -> None:
        cases = self.cases()
        assert cases.folder == self.cases("Dataset008_Labelled").folder
        assert cases.training == cases.held_out == ["a", "b", "c"]
        assert cases.label_manager.foreground_labels == [1]
        assert cases.fault_of("a") is None and "not finite" in cases.fault_of("c")
        assert "cannot be read" in cases.fault_of("missing")
        assert cases.loader("a", [8, 8, 8]).get_indices() == ["a"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"spacing": [1.0, 1.0, 2.0]},
            {"normalization_schemes": ["ZScoreNormalization"]},
            {"transpose": (1, 0, 2)},
            {"spacing": [1.0, 1.0]},
        ],
        ids=str,
    )
    def test_data_that_mean_something_else_are_refused(self, folder: Path, changes: dict) -> None:
        self.write(folder, **changes)
        with pytest.raises(FileNotFoundError, match=r"probe_dataset is 8, but .*no preprocessed data.*-d 7 --like 8"):
            self.cases()
        self.write(folder, "nnUNetPlansOther")
        assert self.cases().training == ["a", "b", "c"]

    def test_what_the_command_refuses(self, folder: Path) -> None:
        """Of a dataset itself: no labels, nothing preprocessed, nothing left to score on."""
        content = json.loads((folder / "dataset.json").read_text())
        manager = PlansManager(self.plans(data_identifier="data") | {"dataset_name": folder.name})
        assert preprocessed_cases(manager, "3d_fullres", content).training == ["a", "b", "c"]
        with pytest.raises(ValueError, match="Dataset008_Labelled has no labels of its own, .* name a labelled"):
            preprocessed_cases(manager, "3d_fullres", content | {"labels": {"background": 0, "body": 1}})
        for case in ("b", "c"):
            for file in (folder / "data").glob(f"{case}*"):
                file.unlink()
        target = DatasetNetwork(nn.Identity(), {}, HySparKPretrainTrainer, None, manager.plans, content)
        with pytest.raises(ValueError, match="has 1 preprocessed cases, but the probe needs at least 2"):
            probe_of(target, "3d_fullres", 5)
        for file in (folder / "data").iterdir():
            file.unlink()
        with pytest.raises(FileNotFoundError, match="missing or empty. Run: hyspark_nnunet preprocess -d 8 -c 3d_"):
            preprocessed_cases(manager, "3d_fullres", content)

    def test_a_dataset_without_labels_is_refused(self, folder: Path) -> None:
        self.write(folder, labels={"background": 0, "body": 1})
        with pytest.raises(ValueError, match="probe_dataset is 8, but Dataset008_Labelled has no labels"):
            self.cases()
        with pytest.raises(FileNotFoundError, match="no dataset in .* is called Dataset009"):
            self.cases("9")
        (folder.parent / "Dataset008_Twin").mkdir()
        with pytest.raises(
            FileNotFoundError, match="several datasets in .* are called Dataset008_.*Twin.*give the name"
        ):
            self.cases()
