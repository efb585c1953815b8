"""``hyspark_nnunet plan`` and ``hyspark_nnunet plan_and_preprocess``: nnU-Net's steps with HySparKPlanner.

nnU-Net's own commands find planners (``-pl``) only in nnU-Net's package, so these commands call the same functions with
our class.
"""

import argparse
import functools
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiment_dataset,
)

from hyspark_nnunet.commands.plan_options import PREPROCESSOR
from hyspark_nnunet.commands.preprocess import preprocess_configurations
from hyspark_nnunet.planning.fingerprint import extract_sampled_fingerprint
from hyspark_nnunet.planning.like import plan_like, source_plans_of
from hyspark_nnunet.planning.planner import HySparKPlanner


def plan(arguments: argparse.Namespace) -> str:
    """Extracts missing fingerprints, then writes plans.

    Returns:
        name of the plans.

    Raises:
        ValueError: options that contradict each other.
    """
    a = arguments
    if a.like is not None and (a.overwrite_target_spacing is not None or a.preprocessor_name != PREPROCESSOR):
        raise ValueError(
            f"--like copies spacing and preprocessor from dataset {a.like}: omit -overwrite_target_spacing and "
            "-preprocessor_name, or plan that dataset with them"
        )
    if a.like is None and a.like_plans is not None:
        raise ValueError(f"-like_plans {a.like_plans} names plans of another dataset: name that dataset with --like")
    # first, because fingerprints take long
    source = None if a.like is None else source_plans_of(a.like, a.preset, a.like_plans)
    if a.fingerprint_cases is None:
        extract_fingerprints(
            a.d, a.fpe, a.npfp, a.verify_dataset_integrity, a.clean, a.verbose, show_progress_bar=not a.no_pbar
        )
    else:
        for dataset in a.d:
            extract_sampled_fingerprint(
                dataset, a.fpe, a.fingerprint_cases, a.npfp, a.verify_dataset_integrity, a.clean, not a.no_pbar
            )
    names = [_plan_dataset(dataset, a, source) for dataset in a.d]
    print(
        f"Train with -p {names[0]} and HySparKPretrainTrainer or HySparKFinetuneTrainer. nnUNetTrainer trains the "
        "segmentation network from scratch."
    )
    return names[0]


def plan_and_preprocess(arguments: argparse.Namespace) -> int:
    """Runs ``plan``, then ``preprocess``; cases that do not fit the new plans are replaced, as by nnU-Net's command.

    Returns:
        exit status: 1 if a case could not be preprocessed.
    """
    a = arguments
    name = plan(a)
    status = 0
    for dataset in [] if a.no_pp else a.d:
        status |= preprocess_configurations(
            str(dataset),
            name,
            a.c,
            a.np,
            skip_unplanned=True,
            replace_stale=True,
            overwrite=a.overwrite,
            skip_bad=a.skip_bad,
            show_progress=not a.no_pbar,
        )
    return status


def _plan_dataset(dataset: int, a: argparse.Namespace, source: dict[str, Any] | None) -> str:
    if source is not None:
        target = {"gpu_memory_target_in_gb": a.gpu_memory_target, "preset": _preset_of(source, a.preset)}
        return plan_like(HySparKPlanner(dataset, **target), source, a.overwrite_plans_name)
    _, name = plan_experiment_dataset(
        dataset,
        functools.partial(HySparKPlanner, preset=a.preset),
        a.gpu_memory_target,
        a.preprocessor_name,
        a.overwrite_target_spacing,
        a.overwrite_plans_name,
    )
    return name


def _preset_of(source: dict, preset: str) -> str:
    """The preset of plans that HySparKPlanner made; else the one that was given."""
    for configuration in source["configurations"].values():
        if "preset" in (configuration.get("hyspark") or {}):
            return configuration["hyspark"]["preset"]
    return preset
