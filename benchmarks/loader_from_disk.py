"""Patches per second of one loader process of pre-training, from preprocessed files on disk.

    python -m benchmarks.loader_from_disk

Writes synthetic cases as large as CTs with nnU-Net's own code (blosc2), and draws patches of 128^3 with the loader and
the transforms of pre-training. Cold: before every patch the files are dropped from the page cache. Warm: they stay
there.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import zoom

from benchmarks.loader import ROTATION, variants
from benchmarks.measuring import machine, table
from hyspark_nnunet.training.data.unreadable_cases import RedrawingLoader

STEP_SECONDS, BATCH_SIZE = 0.35, 14  # of a GPU, assumed as in docs/scaling.md; of preset B's plans for CTs


def write_cases(folder: Path, count: int, shape: Sequence[int], patch: Sequence[int]) -> None:
    """Smooth tissue with noise in air of constant value, normalised, as nnU-Net saves it."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.normal(0, 1, [max(2, n // 16) for n in shape])
        data = zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1).astype(np.float32)
        data += rng.normal(0, 0.2, shape).astype(np.float32)
        margin = tuple(slice(n // 8, n - n // 8) for n in shape)
        seg = np.zeros(shape, np.int16)
        seg[margin] = 1
        data[seg == 0] = -1.5
        places = np.argwhere(seg[None])[:: max(1, seg.size // 20_000)]
        layouts = [comp_blosc2_params((1, *shape), tuple(patch), size) for size in (4, 2)]
        (blocks, chunks), (seg_blocks, seg_chunks) = layouts
        nnUNetDatasetBlosc2.save_case(
            data[None],
            seg[None],
            {"class_locations": {1: places}},
            str(folder / f"case{index}"),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=seg_chunks,
            blocks_seg=seg_blocks,
        )


def drop_from_cache(folder: Path) -> None:
    """Drops the files of a folder from the page cache; they must be on the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def bytes_read() -> int:
    """What this process has read from storage."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def measure(folder: Path, patch: Sequence[int], patches: int) -> list[dict[str, Any]]:
    """A row for cold and for warm files."""
    initial = [int(n) for n in get_patch_size(tuple(patch), ROTATION, ROTATION, ROTATION, (0.85, 1.25))]
    loader = RedrawingLoader(
        nnUNetDatasetBlosc2(str(folder)),
        1,
        initial,
        tuple(patch),
        LabelManager({"background": 0, "body": 1}, regions_class_order=None),
        oversample_foreground_percent=0.33,
        transforms=variants(patch)["spatial transforms, no labels"],
    )
    os.sync()
    rows = []
    for state in ("cold", "warm"):
        np.random.seed(0)
        torch.manual_seed(0)
        if state == "warm":
            for file in folder.iterdir():
                file.read_bytes()
        seconds, before = 0.0, bytes_read()
        for _ in range(patches):
            if state == "cold":
                drop_from_cache(folder)
            begin = time.perf_counter()
            loader.generate_train_batch()
            seconds += time.perf_counter() - begin
        rate = patches / seconds
        rows.append(
            {
                "files": state,
                "patch": "x".join(map(str, patch)),
                "ms per patch": f"{1000 / rate:.0f}",
                "patches/s per process": f"{rate:.1f}",
                "MB read per patch": f"{(bytes_read() - before) / patches / 1e6:.1f}",
                "processes needed": ceil(BATCH_SIZE / STEP_SECONDS / rate),
            }
        )
    return rows


def main() -> None:
    """Writes the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=[300, 400, 400], help="of a case (default: %(default)s)")
    parser.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--patches", type=int, default=50, help="per row (default: %(default)s)")
    parser.add_argument("--folder", help="where the files are written (default: the folder for temporary files)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory(dir=a.folder) as home:
        write_cases(Path(home), a.cases, a.shape, a.patch)
        size = sum(file.stat().st_size for file in Path(home).iterdir()) / a.cases / 1e6
        print(f"{a.cases} cases of {' x '.join(map(str, a.shape))} voxels, {size:.0f} MB each")
        print(table(measure(Path(home), a.patch, a.patches)))
    print(f"processes needed: for a step of {STEP_SECONDS} s with {BATCH_SIZE} patches")


if __name__ == "__main__":
    main()
