"""Pictures hold what they claim: tests of hyspark_nnunet/visualisation.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyspark_nnunet import visualisation
from hyspark_nnunet.masking import sample_visible
from hyspark_nnunet.training.loss import reconstruction_loss
from hyspark_nnunet.visualisation import (
    HIDDEN_COLOUR,
    IGNORED_COLOUR,
    Example,
    progress_picture,
    reconstruction_pictures,
    restore_intensities,
)

GRID, UNIT = (3, 4, 5), (4, 8, 8)
SHAPE = tuple(g * u for g, u in zip(GRID, UNIT, strict=True))


def example(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, mask and reconstruction of an anisotropic patch."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(channels, *SHAPE, generator=generator)
    reconstruction = torch.randn(channels, *SHAPE, generator=generator)
    return image, sample_visible(1, GRID, 0.75, generator)[0], reconstruction


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == np.array(colour)).all(-1).mean())


class TestRestoreIntensities:
    @pytest.mark.parametrize("channels", [1, 2])
    def test_equals_direct_computation(self, channels: int) -> None:
        image, _, reconstruction = example(channels)
        image = image * 300 + 50
        restored = restore_intensities(reconstruction, image, UNIT)
        for channel in range(channels):
            for corner in np.ndindex(GRID):
                voxels = [slice(c * u, (c + 1) * u) for c, u in zip(corner, UNIT, strict=True)]
                block = (channel, voxels[0], voxels[1], voxels[2])
                values = image[block].double().numpy()
                spread = np.sqrt(values.var(ddof=1) + 1e-6)
                expected = reconstruction[block].double().numpy() * spread + values.mean()
                np.testing.assert_allclose(restored[block].numpy(), expected, rtol=1e-4, atol=1e-2)

    def test_inverts_the_target_of_the_loss(self) -> None:
        """A prediction with no loss comes back as the image itself; one of zeros, as each unit's mean."""
        image, visible, _ = example()
        mean = restore_intensities(torch.zeros_like(image), image, UNIT)
        spread = restore_intensities(torch.ones_like(image), image, UNIT) - mean
        perfect = (image - mean) / spread
        assert reconstruction_loss(perfect[None], image[None], visible[None]) < 1e-10
        torch.testing.assert_close(restore_intensities(perfect, image, UNIT), image)

    def test_half_precision_does_not_overflow(self) -> None:
        image = torch.full((1, *SHAPE), 1000.0).half()
        image[..., ::2] = -1000.0
        assert restore_intensities(torch.ones_like(image), image, UNIT).isfinite().all()

    def test_refuses_what_does_not_fit(self) -> None:
        image, _, reconstruction = example()
        with pytest.raises(ValueError, match=r"\(2, 12, 32, 40\).*\(1, 12, 32, 40\)"):
            restore_intensities(reconstruction.expand(2, -1, -1, -1), image, UNIT)
        with pytest.raises(ValueError, match=r"\(12, 32, 40\).*\(5, 8, 8\)"):
            restore_intensities(reconstruction, image, (5, 8, 8))


def picture(image: Any, visible: Any, reconstruction: Any, path: Path, **options: Any) -> None:
    reconstruction_pictures([Example("", image, visible, reconstruction)], path, **options)


