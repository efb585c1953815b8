"""The words of the planning commands; those that nnU-Net's commands have, too, are spelt and mean the same."""

import argparse
from typing import Any

PRESETS = ("S", "B", "L")
PREPROCESSOR = "DefaultPreprocessor"


def add_plan_commands(commands: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Adds ``plan`` and ``plan_and_preprocess``; the caller sets what runs them."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="data sets")
    shared.add_argument("-preset", default="B", choices=PRESETS, help="size of the network (default: %(default)s)")
    shared.add_argument(
        "-gpu_memory_target", type=float, metavar="GB", help="memory of the GPU (default: 8, 24, 40 for S, B, L)"
    )
    shared.add_argument(
        "--like", metavar="ID", help="take strides, kernels, patch and spacing from the plans of this data set"
    )
    shared.add_argument("-like_plans", metavar="NAME", help="which plans of it (default: those of the preset)")
    shared.add_argument("-overwrite_plans_name", metavar="NAME", help="name of the plans (default: that of the preset)")
    shared.add_argument(
        "-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="target spacing of 3d_fullres"
    )
    shared.add_argument("-preprocessor_name", default=PREPROCESSOR, help="a preprocessor of nnU-Net")
    shared.add_argument("-fpe", default="DatasetFingerprintExtractor", help="a fingerprint extractor of nnU-Net")
    shared.add_argument("-npfp", type=int, default=8, metavar="N", help="processes for the fingerprint")
    shared.add_argument("--verify_dataset_integrity", action="store_true", help="check the data set first")
    shared.add_argument("--clean", action="store_true", help="extract fingerprints anew")
    shared.add_argument("--verbose", action="store_true", help="say more")
    shared.add_argument("--no_pbar", action="store_true", help="no progress bar")
    plan = commands.add_parser(
        "plan",
        parents=[shared],
        help="plans for HySparK: patch and batch sizes that fit its memory",
        description="Writes plans that name HySparKUNet, patch and batch sizes chosen for its memory in pre-training "
        "and fine-tuning; extracts the fingerprint where it is missing.",
    )
    both = commands.add_parser(
        "plan_and_preprocess",
        parents=[shared],
        help="the same, and nnU-Net's preprocessing",
        description="nnUNetv2_plan_and_preprocess with HySparK's planner.",
    )
    both.add_argument("--no_pp", action="store_true", help="plan only")
    both.add_argument(
        "-c", nargs="+", default=["2d", "3d_fullres", "3d_lowres"], help="configurations (default: %(default)s)"
    )
    both.add_argument("-np", type=int, nargs="+", help="processes: one number, or one per configuration")
    return plan, both
