"""The datasets of the benchmark, preprocessed, with plans and folds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.few_labels.commands import Commands, alone
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.spacing import dice_of_resampled_labels
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.work import Work
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.planning.planner import PLANS_NAME

LABELLED, UNLABELLED = "Dataset001_Labelled", "Dataset002_Unlabelled"
LABELLED_ID, UNLABELLED_ID = "1", "2"
CONFIGURATION = "3d_fullres"
# nnU-Net's own plans, and those with our patch and batch
NNUNET_PLANS, STOCK_PLANS = "nnUNetPlans", "nnUNetFewLabelsPlans"
LIKE = "Like001"  # of plans of the unlabelled dataset
# beginnings of what a plan says on how data are preprocessed
DATA_KEYS = ("spacing", "preprocessor", "normalization", "use_mask", "resampling")
RUN = "prepare"  # name of the log


def hyspark_plans(settings: Settings) -> str:
    """Plans of the labelled dataset for HySparK's arms."""
    return PLANS_NAME[settings.preset]


def prepare(commands: Commands, settings: Settings, data: Path) -> Splits:
    """Makes the datasets once; starts again after an interruption.

    Args:
        commands: of the work folder; their threads are processes of nnU-Net's preprocessing here.
        settings: preset, spacing and batches.
        data: a dataset in nnU-Net's raw layout, with ``splits.json``.

    Returns:
        who is who in the work folder.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: the work folder has other data, or stock nnU-Net's network does not fit our patch.
    """
    work, source = commands.work, data / "splits.json"
    with alone(work, RUN, wait=True) as lock:
        if not source.is_file():
            raise FileNotFoundError(f"no {source}: --data is a dataset in nnU-Net's raw layout with splits.json")
        splits = Splits.read(source)
        if work.prepared_file.is_file():
            if Splits.read(work.splits_file) != splits:
                raise ValueError(f"{work.root} was begun with another splits.json than {source}: take another --work")
            return splits
        _prepare(commands, settings, data, splits, lock)
        return splits


def _prepare(commands: Commands, settings: Settings, data: Path, splits: Splits, lock: int | None) -> None:
    work, description = commands.work, _read(data / "dataset.json")
    print(
        f"prepare: {len(splits.pretrain)} scans without labels, {len(splits.all_labelled)} with, "
        f"{len(splits.validation)} for validation",
        flush=True,
    )
    raw, cases = work.raw / LABELLED, [*splits.all_labelled, *splits.validation]
    label, scans = description["file_ending"], work.root / "scans"
    image = f"_[0-9][0-9][0-9][0-9]{label}"
    _copy(data / "imagesTr", raw / "imagesTr", cases, image)
    _copy(data / "imagesTr", scans, splits.pretrain, image)
    _copy(data / "labelsTr", raw / "labelsTr", cases, label)
    _copy(data / "labelsTr", work.validation_labels, splits.validation, label)
    _write(raw / "dataset.json", description | {"numTraining": len(cases)})
    shutil.copy(data / "splits.json", work.splits_file)

    # nnU-Net's planner does not take 0 loader processes
    variables, np = {"nnUNet_n_proc_DA": "1"}, ("-np", str(commands.threads))
    spacing = ("-overwrite_target_spacing", *settings.spacing.split()) if settings.spacing else ()
    ours = ("-preset", settings.preset, "-c", CONFIGURATION, "-npfp", np[1], *np, "--no_pbar")
    channels = [description["channel_names"][key] for key in sorted(description["channel_names"], key=int)]
    named = ("-d", UNLABELLED_ID, "-n", UNLABELLED[11:], "--channels", *channels, *np, "--overwrite")
    for command in (
        ("hyspark_nnunet", "dataset", "prepare", str(scans), *named),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", LABELLED_ID, *ours, *spacing),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", UNLABELLED_ID, "--like", LABELLED_ID, *ours),
        ("nnUNetv2_plan_experiment", "-d", LABELLED_ID, *spacing),
    ):
        commands.run(RUN, command, variables, lock=lock)
    folder, unlabelled = work.preprocessed / LABELLED, work.preprocessed / UNLABELLED
    _write(folder / "splits_final.json", splits.folds())
    plans, like = _read(folder / f"{hyspark_plans(settings)}.json"), hyspark_plans(settings) + LIKE
    stock = with_patch_and_batch(_read(folder / f"{NNUNET_PLANS}.json"), plans, settings.finetune_batch)
    _write(folder / f"{STOCK_PLANS}.json", stock)
    spark = with_network_of(_read(unlabelled / f"{like}.json"), stock)
    _write(unlabelled / f"{STOCK_PLANS}{LIKE}.json", spark)
    planned = {
        "pre-training": _read(unlabelled / f"{like}.json"),
        "pre-trained and scratch": plans,
        "SparK pre-training": spark,
        "stock": stock,
    }
    prepared: dict[str, Any] = {name: each["configurations"][CONFIGURATION] for name, each in planned.items()}
    ceiling = dice_of_resampled_labels(work.validation_labels, spacing_of_files(stock))
    print(f"prepare: at this spacing, a perfect network reaches Dice {100 * ceiling:.1f}", flush=True)
    _write(work.prepared_file, prepared | {"Dice of resampled labels": ceiling})


