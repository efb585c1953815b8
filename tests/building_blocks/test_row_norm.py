"""InstanceNorm of channels-last samples: as accurate as nnU-Net's own on channels-first images."""

import pytest
import torch
from torch.nn import functional as F

from hyspark_nnunet.building_blocks.row_norm import PART, normalise_columns


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("n_rows", [5, 2 * PART + 3])
def test_values_and_gradients_are_those_of_instance_norm(n_rows: int, affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, weight, bias = made(n_rows, 3), made(3), made(3)
    scale = (weight, bias) if affine else (None, None)
    gradient = made(n_rows, 3).detach()
    expected = F.instance_norm(rows.T[None], None, None, *scale, eps=1e-3)[0].T
    found = normalise_columns(rows, *scale, eps=1e-3)
    torch.testing.assert_close(found, expected)
    inputs = [rows, weight, bias] if affine else [rows]
    # contiguous: with another layout, torch 2.13's gradient of instance_norm is wrong for a single sample on a CPU
    for a, b in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient.T.contiguous().T),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_many_rows_are_as_accurate_as_nnunets_norm_in_float32() -> None:
    rows = torch.randn(2**19, 4, generator=torch.Generator().manual_seed(0)) + 1
    exact = F.instance_norm(rows.double().T.contiguous()[None])[0].T

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    nnunets = error(F.instance_norm(rows.T.contiguous()[None])[0].T)
    assert nnunets < 1e-6
    # torch's batch norm is not: 1e-4
    assert error(normalise_columns(rows, None, None, 1e-5)) < max(1e-6, 3 * nnunets)
