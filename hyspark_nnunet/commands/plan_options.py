"""Options of the planning commands. Options that nnU-Net's commands also have, have the same names and meanings."""

import argparse
from typing import Any

PRESETS = ("S", "B", "L")
PREPROCESSOR = "DefaultPreprocessor"


def add_plan_commands(commands: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Adds the parsers of ``plan`` and ``plan_and_preprocess``; the caller sets the functions that run them."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="datasets")
    shared.add_argument(
        "-p",
        dest="plans",
        metavar="NAME",
        help="plans of nnU-Net that exist, such as nnUNetResEncUNetLPlans: keep their network and add SparK's batch of "
        "pre-training; with --like: of that dataset",
    )
    shared.add_argument("-preset", default="B", choices=PRESETS, help="size of the network (default: %(default)s)")
    shared.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="memory of the GPU (default: 8, 24, 40 for S, B, L; with -p that of its planner)",
    )
    shared.add_argument(
        "--like",
        metavar="ID or FILE",
        help="copy strides, kernels, patch size and spacing from the plans of this dataset or of this checkpoint",
    )
    shared.add_argument("-like_plans", metavar="NAME", help="name of its plans (default: that of the preset)")
    shared.add_argument("-overwrite_plans_name", metavar="NAME", help="name of the plans (default: that of the preset)")
    shared.add_argument(
        "-overwrite_target_spacing", nargs=3, type=float, metavar="MM", help="target spacing of 3d_fullres"
    )
    shared.add_argument("-preprocessor_name", default=PREPROCESSOR, help="a preprocessor of nnU-Net")
    shared.add_argument("-fpe", default="DatasetFingerprintExtractor", help="a fingerprint extractor of nnU-Net")
    shared.add_argument(
        "--fingerprint-cases", type=int, metavar="N", help="fingerprint of N random cases (default: of all)"
    )
    shared.add_argument("-npfp", type=int, default=8, metavar="N", help="processes for the fingerprint")
    shared.add_argument("--verify_dataset_integrity", action="store_true", help="check the dataset first")
    shared.add_argument("--clean", action="store_true", help="extract fingerprints again")
    shared.add_argument("--verbose", action="store_true", help="print more")
    shared.add_argument("--no_pbar", action="store_true", help="no progress bar")
    plan = commands.add_parser(
        "plan",
        parents=[shared],
        help="make plans for HySparK, or add the batch of SparK's pre-training to nnU-Net's plans",
        description="Writes plans with HySparKUNet as network, and patch and batch sizes for its memory in "
        "pre-training and fine-tuning. Extracts missing fingerprints. With -p: adds the batch of pre-training by SparK "
        "to nnU-Net's plans.",
    )
    both = commands.add_parser(
        "plan_and_preprocess",
        parents=[shared],
        help="plan, then preprocess",
        description="nnUNetv2_plan_and_preprocess with HySparK's planner.",
    )
    both.add_argument("--no_pp", action="store_true", help="only plan")
    both.add_argument(
        "-c", nargs="+", default=["2d", "3d_fullres", "3d_lowres"], help="configurations (default: %(default)s)"
    )
    add_preprocessing_options(both)
    return plan, both


def add_preprocess_command(commands: Any) -> argparse.ArgumentParser:
    """Adds ``preprocess``; the caller sets what runs it."""
    parser = commands.add_parser(
        "preprocess",
        help="nnU-Net's preprocessing, resumed where it ended and divided among machines",
        description="Preprocesses the cases that are not done, by nnU-Net's own code and into its own folder. "
        "Interrupt it at any time; the same command continues.",
    )
    parser.add_argument("-d", dest="dataset", required=True, help="dataset (number or name)")
    parser.add_argument(
        "-c", nargs="+", default=["3d_fullres"], dest="configurations", help="configurations (default: %(default)s)"
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("--part", default="1/1", metavar="N/OF", help="only this part of the cases: 3/16")
    add_preprocessing_options(parser)
    return parser


def add_preprocessing_options(parser: argparse.ArgumentParser) -> None:
    """Options of both commands that preprocess."""
    parser.add_argument("-np", type=int, nargs="+", help="number of processes, or one number per configuration")
    parser.add_argument("--overwrite", action="store_true", help="preprocess cases again that are done")
    parser.add_argument("--skip-bad", action="store_true", help="exit status 0 even if cases cannot be preprocessed")
