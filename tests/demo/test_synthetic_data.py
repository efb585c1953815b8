"""Made data are what nnU-Net takes and a network can learn from: tests of hyspark_nnunet/demo/synthetic_data.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from hyspark_nnunet.demo.synthetic_data import BODY_THRESHOLD_HU, ORGANS, synthetic_case, write_dataset

SMALL = (40, 48, 48)


class TestSyntheticCase:
    def test_same_seed_same_case(self) -> None:
        first, again, other = (
            synthetic_case((1, 2), SMALL),
            synthetic_case((1, 2), SMALL),
            synthetic_case((1, 3), SMALL),
        )
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.organs, again.organs)
        assert first.spacing == again.spacing
        assert (first.organs != other.organs).any()
        assert first.spacing != other.spacing

    @pytest.mark.parametrize("seed", range(6))
    def test_every_organ_in_every_case(self, seed: int) -> None:
        case = synthetic_case(seed, SMALL)
        assert case.image.shape == case.organs.shape == SMALL
        assert case.image.dtype == np.float32
        assert np.isfinite(case.image).all()
        voxels = np.bincount(case.organs.ravel(), minlength=len(ORGANS))
        assert len(voxels) == len(ORGANS)
        assert (voxels > 300).all()

    @pytest.mark.parametrize("seed", range(3))
    def test_organs_look_different(self, seed: int) -> None:
        """In Hounsfield units: air, lungs, soft tissue and bone in their places."""
        case = synthetic_case(seed)
        mean = {name: case.image[case.organs == value].mean() for name, value in ORGANS.items()}
        assert mean["lungs"] < -600
        assert 60 < mean["liver"] < mean["spine"]
        assert mean["spine"] > 300
        assert case.image[:, 0, 0].mean() < -950
        assert case.spacing == pytest.approx((2.5, 2.0, 2.0), rel=0.051)

    def test_anatomy_is_alike_but_not_equal(self) -> None:
        """The organs of two cases overlap by much, not wholly: that is what makes hidden blocks predictable."""
        first, second = (synthetic_case(seed).organs for seed in (10, 11))
        for name in ("liver", "lungs"):
            one, two = first == ORGANS[name], second == ORGANS[name]
            dice = 2 * (one & two).sum() / (one.sum() + two.sum())
            assert 0.4 < dice < 0.98

    def test_refuses_tiny_volumes(self) -> None:
        with pytest.raises(ValueError, match=r"\(16, 48, 48\) is too small"):
            synthetic_case(0, (16, 48, 48))


class TestWriteDataset:
    @pytest.mark.parametrize("labelled", [True, False])
    def test_nnunet_takes_it(self, labelled: bool, tmp_path: Path) -> None:
        folder = write_dataset(tmp_path, 42, "Synthetic", n_train=3, n_test=2, labelled=labelled, shape=SMALL)
        assert folder == tmp_path / "Dataset042_Synthetic"
        verify_dataset_integrity(str(folder), num_processes=1)
        description = json.loads((folder / "dataset.json").read_text())
        assert description["channel_names"] == {"0": "CT"}
        assert description["numTraining"] == 3
        assert description["file_ending"] == ".nii.gz"
        for split, count in {"Tr": 3, "Ts": 2}.items():
            images = sorted((folder / f"images{split}").iterdir())
            labels = sorted((folder / f"labels{split}").iterdir())
            assert len(images) == len(labels) == count
            for image_file, label_file in zip(images, labels, strict=True):
                assert image_file.name == label_file.name.replace(".nii.gz", "_0000.nii.gz")
                image, label = sitk.ReadImage(str(image_file)), sitk.ReadImage(str(label_file))
                assert image.GetSize() == label.GetSize() == SMALL[::-1]
                assert image.GetSpacing() == label.GetSpacing()
                assert image.GetOrigin() == label.GetOrigin()
                assert image.GetDirection() == label.GetDirection()
                values = np.unique(sitk.GetArrayFromImage(label)).tolist()
                assert values == sorted(description["labels"].values())

    def test_spacing_is_in_sitk_order(self, tmp_path: Path) -> None:
        folder = write_dataset(tmp_path, 1, "Synthetic", n_train=1, shape=SMALL)
        image = sitk.ReadImage(str(folder / "imagesTr" / "synthetic_000_0000.nii.gz"))
        assert image.GetSpacing()[::-1] == pytest.approx(synthetic_case((0, 1, 0), SMALL).spacing)

    def test_unlabelled_labels_hold_no_organs(self, tmp_path: Path) -> None:
        folder = write_dataset(tmp_path, 1, "Synthetic", n_train=1, labelled=False, shape=SMALL)
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "imagesTr" / "synthetic_000_0000.nii.gz")))
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "synthetic_000.nii.gz")))
        assert label[image > BODY_THRESHOLD_HU].all()
        assert label[synthetic_case((0, 1, 0), SMALL).organs == ORGANS["lungs"]].mean() > 0.99
        assert not label[:, 0, 0].any()
        assert 0.3 < label.mean() < 0.8

    def test_train_and_test_cases_differ(self, tmp_path: Path) -> None:
        folder = write_dataset(tmp_path, 1, "Synthetic", n_train=2, n_test=1, shape=SMALL)
        images = [sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted(folder.glob("images*/*"))]
        assert len(images) == 3
        assert all((images[a] != images[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))

    def test_does_not_overwrite(self, tmp_path: Path) -> None:
        write_dataset(tmp_path, 1, "Synthetic", n_train=1, shape=SMALL)
        with pytest.raises(FileExistsError, match="Dataset001_Synthetic exists already: remove it, or choose"):
            write_dataset(tmp_path, 1, "Synthetic", n_train=1, shape=SMALL)