def spacing_of_files(plans: Mapping[str, Any]) -> list[float]:
    """The target spacing for the axes of the files; plans name it for their transposed axes."""
    spacing = plans["configurations"][CONFIGURATION]["spacing"]
    return [spacing[axis] for axis in plans["transpose_backward"]]


def with_patch_and_batch(stock: dict[str, Any], ours: dict[str, Any], batch: int) -> dict[str, Any]:
    """nnU-Net's plans with our preprocessed data and patch, and this batch; the network stays nnU-Net's.

    Raises:
        ValueError: nnU-Net's network does not fit the patch, or the data would be preprocessed differently.
    """
    plans = json.loads(json.dumps(stock)) | {"plans_name": STOCK_PLANS}
    configuration, model = plans["configurations"][CONFIGURATION], ours["configurations"][CONFIGURATION]
    for key, value in configuration.items():
        if key.startswith(DATA_KEYS) and value != model[key]:
            raise ValueError(f"nnU-Net's plans have {key} {value}, ours {model[key]}: arms must train on the same data")
    strides = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0).tolist()
    if any(size % stride for size, stride in zip(model["patch_size"], strides, strict=True)):
        raise ValueError(
            f"our patch {model['patch_size']} is no multiple of the strides {strides} of nnU-Net's network: take "
            "another preset or spacing"
        )
    data = {key: model[key] for key in ("data_identifier", "patch_size")}
    configuration |= {**data, "batch_size": batch}
    return plans


def with_network_of(plans: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Plans of the unlabelled dataset with nnU-Net's network: SparK pre-trains on the same patches as HySparK."""
    found = json.loads(json.dumps(plans)) | {"plans_name": STOCK_PLANS + LIKE}
    configuration = found["configurations"][CONFIGURATION]
    configuration["architecture"] = stock["configurations"][CONFIGURATION]["architecture"]
    del configuration["hyspark"]  # the preset, which nnU-Net's network has not
    return found


def write_plans(work: Work, dataset: str, source: str, name: str, network: Mapping[str, Any]) -> None:
    """Plans beside those of ``source`` whose network has other arguments; nothing where none differs.

    Args:
        work: where the dataset is preprocessed.
        dataset: name of the dataset.
        source: name of its plans.
        name: of the plans that are written.
        network: arguments that differ, by name.
    """
    if not network:
        return
    plans = _read(work.preprocessed / dataset / f"{source}.json") | {"plans_name": name}
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"] |= network
    _write(work.preprocessed / dataset / f"{name}.json", plans)


def _copy(source: Path, target: Path, cases: Sequence[str], ending: str) -> None:
    """The files of these cases and no others.

    Raises:
        FileNotFoundError: a case has none.
    """
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for case in cases:
        files = sorted(source.glob(case + ending))
        if not files:
            raise FileNotFoundError(f"splits.json names {case}, but there is no {source / (case + ending)}")
        for file in files:
            shutil.copy(file, target)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    with replacing(file) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
