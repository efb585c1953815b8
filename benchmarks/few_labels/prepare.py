"""The datasets of the benchmark, preprocessed, with plans and folds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.few_labels.commands import Commands, alone
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.work import Work
from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.planning.planner import PLANS_NAME

LABELLED, UNLABELLED = "Dataset006_Hippocampus", "Dataset060_HippocampusScans"
LABELLED_ID, UNLABELLED_ID = "6", "60"
# the labelled cases without those of the validation, for the probe of the pre-training
PROBED, PROBED_ID = "Dataset020_HippocampusProbe", "20"
CONFIGURATION = "3d_fullres"
# nnU-Net's own plans, and those with our patch and batch
NNUNET_PLANS, STOCK_PLANS = "nnUNetPlans", "nnUNetFewLabelsPlans"
RUN = "prepare"  # name of the log


def hyspark_plans(settings: Settings) -> str:
    """Plans of the labelled dataset for our arms."""
    return PLANS_NAME[settings.preset]


def pretraining_plans(settings: Settings) -> str:
    """Plans of the unlabelled dataset, with the topology of ``hyspark_plans``."""
    return f"{hyspark_plans(settings)}Like{LABELLED[7:10]}"


def prepare(commands: Commands, settings: Settings, data: Path) -> None:
    """Makes the datasets once; starts again after an interruption.

    Args:
        commands: of the work folder; their threads are processes of nnU-Net's preprocessing here.
        settings: preset and batch.
        data: folder that holds ``hippocampus``, in nnU-Net's raw layout, with ``splits.json``.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: stock nnU-Net's network does not fit our patch, or another benchmark is at it.
    """
    with alone(commands.work, RUN) as lock:
        if commands.work.prepared_file.is_file():
            return
        if lock is None:
            raise ValueError(f"{commands.work.root} is being prepared by another benchmark: wait until it has finished")
        _prepare(commands, settings, data, lock)


def _prepare(commands: Commands, settings: Settings, data: Path, lock: int) -> None:
    work, source = commands.work, data / "hippocampus"
    if not source.is_dir():
        raise FileNotFoundError(f"no hippocampus data at {source}: give the folder that holds them with --data")
    splits = Splits.read(source / "splits.json")
    print(
        f"prepare: {len(splits.pretrain)} scans without labels, {len(splits.labelled[20])} with, "
        f"{len(splits.validation)} for validation",
        flush=True,
    )
    labelled = splits.labelled[20]
    _copy_labelled(source, work.raw / LABELLED, [*labelled, *splits.validation])
    _copy_labelled(source, work.raw / PROBED, labelled)
    scans = _copy(source / "imagesTr", work.root / "scans", [f"{case}_0000" for case in splits.pretrain])
    _copy(source / "labelsTr", work.validation_labels, splits.validation)

    # nnU-Net's planner does not take 0 loader processes
    variables, np = {"nnUNet_n_proc_DA": "1"}, ("-np", str(commands.threads))
    ours = ("-preset", settings.preset, "-c", CONFIGURATION, "-npfp", np[1], *np, "--no_pbar")
    named = ("-d", UNLABELLED_ID, "-n", UNLABELLED[11:], "--channels", _channel(source), *np, "--overwrite")
    for command in (
        ("hyspark_nnunet", "dataset", "prepare", str(scans), *named),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", LABELLED_ID, *ours),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", UNLABELLED_ID, "--like", LABELLED_ID, *ours),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", PROBED_ID, "--like", LABELLED_ID, *ours),
        ("nnUNetv2_plan_experiment", "-d", LABELLED_ID),
    ):
        commands.run(RUN, command, variables, lock=lock)
    folder = work.preprocessed / LABELLED
    _write(folder / "splits_final.json", splits.folds())
    plans = _read(folder / f"{hyspark_plans(settings)}.json")
    stock = with_patch_and_batch(_read(folder / f"{NNUNET_PLANS}.json"), plans, settings.finetune_batch)
    _write(folder / f"{STOCK_PLANS}.json", stock)
    _write(
        work.prepared_file,
        {
            "pre-training": described(
                _read(work.preprocessed / UNLABELLED / f"{pretraining_plans(settings)}.json"), settings.pretrain_batch
            ),
            "pre-trained and scratch": described(plans, settings.finetune_batch),
            "stock": described(stock, settings.finetune_batch),
        },
    )


def with_patch_and_batch(stock: dict[str, Any], ours: dict[str, Any], batch: int) -> dict[str, Any]:
    """nnU-Net's plans with the patch of ours and this batch; the network stays nnU-Net's.

    Raises:
        ValueError: nnU-Net's network does not fit the patch, or the preprocessed data differ.
    """
    plans = json.loads(json.dumps(stock)) | {"plans_name": STOCK_PLANS}
    configuration, model = plans["configurations"][CONFIGURATION], ours["configurations"][CONFIGURATION]
    if configuration["data_identifier"] != model["data_identifier"]:
        raise ValueError(
            f"nnU-Net's plans want the data {configuration['data_identifier']}, ours {model['data_identifier']}: the "
            "arms must train on the same"
        )
    for axis, size in enumerate(model["patch_size"]):
        stride = 1
        for strides in configuration["architecture"]["arch_kwargs"]["strides"]:
            stride *= strides[axis]
        if size % stride:
            raise ValueError(
                f"nnU-Net's network has stride {stride} on axis {axis}, of which our patch {model['patch_size']} is no "
                "multiple: take another preset"
            )
    configuration |= {"patch_size": model["patch_size"], "batch_size": batch}
    return plans


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


def described(plans: dict[str, Any], batch: int) -> dict[str, Any]:
    """What a reader wants to know of plans."""
    configuration = plans["configurations"][CONFIGURATION]
    architecture = configuration["architecture"]
    return {
        "plans": plans["plans_name"],
        "network": architecture["network_class_name"],
        "patch_size": configuration["patch_size"],
        "batch_size": batch,
        "planned_batch_size": configuration["batch_size"],
        "batch_dice": configuration["batch_dice"],
        "spacing": configuration["spacing"],
        "strides": architecture["arch_kwargs"]["strides"],
        "kernel_sizes": architecture["arch_kwargs"]["kernel_sizes"],
        "features_per_stage": architecture["arch_kwargs"]["features_per_stage"],
    }


def _copy_labelled(source: Path, target: Path, cases: Sequence[str]) -> None:
    _copy(source / "imagesTr", target / "imagesTr", [f"{case}_0000" for case in cases])
    _copy(source / "labelsTr", target / "labelsTr", cases)
    _write(target / "dataset.json", _read(source / "dataset.json") | {"numTraining": len(cases)})


def _copy(source: Path, target: Path, names: Sequence[str]) -> Path:
    """These scans and no others."""
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in names:
        shutil.copy(source / f"{name}.nii.gz", target)
    return target


def _channel(source: Path) -> str:
    return _read(source / "dataset.json")["channel_names"]["0"]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    with replacing(file) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
