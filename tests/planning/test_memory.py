"""Estimates against what processes really take, and against the estimates of other sizes."""

import pytest
import torch

from benchmarks.planner_memory import configuration_of, estimated, measured_in_a_fresh_process
from hyspark_nnunet.building_blocks.recomputation import DEPTHS
from hyspark_nnunet.planning.step_memory import StepMemory, finetuning_memory, pretraining_memory
from hyspark_nnunet.training.memory.shape_only import LiveBytes
from hyspark_nnunet.training.memory.step_bytes import step_bytes

# larger ones: python -m benchmarks.planner_memory
MEASURED = [
    ("pretraining", "S", [64, 64, 64]),
    ("finetuning", "S", [48, 48, 48]),
    ("finetuning", "S", [192, 192]),
    ("pretraining", "ResidualEncoderUNet", [48, 48, 48]),
]


@pytest.mark.parametrize(("kind", "network", "patch_size"), MEASURED)
def test_the_estimate_is_what_a_fresh_process_takes(kind: str, network: str, patch_size: list[int]) -> None:
    configuration = configuration_of(patch_size, network)
    estimate = estimated(kind, configuration, 4, mixed=False)
    assert estimate == pytest.approx(measured_in_a_fresh_process(kind, configuration, 4, "cpu"), rel=0.15)


def test_one_topology_is_measured_for_all_patches() -> None:
    """From a small patch to one eight times as large: the line against the estimate itself."""
    small, large = ({**configuration_of([64] * 3, "S"), "patch_size": [edge] * 3} for edge in (64, 128))
    for memory in (lambda c: pretraining_memory(c, 1), lambda c: finetuning_memory(c, 1, 3)):
        assert memory(small).bytes_of([128] * 3, 3) == pytest.approx(memory(large).bytes_of([128] * 3, 3), rel=0.02)


def test_mixed_precision_takes_more_than_half() -> None:
    """Weights, moments, and what autocast keeps in float32 (LayerNorm, losses) stay as large."""
    full, mixed = (finetuning_memory(configuration_of([64] * 3, "S"), 1, 3, mixed) for mixed in (False, True))
    assert 0.5 < mixed.per_voxel / full.per_voxel < 0.7


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling_keeps_half_precision_as_on_cuda(kind: str) -> None:
    """The CPU's autocast would compute it in float32, and keep the input in that type, too."""
    types = []

    def loss(network: torch.nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = getattr(torch.nn.functional, f"{kind}_pool3d")(network(torch.empty(1, 4, 8, 8, 8)), 2)
        types.append(pooled.dtype)
        return pooled.float().sum()

    with torch.device("meta"):
        network = torch.nn.Conv3d(4, 4, 1)
    assert step_bytes(network, loss) > 0 and types == [torch.bfloat16]


def test_what_is_recomputed_is_not_held() -> None:
    """In mixed precision, too, where the backward pass has to take the forward pass's types."""
    configuration = configuration_of([64] * 3, "S")
    held = [
        pretraining_memory(configuration | {"hyspark": {"preset": "S", "activation_checkpointing": depth}}, 1).per_voxel
        for depth in DEPTHS
    ]
    assert held[0] > 1.3 * held[1] > 1.3 * 1.3 * held[2]


def test_batches_that_fit() -> None:
    memory = StepMemory(fixed=100, per_voxel=2)
    assert memory.bytes_of([4, 4], 3) == 196
    assert memory.batch_size_for(196, [4, 4]) == 3 and memory.batch_size_for(195, [4, 4]) == 2
    assert memory.batch_size_for(50, [4, 4]) == 0


def test_tensors_without_storage_count_as_what_they_would_hold() -> None:
    """Views share a storage, operations in place keep theirs, autocast halves, and what is freed no longer counts."""
    with LiveBytes() as memory:
        weight = torch.nn.Parameter(torch.empty(1000, 1000))
        assert memory.now == 4_000_000
        view = weight.t()[:10]
        assert memory.now == 4_000_000 and view.shape == (10, 1000)
        with torch.autocast("cpu", dtype=torch.float16):
            product = torch.empty(500, 1000) @ weight
        # of the backward pass: the input in float16
        assert product.dtype == torch.float16 and memory.now == 4_000_000 + 1_000_000 + 1_000_000
        product.mul_(2)
        assert memory.now == 6_000_000
        product.float().sum().backward()
        assert weight.grad.shape == weight.shape and memory.peak >= 9_000_000
        del weight, view, product
        assert memory.now == 0
