import pytest
import torch

from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible, unit_size, view_at


def test_unit_is_the_product_of_the_strides() -> None:
    assert unit_size([(1, 1, 1), (1, 2, 2), (2, 2, 2)]) == (2, 4, 4)


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"), [((6, 6, 6), 0.75, 54), ((5, 7, 5), 0.75, 44), ((2, 1), 0.5, 1)]
)
def test_number_of_visible_units(grid: tuple, ratio: float, expected: int) -> None:
    assert num_visible_units(grid, ratio) == expected


@pytest.mark.parametrize("grid", [(6, 6, 6), (5, 7, 5), (2, 12, 12), (7, 3)])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_every_sample_keeps_equally_many(grid: tuple, ratio: float) -> None:
    visible = sample_visible(5, grid, ratio, torch.Generator().manual_seed(0))
    assert visible.shape == (5, 1, *grid) and visible.dtype == torch.bool
    assert visible.flatten(1).sum(1).tolist() == [num_visible_units(grid, ratio)] * 5
    assert not torch.equal(visible[0], visible[1])


def test_sampling_is_a_function_of_the_generator() -> None:
    first, again = (sample_visible(2, (4, 4, 4), 0.75, torch.Generator().manual_seed(7)) for _ in range(2))
    other = sample_visible(2, (4, 4, 4), 0.75, torch.Generator().manual_seed(8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample_visible(2, (4, 4, 4), 0.75, torch.Generator())
    assert torch.equal(torch.rand(3), expected)


def test_every_unit_is_visible_equally_often() -> None:
    visible = sample_visible(4000, (3, 3, 3), 0.75, torch.Generator().manual_seed(0))
    share = visible.float().mean(0)
    # 7 of 27; the standard error is 0.007
    assert (share - 7 / 27).abs().max() < 0.035


@pytest.mark.parametrize("grid", [(6, 6, 6), (5, 7, 5), (7, 3)])
@pytest.mark.parametrize("block", [2, 3])
def test_units_of_a_block_are_hidden_together(grid: tuple, block: int) -> None:
    visible = sample_visible(20, grid, 0.75, torch.Generator().manual_seed(0), block=block)
    assert visible.flatten(1).sum(1).tolist() == [num_visible_units(grid, 0.75)] * 20
    index = torch.meshgrid(*(torch.arange(n) // block for n in grid), indexing="ij")
    blocks = sum(axis * 100**place for place, axis in enumerate(index)).flatten()
    cut = 0
    for sample in visible.flatten(1):
        shares = [sample[blocks == number].float().mean().item() for number in blocks.unique()]
        cut += sum(0 < share < 1 for share in shares)
        assert sum(0 < share < 1 for share in shares) <= 1
    # of single units far more blocks would be in part visible
    assert cut <= 20


def test_a_block_larger_than_the_grid_hides_what_the_ratio_says() -> None:
    visible = sample_visible(3, (4, 4), 0.75, torch.Generator().manual_seed(0), block=9)
    assert visible.flatten(1).sum(1).tolist() == [4, 4, 4]


def test_view_at_a_finer_grid() -> None:
    visible = torch.tensor([[True, False]]).view(1, 1, 1, 2)
    assert view_at(visible, (2, 3)).tolist() == [[[[True] * 3 + [False] * 3] * 2]]


def test_patch_that_is_no_multiple_of_the_unit() -> None:
    with pytest.raises(
        ValueError, match=r"\(40, 56, 40\) is not divisible by the mask unit \(16, 16, 16\).*\[32, 64, 32\]"
    ):
        mask_grid((40, 56, 40), (16, 16, 16))


def test_patch_with_other_axes_than_the_unit() -> None:
    with pytest.raises(ValueError, match="has 2 axes, the mask unit .* has 3"):
        mask_grid((64, 64), (16, 16, 16))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio is {ratio}.*strictly between 0 and 1"):
        num_visible_units((4, 4, 4), ratio)


@pytest.mark.parametrize(("ratio", "share"), [(0.99, "visible"), (0.01, "hidden")])
def test_ratio_that_leaves_nothing_on_this_grid(ratio: float, share: str) -> None:
    with pytest.raises(
        ValueError, match=rf"mask_ratio {ratio} leaves no {share} unit on the grid \(2, 2, 2\).*from 0.125 to 0.875"
    ):
        num_visible_units((2, 2, 2), ratio)


def test_grid_of_one_unit() -> None:
    with pytest.raises(ValueError, match="at least two mask units"):
        num_visible_units((1, 1, 1), 0.75)
