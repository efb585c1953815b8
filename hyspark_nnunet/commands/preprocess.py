"""``hyspark_nnunet preprocess``: nnU-Net's preprocessing that can be interrupted, resumed and divided."""

import argparse
from collections.abc import Sequence
from typing import Any

from hyspark_nnunet.datasets.dataset_json import raw_folder
from hyspark_nnunet.datasets.preprocessed import plans_in, preprocessed_folder
from hyspark_nnunet.preprocessing.parts import parse_part
from hyspark_nnunet.preprocessing.preprocess import PreprocessOptions, preprocess

# of nnUNetv2_preprocess
PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}


def preprocess_configurations(
    dataset: str,
    plans: str,
    configurations: Sequence[str],
    processes: Sequence[int] | None,
    skip_unplanned: bool = False,
    **options: Any,
) -> int:
    """Preprocesses a dataset for several configurations.

    Args:
        dataset: number or name.
        plans: name of the plans.
        configurations: names.
        processes: one number, or one per configuration; None: those of nnU-Net.
        skip_unplanned: pass over configurations that are not in the plans, as nnU-Net does.
        options: others of ``PreprocessOptions``.

    Returns:
        exit status: 1 if a case failed that ``skip_bad`` does not accept.

    Raises:
        ValueError: neither one number of processes nor one per configuration; further see ``preprocess``.
    """
    counts = [PROCESSES.get(name, 4) for name in configurations] if processes is None else list(processes)
    if len(counts) == 1:
        counts *= len(configurations)
    if len(counts) != len(configurations):
        raise ValueError(
            f"-np has {len(counts)} numbers for {len(configurations)} configurations: give one, or one each"
        )
    folder = preprocessed_folder(dataset)
    raw = raw_folder() / folder.name
    planned = dict(plans_in(folder)).get(plans, {"configurations": {}})["configurations"]
    status = 0
    for name, count in zip(configurations, counts, strict=True):
        if skip_unplanned and name not in planned:
            print(f"{plans} has no configuration {name}: nothing to preprocess")
            continue
        status |= preprocess(raw, folder, plans, name, PreprocessOptions(processes=count, **options))
    return status


def run_preprocess(arguments: argparse.Namespace) -> int:
    """The command."""
    a = arguments
    return preprocess_configurations(
        a.dataset,
        a.plans,
        a.configurations,
        a.np,
        part=parse_part(a.part),
        overwrite=a.overwrite,
        skip_bad=a.skip_bad,
    )
