"""``hyspark_nnunet plan`` and ``hyspark_nnunet plan_and_preprocess``: nnU-Net's steps with HySparKPlanner.

nnU-Net's own commands find planners (``-pl``) only in nnU-Net's package, so these commands call the same functions with
our class.
"""

import argparse
import functools
from typing import TYPE_CHECKING, Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiment_dataset,
)

from hyspark_nnunet.commands.plan_options import PREPROCESSOR
from hyspark_nnunet.commands.preprocess import preprocess_configurations
from hyspark_nnunet.planning.batch_planner import BatchPlanner
from hyspark_nnunet.planning.fingerprint import extract_sampled_fingerprint
from hyspark_nnunet.planning.like import existing_plans, is_file, plan_like, source_plans_of
from hyspark_nnunet.planning.planner import HySparKPlanner

if TYPE_CHECKING:
    from hyspark_nnunet.planning.file_plans import FilePlans
    from hyspark_nnunet.planning.spark import SparKPlanner


def plan(arguments: argparse.Namespace) -> str:
    """Extracts missing fingerprints, then writes plans.

    Returns:
        name of the plans.

    Raises:
        ValueError: options that contradict each other.
    """
    a = arguments
    _refuse_contradictions(a)
    # first, because fingerprints take long
    file, sources = None, {}
    if a.like is not None and is_file(a.like):
        file = _plans_of_file(a)
    elif a.like is not None:
        sources = dict.fromkeys(a.d, source_plans_of(a.like, a.preset, a.plans or a.like_plans))
    elif a.plans is not None:
        sources = {dataset: existing_plans(dataset, a.plans) for dataset in a.d}
    if a.fingerprint_cases is None:
        extract_fingerprints(
            a.d, a.fpe, a.npfp, a.verify_dataset_integrity, a.clean, a.verbose, show_progress_bar=not a.no_pbar
        )
    else:
        for dataset in a.d:
            extract_sampled_fingerprint(
                dataset, a.fpe, a.fingerprint_cases, a.npfp, a.verify_dataset_integrity, a.clean, not a.no_pbar
            )
    if file is not None:
        names = [_plan_like_file(dataset, a, file) for dataset in a.d]
    else:
        names = [_plan_dataset(dataset, a, sources.get(dataset)) for dataset in a.d]
    method = "SparK" if a.plans is not None or file is not None and file.preset is None else "HySparK"
    print(
        f"Train with -p {names[0]} and {method}PretrainTrainer or {method}FinetuneTrainer. nnUNetTrainer trains the "
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


def _refuse_contradictions(a: argparse.Namespace) -> None:
    copied = a.overwrite_target_spacing is not None or a.preprocessor_name != PREPROCESSOR
    if a.like is not None and is_file(a.like):
        if names := [f"{option} {name}" for option, name in (("-p", a.plans), ("-like_plans", a.like_plans)) if name]:
            raise ValueError(f"--like {a.like} is a file, which says its own network: omit {' and '.join(names)}")
        return
    if a.like is not None and copied:
        raise ValueError(
            f"--like copies spacing and preprocessor from dataset {a.like}: omit -overwrite_target_spacing and "
            "-preprocessor_name, or plan that dataset with them"
        )
    if a.like is None and a.like_plans is not None:
        raise ValueError(f"-like_plans {a.like_plans} names plans of another dataset: name that dataset with --like")
    if a.plans is not None and a.like_plans is not None:
        raise ValueError(
            f"-p {a.plans} and -like_plans {a.like_plans} both name plans of dataset {a.like}: give -p for nnU-Net's "
            "network and SparK, or -like_plans for HySparK's batch sizes"
        )
    if a.plans is not None and a.like is None and (copied or a.overwrite_plans_name is not None):
        raise ValueError(
            f"-p {a.plans} changes nothing in these plans but the batch of pre-training: omit "
            "-overwrite_target_spacing, -preprocessor_name and -overwrite_plans_name, or give them to nnU-Net's planner"
        )


def _plan_dataset(dataset: int, a: argparse.Namespace, source: dict[str, Any] | None) -> str:
    if source is None:
        _, name = plan_experiment_dataset(
            dataset,
            functools.partial(HySparKPlanner, preset=a.preset),
            a.gpu_memory_target,
            a.preprocessor_name,
            a.overwrite_target_spacing,
            a.overwrite_plans_name,
        )
        return name
    if a.plans is None:
        target = {"gpu_memory_target_in_gb": a.gpu_memory_target, "preset": _preset_of(source, a.preset)}
        return plan_like(HySparKPlanner(dataset, **target), source, a.overwrite_plans_name)
    planner = _spark_planner(dataset, source, a.gpu_memory_target)
    if a.like is not None:
        return plan_like(planner, source, a.overwrite_plans_name)
    print(planner.add_pretraining_batches(source))
    return a.plans


def _plans_of_file(a: argparse.Namespace) -> "FilePlans":
    # here, as below: planning without a file need not wait for what reads checkpoints
    from hyspark_nnunet.planning.file_plans import FilePlans

    file, given = FilePlans(a.like), []
    if file.says_spacing and a.overwrite_target_spacing is not None:
        given.append("-overwrite_target_spacing")
    if file.plans is not None and a.preprocessor_name != PREPROCESSOR:
        given.append("-preprocessor_name")
    if given:
        raise ValueError(f"--like copies them from {file.file}: omit {' and '.join(given)}")
    return file


def _plan_like_file(dataset: int, a: argparse.Namespace, file: "FilePlans") -> str:
    planner: BatchPlanner
    if file.preset is not None:
        planner = HySparKPlanner(dataset, a.gpu_memory_target, preset=file.preset)
    else:
        target = a.gpu_memory_target or file.memory_target
        new = (a.preprocessor_name, a.overwrite_target_spacing)
        planner = _spark_planner(dataset, file.plans or {}, target, *new)
    return plan_like(planner, file.for_dataset(planner), a.overwrite_plans_name or file.plans_name, file.file)


def _spark_planner(dataset: int, plans: dict[str, Any], target: float | None, *more: Any) -> "SparKPlanner":
    # here: it imports the trainers, which takes seconds that HySparK's plans do not need
    from hyspark_nnunet.planning.spark import SparKPlanner, memory_target_of

    return SparKPlanner(dataset, memory_target_of(plans, target), *more)


def _preset_of(source: dict, preset: str) -> str:
    """The preset of plans that HySparKPlanner made; else the one that was given."""
    for configuration in source["configurations"].values():
        if "preset" in (configuration.get("hyspark") or {}):
            return configuration["hyspark"]["preset"]
    return preset