class TestReconstructionPicture:
    def test_panels(self) -> None:
        """Tint where hidden, input where visible, in the window of the input."""
        image, visible, reconstruction = example()
        hidden = np.kron(~visible[0].numpy(), np.ones(UNIT, dtype=bool))
        low, high = np.percentile(image.numpy(), (0.5, 99.5))
        rows = list(visualisation._panels(Example("", image, visible, reconstruction), (5.0, 1.0, 2.0)).values())
        for axis, row in enumerate(rows):
            covered = np.take(hidden, row.place, axis)
            assert covered.any()
            assert not covered.all()
            assert (row.masked[covered] == HIDDEN_COLOUR).all()
            np.testing.assert_array_equal(row.masked[~covered], np.repeat(row.input[~covered][:, None], 3, axis=1))
            np.testing.assert_array_equal(row.reconstruction[~covered], row.input[~covered])
            expected = ((np.take(reconstruction[0].numpy(), row.place, axis) - low) / (high - low)).clip(0, 1) * 255
            np.testing.assert_allclose(row.reconstruction[covered], expected[covered], atol=1)
            error = np.take((reconstruction - image)[0].abs().numpy(), row.place, axis)
            np.testing.assert_allclose(row.error[covered], error[covered], rtol=1e-6)
            assert np.isnan(row.error[~covered]).all()
        assert [row.aspect for row in rows] == [0.5, 2.5, 5.0]

    def test_ignored_voxels_are_marked_and_not_judged(self, tmp_path: Path) -> None:
        image, visible, reconstruction = example()
        counted = torch.rand(1, *SHAPE) < 0.5
        plain = Example("", image, visible, reconstruction)
        marked = plain._replace(counted=counted)
        rows = [visualisation._panels(drawn, (1.0, 1.0, 1.0)).values() for drawn in (plain, marked)]
        for axis, (before, after) in enumerate(zip(*rows, strict=True)):
            ignored = np.isfinite(before.error) & ~np.take(counted[0].numpy(), after.place, axis)
            assert ignored.any() and (after.masked[ignored] == IGNORED_COLOUR).all()
            assert (np.isnan(after.error) == (np.isnan(before.error) | ignored)).all()
        reconstruction_pictures([marked], tmp_path / "picture.png")
        assert share_of(read(tmp_path / "picture.png"), IGNORED_COLOUR) > 0.01
        full = restore_intensities(reconstruction, image, UNIT)
        torch.testing.assert_close(restore_intensities(reconstruction, image, UNIT, counted | True), full)

    def test_file_shows_the_hidden_share(self, tmp_path: Path) -> None:
        """The PNG holds the tint on as much of its area as is hidden in the slices."""
        image, visible, reconstruction = example()
        path = tmp_path / "new" / "picture.png"
        picture(image, visible, reconstruction, path, title="epoch 1", spacing=(2.0, 1.0, 1.0))
        tinted = (read(path) == np.array(HIDDEN_COLOUR)).all(-1)
        columns = np.flatnonzero(tinted.any(0))
        width = read(path).shape[1]
        assert 0.2 * width < columns.min() < columns.max() < 0.55 * width  # the second column only
        nothing_hidden = tmp_path / "visible.png"
        picture(image, torch.ones_like(visible), reconstruction, nothing_hidden, spacing=(2.0, 1.0, 1.0))
        assert share_of(read(nothing_hidden), HIDDEN_COLOUR) == 0
        everything = tmp_path / "hidden.png"
        picture(image, torch.zeros_like(visible), reconstruction, everything, spacing=(2.0, 1.0, 1.0))
        rows = list(visualisation._panels(Example("", image, visible, reconstruction), (2.0, 1.0, 1.0)).values())
        hidden = np.average(
            [np.isfinite(row.error).mean() for row in rows],
            weights=[row.input.shape[0] * row.aspect / row.input.shape[1] for row in rows],
        )
        assert tinted.sum() / (read(everything) == np.array(HIDDEN_COLOUR)).all(-1).sum() == pytest.approx(
            hidden, rel=0.03
        )

    def test_a_slice_of_a_2d_configuration_is_one_plane(self, tmp_path: Path) -> None:
        image, visible, reconstruction = (tensor[:, 0] for tensor in example())
        flat = visualisation._panels(Example("", image, visible, reconstruction), (1.0, 2.0))
        whole = visualisation._panels(
            Example("", image[:, None], visible[:, None], reconstruction[:, None]), (9.0, 1.0, 2.0)
        )
        assert list(flat) == ["slice"]
        for one, other in zip(flat["slice"], whole["axial"], strict=True):
            np.testing.assert_array_equal(one, other)
        picture(image, visible, reconstruction, tmp_path / "slice.png", spacing=(1.0, 2.0))
        assert read(tmp_path / "slice.png").std() > 5

    def test_leaves_only_the_picture(self, tmp_path: Path) -> None:
        picture(*example(), tmp_path / "picture.png")
        assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]

    def test_anisotropic_spacing_stretches(self, tmp_path: Path) -> None:
        for spacing in (1.0, 4.0):
            picture(*example(), tmp_path / f"{spacing}.png", spacing=(spacing, 1.0, 1.0))
        assert read(tmp_path / "4.0.png").shape[0] > 1.5 * read(tmp_path / "1.0.png").shape[0]

    def test_mask_without_channel_axis_and_arrays(self, tmp_path: Path) -> None:
        image, visible, reconstruction = example()
        picture(image, visible, reconstruction, tmp_path / "tensors.png")
        picture(image.numpy(), visible[0].numpy(), reconstruction.numpy(), tmp_path / "arrays.png")
        np.testing.assert_array_equal(read(tmp_path / "tensors.png"), read(tmp_path / "arrays.png"))

    def test_constant_image(self, tmp_path: Path) -> None:
        image, visible, _ = example()
        picture(torch.zeros_like(image), visible, torch.zeros_like(image), tmp_path / "flat.png")
        assert share_of(read(tmp_path / "flat.png"), HIDDEN_COLOUR) > 0.05

    def test_several_examples_stand_below_each_other(self, tmp_path: Path) -> None:
        reconstruction_pictures([Example("first", *example())], tmp_path / "one.png")
        reconstruction_pictures([Example("first", *example()), Example("second", *example())], tmp_path / "two.png")
        assert read(tmp_path / "two.png").shape[0] > 1.7 * read(tmp_path / "one.png").shape[0]
        with pytest.raises(ValueError, match="no examples"):
            reconstruction_pictures([], tmp_path / "none.png")

    def test_slice_crosses_hidden_and_visible_units(self) -> None:
        visible = np.ones(GRID, dtype=bool)
        visible[0, 1, 1] = False
        assert visualisation._informative_slice(visible, 0, UNIT[0]) == UNIT[0] - 1  # the nearest to the middle, 6
        assert visualisation._informative_slice(visible, 1, UNIT[1]) == 2 * UNIT[1] - 1
        visible[1] = False
        assert visualisation._informative_slice(visible, 0, UNIT[0]) == UNIT[0] - 1  # not the one that is all hidden

    def test_refuses_what_does_not_fit(self, tmp_path: Path) -> None:
        image, visible, reconstruction = example()
        with pytest.raises(ValueError, match="must both be"):
            picture(image[0], visible, reconstruction, tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"\(12, 32, 40\).*\(3, 4, 7\)"):
            picture(image, torch.ones(3, 4, 7), reconstruction, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())


