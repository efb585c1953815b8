"""What the benchmarks compare with is the same network, and they run."""

import multiprocessing
from pathlib import Path

import pytest

from benchmarks.loader import measure as measure_loader
from benchmarks.loader_from_disk import measure as measure_from_disk
from benchmarks.loader_from_disk import write_cases
from benchmarks.preprocessing_profile import STEPS, profile
from benchmarks.step import compare
from benchmarks.step_cases import (
    ANISOTROPIC,
    BLOCKS_KEPT,
    CUBE,
    HIPPOCAMPUS,
    LADDER,
    NNUNET_KEPT,
    HySparKCase,
    Shape,
    SparKCase,
    isotropic,
)
from hyspark_nnunet.masking import mask_grid


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variant still has a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_process"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forked_processes")
def test_every_variant_of_the_step_agrees() -> None:
    case = HySparKCase(shape=isotropic((32, 32, 32), n_stages=4), preset="S", batch_size=2)
    rows = compare(case, LADDER, rounds=1)
    assert [row["variant"] for row in rows] == [variant.name for variant in LADDER]
    assert all(float(row["loss difference"]) < 1e-5 for row in rows)
    assert all(float(row["total [s]"]) > 0 and float(row["memory [GB]"]) > 0 for row in rows)
    # visible blocks save operations
    operations = [float(row["TFLOP"]) for row in rows]
    assert operations[0] == operations[1] > operations[2] > 0


@pytest.mark.usefixtures("forked_processes")
def test_every_variant_of_spark_agrees() -> None:
    case = SparKCase(shape=isotropic((32, 32, 32), n_stages=3), features=(8, 16, 16))
    variants = [*NNUNET_KEPT, *BLOCKS_KEPT]
    rows = {row["variant"]: row for row in compare(case, variants, rounds=1)}
    assert list(rows) == [variant.name for variant in variants]
    unmasked = rows.pop("nnU-Net without a mask")
    assert float(unmasked["loss difference"]) > 1e-3
    assert all(float(row["loss difference"]) < 1e-4 for row in rows.values())
    assert float(rows["visible blocks"]["TFLOP"]) < float(rows["dense baseline"]["TFLOP"])


@pytest.mark.parametrize("shape", [CUBE, HIPPOCAMPUS, ANISOTROPIC], ids=lambda shape: shape.name)
def test_the_shapes_are_whole_numbers_of_mask_units(shape: Shape) -> None:
    network = HySparKCase(shape=shape, preset="S").network()
    assert all(n > 1 for n in mask_grid(shape.patch, network.encoder.unit))


def test_the_loader_without_labels_is_measured() -> None:
    rows = measure_loader((16, 16, 16), patches=4)
    assert [float(row["patches/s"]) > 0 for row in rows] == [True] * 3


def test_the_loader_reads_patches_from_disk(tmp_path: Path) -> None:
    write_cases(tmp_path, 2, (24, 28, 20), (16, 16, 16))
    rows = measure_from_disk(tmp_path, (16, 16, 16), patches=3)
    assert [row["files"] for row in rows] == ["cold", "warm"] and all(row["processes needed"] >= 1 for row in rows)


def test_preprocessing_is_profiled() -> None:
    steps, megabytes = profile(1, slices=48, width=96, keep=True)
    assert set(STEPS) < set(steps) and megabytes > 0
    # a step that nnU-Net has renamed would not be found
    assert min(steps[name] for name in STEPS) > 0
    # what takes time has been found by its name
    assert steps["the rest"] < 0.5 * sum(steps.values())
