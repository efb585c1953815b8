"""Where the time of preprocessing goes, on synthetic CTs of realistic size, and what ten thousand of them would take.

    python -m benchmarks.preprocessing_profile --cases 10

One process, one thread; 512 x 512 slices of 0.8 mm, 2.5 mm apart, resampled to 1.5 x 0.8 x 0.8 mm. Once as in nnU-Net's
command, once as in ``hyspark_nnunet preprocess``, which keeps freed memory while it works on a case.
"""

import argparse
import cProfile
import multiprocessing
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter

from benchmarks.measuring import machine, table
from hyspark_nnunet.cpu_allocator import keep_freed_memory, release_freed_memory

SPACING = (2.5, 0.8, 0.8)
# steps of preprocessing: functions of nnU-Net by name
STEPS = {
    "reading image and labels": ("read_images", "read_seg"),
    "cropping": ("crop_to_nonzero",),
    "normalising": ("_normalize",),
    "resampling image and labels": ("resample_data_or_seg_to_shape",),
    "sampling foreground": ("_sample_foreground_locations",),
    "compressing and writing": ("save_case",),
}
REST = "the rest"
RESAMPLING = "resample_data_or_seg_to_shape"
DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}


def write_ct(folder: Path, seed: int, slices: int, width: int) -> tuple[str, str]:
    """A body with organs and noise in air, and its label; returns both paths."""
    rng = np.random.default_rng(seed)
    shape = (slices, width, width)
    place = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    body = (place[1] / 0.6) ** 2 + (place[2] / 0.85) ** 2 < 1
    body = np.broadcast_to(body, shape)
    organs = gaussian_filter(rng.normal(0, 1, tuple(n // 8 for n in shape)).astype(np.float32), 1.5)
    organs = np.kron(organs / organs.std(), np.ones((8, 8, 8), np.float32))
    padding = [(0, n - m) for n, m in zip(shape, organs.shape, strict=True)]
    image = np.where(body, 40 + 60 * np.pad(organs, padding), -1000) + rng.normal(0, 15, shape).astype(np.float32)
    paths = []
    for name, array in (("image", image.round().astype(np.int16)), ("label", body.astype(np.uint8))):
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(SPACING[::-1])
        paths.append(str(folder / f"{name}{seed}.nii.gz"))
        sitk.WriteImage(volume, paths[-1], True)
    return paths[0], paths[1]


def plans() -> dict[str, Any]:
    """Plans as nnU-Net's for such CTs, as far as preprocessing reads them."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset001_CT",
        "plans_name": "profile",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 40.0, "std": 60.0, "percentile_00_5": -150.0, "percentile_99_5": 250.0}
        },
        "configurations": {
            "3d_fullres": {
                "preprocessor_name": "DefaultPreprocessor",
                "patch_size": [112, 128, 128],
                "spacing": [1.5, 0.8, 0.8],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": RESAMPLING,
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg": RESAMPLING,
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
                "architecture": {},
            }
        },
    }


def profile(cases: int, slices: int, width: int, keep: bool) -> tuple[dict[str, float], float]:
    """Seconds per case of each step and of the rest; megabytes written per case. ``keep``: freed memory."""
    torch.set_num_threads(1)
    manager = PlansManager(plans())
    configuration, preprocessor = manager.get_configuration("3d_fullres"), DefaultPreprocessor(verbose=False)
    profiler = cProfile.Profile()
    seconds = 0.0
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        for seed in range(cases):
            image, label = write_ct(folder, seed, slices, width)
            begin = time.perf_counter()
            if keep:
                keep_freed_memory()
            profiler.enable()
            preprocessor.run_case_save(
                str(folder / f"case{seed}"), [image], label, manager, configuration, DATASET_JSON
            )
            profiler.disable()
            if keep:
                release_freed_memory()
            seconds += time.perf_counter() - begin
        written = sum(file.stat().st_size for file in folder.glob("case*"))
    by_name: dict[str, float] = {}
    for (_, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        by_name[name] = max(by_name.get(name, 0.0), cumulative)
    found = {step: sum(by_name.get(name, 0.0) for name in names) / cases for step, names in STEPS.items()}
    return {**found, REST: seconds / cases - sum(found.values())}, written / cases / 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--width", type=int, default=512, help="voxels of a slice per axis")
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    found = {}
    for name, keep in (("nnU-Net's command", False), ("hyspark_nnunet preprocess", True)):
        # a process of its own: the C library's treatment of memory belongs to a process
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name], megabytes = pool.apply(profile, (a.cases, a.slices, a.width, keep))
    rows = [
        {"step": step} | {f"{name} [s per case]": f"{steps[step]:.2f}" for name, steps in found.items()}
        for step in (*STEPS, REST)
    ]
    total = {name: sum(steps.values()) for name, steps in found.items()}
    rows.append({"step": "sum"} | {f"{name} [s per case]": f"{seconds:.2f}" for name, seconds in total.items()})
    print(table(rows))
    print(f"{megabytes:.0f} MB per case of {a.slices} x {a.width} x {a.width} voxels")
    for name, seconds in total.items():
        print(
            f"10,000 such cases, {name}: {10_000 * seconds / 3600:.0f} hours of one process, {megabytes / 100:.2f} TB"
        )


if __name__ == "__main__":
    main()
