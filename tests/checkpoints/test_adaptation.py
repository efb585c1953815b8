"""Adapting tensors: what comes out answers as what went in."""

import pytest
import torch
from torch.nn import functional as F

from hyspark_nnunet.checkpoints.adaptation import (
    adapt_input_channels,
    adapt_kernel,
    adapt_stem,
    adapt_upsampling,
    channel_assignment,
    channel_names,
)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(5, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class TestKernels:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_three_to_one_answers_what_is_constant_along_the_axis_as_before(self, weight, axis: int) -> None:
        kernel = [3, 3, 3]
        kernel[axis] = 1
        adapted = adapt_kernel(weight, kernel)
        assert adapted.shape == (5, 4, *kernel)
        same(adapted, weight.sum(axis + 2, keepdim=True))
        image = torch.randn(1, 4, *[1 if a == axis else 6 for a in range(3)]).expand(1, 4, 6, 6, 6)
        before = F.conv3d(image, weight)
        answer = F.conv3d(image, adapted).narrow(axis + 2, 1, 4)
        same(answer, before)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_one_to_three_answers_everything_as_before(self, weight, axis: int) -> None:
        flat = weight.select(axis + 2, 1).unsqueeze(axis + 2)
        adapted = adapt_kernel(flat, (3, 3, 3))
        assert torch.equal(adapted.select(axis + 2, 1), flat.squeeze(axis + 2))
        assert adapted.count_nonzero() == flat.count_nonzero()
        image = torch.randn(1, 4, 6, 6, 6)
        padding = [1, 1, 1]
        padding[axis] = 0
        same(F.conv3d(image, adapted, padding=1), F.conv3d(image, flat, padding=padding))

    def test_both_at_once(self, weight) -> None:
        flat = weight[:, :, :1]
        same(adapt_kernel(flat, (3, 1, 3))[:, :, 1], weight[:, :, 0].sum(2, keepdim=True))

    def test_nothing_is_truncated(self, weight) -> None:
        assert adapt_kernel(F.pad(weight, [1] * 6), (3, 3, 3)) is None

    def test_equal_kernels_stay_as_they_are(self, weight) -> None:
        assert torch.equal(adapt_kernel(weight, (3, 3, 3)), weight)


@pytest.mark.parametrize(("here", "there"), [((2, 2, 2), (1, 2, 2)), ((1, 2, 2), (2, 2, 2)), ((2, 1, 2), (1, 2, 2))])
def test_another_stride_of_an_upsampling(here: tuple, there: tuple) -> None:
    """Of an image that is constant along the axes that change, the same: averaged over what one voxel becomes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, *here, generator=generator)
    adapted = adapt_upsampling(weight, there)
    assert adapted.shape == (4, 5, *there) and adapted.dtype == weight.dtype
    changed = [axis for axis in range(3) if here[axis] != there[axis]]
    image = torch.randn(1, 4, *[1 if axis in changed else 3 for axis in range(3)], generator=generator)
    before, after = (F.conv_transpose3d(image, w, stride=w.shape[2:]) for w in (weight, adapted))
    axes = [2 + axis for axis in changed]
    same(after.mean(axes), before.mean(axes))
    if there[changed[0]] == 2:  # and every voxel alike
        same(after.narrow(axes[0], 0, 1), after.narrow(axes[0], 1, 1))
    assert (adapt_upsampling(weight, (3, 2, 2)) is None) == (here[0] == 2)


class TestInputChannels:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
    @pytest.mark.parametrize("sources", [1, 2, 4])
    def test_equal_channels_are_answered_as_before(self, weight, sources: int, count: int) -> None:
        weight = weight[:, :sources]
        assignment, _ = channel_assignment([str(i) for i in range(sources)], [str(i) for i in range(count)])
        adapted = adapt_input_channels(weight, assignment, count)
        image = torch.randn(1, 1, 6, 6, 6)
        before = F.conv3d(image.expand(1, sources, 6, 6, 6), weight)
        same(F.conv3d(image.expand(1, count, 6, 6, 6), adapted), before)

    def test_one_to_four_is_a_quarter_each(self, weight) -> None:
        one = weight[:, :1]
        assert torch.equal(adapt_input_channels(one, None, 4), (one / 4).expand(5, 4, 3, 3, 3))

    def test_four_to_one_is_the_sum(self, weight) -> None:
        same(adapt_input_channels(weight, None, 1), weight.sum(1, keepdim=True))

    def test_two_onto_one_by_the_recipe(self, weight) -> None:
        source, target = ["CT", "PET"], ["T1", "T2", "F"]
        assignment, how = channel_assignment(source, target, "T1=CT, T2=CT, F=PET")
        assert assignment == [0, 0, 1] and how == "input channels: T1 from CT, T2 from CT, F from PET"
        adapted = adapt_input_channels(weight[:, :2], assignment, 3)
        same(adapted, torch.stack([weight[:, 0] / 2, weight[:, 0] / 2, weight[:, 1]], 1))

    def test_a_channel_that_none_takes_goes_to_all(self, weight) -> None:
        assignment, _ = channel_assignment(["T1", "T2", "FLAIR", "T1c"], ["FLAIR", "T1"])
        assert assignment == [2, 0]
        adapted = adapt_input_channels(weight, assignment, 2)
        rest = (weight[:, 1] + weight[:, 3]) / 2
        same(adapted, torch.stack([weight[:, 2] + rest, weight[:, 0] + rest], 1))

    def test_named_channels_in_another_order(self, weight) -> None:
        assignment, how = channel_assignment(["a", "b", "c", "d"], ["d", "a", "b", "c"])
        assert how == "input channels by name: d, a, b, c"
        assert torch.equal(adapt_input_channels(weight, assignment, 4), weight[:, [3, 0, 1, 2]])

    def test_other_names_of_equally_many_change_nothing(self) -> None:
        assert channel_assignment(["CT"], ["MR"]) == ([0], "")
        assert channel_assignment(["0"], ["MR"]) == ([0], "")

    def test_by_number(self) -> None:
        assert channel_assignment(["0"], ["T1", "T2"], "0=0,T2=0")[0] == [0, 0]

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ("T1", "'T1' is not a pair. Write CHANNEL=CHANNEL_OF_THE_FILE, .* T1=CT"),
            ("T1=CT", "leaves out channel T2"),
            ("T1=CT,T2=MR", "names channel MR, but the file has CT, PET: give a name or a number from 0 to 1"),
            ("T1=CT,T2=2", "names channel 2, but the file has CT, PET"),
            ("T1=CT,T3=CT", "names channel T3, but this dataset has T1, T2"),
        ],
    )
    def test_mappings_that_are_refused(self, mapping: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            channel_assignment(["CT", "PET"], ["T1", "T2"], mapping)

    def test_names_of_a_cascade(self) -> None:
        assert channel_names({"channel_names": {"0": "CT"}}, 3) == ["CT", "1", "2"]
        assert channel_names({}, 2) == ["0", "1"]


class TestSegmentationOfAPreviousStage:
    """Channels of a cascade's second stage: images by name, labels behind them without names."""

    IMAGES, CASCADE = {"channel_names": {"0": "CT"}}, {"channel_names": {"0": "CT"}}

    def test_they_start_at_zero(self) -> None:
        weight = torch.randn(4, 1, 3, 3, 3)
        adapted, how = adapt_stem(weight, 3, self.IMAGES, self.CASCADE)
        assert torch.equal(adapted[:, :1], weight) and adapted.shape[1] == 3 and not adapted[:, 1:].any()
        assert how == "channels of the previous stage's segmentation: 2 start at zero"

    def test_they_are_taken_where_the_labels_are_as_many(self) -> None:
        weight = torch.randn(4, 3, 3, 3, 3)
        adapted, how = adapt_stem(weight, 3, self.CASCADE, self.CASCADE)
        assert torch.equal(adapted, weight) and how == ""

    def test_they_are_left_out_of_a_first_stage(self) -> None:
        weight = torch.randn(4, 3, 3, 3, 3)
        adapted, how = adapt_stem(weight, 1, self.CASCADE, self.IMAGES)
        assert torch.equal(adapted, weight[:, :1])
        assert how == "channels of the previous stage's segmentation: 2 left out"

    def test_images_are_mapped_beside_them(self) -> None:
        weight = torch.randn(4, 1, 1, 1, 1)
        two = {"channel_names": {"0": "T1", "1": "T2"}}
        adapted, how = adapt_stem(weight, 5, self.IMAGES, two)
        assert torch.allclose(adapted[:, :2], weight / 2) and not adapted[:, 2:].any()
        assert how == "input channels averaged: 1 -> 2; channels of the previous stage's segmentation: 3 start at zero"