class TestProgressPicture:
    @staticmethod
    def log(epochs: int) -> dict[str, list[float]]:
        return {
            "train_losses": [1 / (n + 1) for n in range(epochs)],
            "val_losses": [1.1 / (n + 1) for n in range(epochs)],
            "lrs": [1e-4] * epochs,
            "epoch_start_timestamps": [100.0 * n for n in range(epochs)],
            "epoch_end_timestamps": [100.0 * n + 90 for n in range(epochs)],
        }

    @pytest.mark.parametrize("epochs", [0, 1, 2, 50])
    def test_any_number_of_epochs(self, epochs: int, tmp_path: Path) -> None:
        progress_picture(self.log(epochs), tmp_path / "progress.png")
        assert [file.name for file in tmp_path.iterdir()] == ["progress.png"]
        assert read(tmp_path / "progress.png").std() > 10

    def test_lists_of_unequal_length_are_cut(self, tmp_path: Path) -> None:
        """In the middle of an epoch some lists are one longer: the picture is that of the epochs that are over."""
        progress_picture(self.log(5), tmp_path / "even.png")
        uneven = self.log(5)
        uneven["train_losses"].append(7.0)
        uneven["epoch_start_timestamps"].append(1e9)
        progress_picture(uneven, tmp_path / "uneven.png")
        np.testing.assert_array_equal(read(tmp_path / "even.png"), read(tmp_path / "uneven.png"))

    def test_a_line_where_the_loss_of_means_is_known(self, tmp_path: Path) -> None:
        for name, known in (("without", {}), ("with", {"loss_of_means": 0.9})):
            progress_picture(self.log(5), tmp_path / f"{name}.png", **known)
        pictures = [read(tmp_path / f"{name}.png") for name in ("without", "with")]
        assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()

    def test_takes_the_loggers_get_value(self, tmp_path: Path) -> None:
        log = self.log(3)
        progress_picture(log, tmp_path / "lists.png")
        progress_picture(lambda name, step: log[name], tmp_path / "logger.png")
        np.testing.assert_array_equal(read(tmp_path / "lists.png"), read(tmp_path / "logger.png"))
