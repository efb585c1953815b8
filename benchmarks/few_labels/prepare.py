"""The datasets of the benchmark, preprocessed, with plans and folds."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.subsets import Splits
from benchmarks.few_labels.work import Work, read_json, write_json
from hyspark_nnunet.planning.planner import PLANS_NAME

LABELLED, UNLABELLED = "Dataset001_Labelled", "Dataset002_Unlabelled"
CONFIGURATION = "3d_fullres"
# nnU-Net's own plans, those with our patch and batch, and the suffix of plans of the unlabelled dataset
NNUNET_PLANS, STOCK_PLANS, LIKE = "nnUNetPlans", "nnUNetFewLabelsPlans", "Like001"
# beginnings of what a plan says on how data are preprocessed
DATA_KEYS = ("spacing", "preprocessor", "normalization", "use_mask", "resampling")


def prepare(work: Work, settings: Settings, data: Path) -> Splits:
    """Makes the datasets once; starts again after an interruption.

    Args:
        work: the folder; its threads are processes of nnU-Net's preprocessing here.
        settings: preset, spacing and batches.
        data: a dataset in nnU-Net's raw layout, with ``splits.json``.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: the work folder has other data, or stock nnU-Net's network does not fit our patch.
    """
    source = data / "splits.json"
    with work.alone("prepare", wait=True) as lock:
        if not source.is_file():
            raise FileNotFoundError(f"no {source}: --data is a dataset in nnU-Net's raw layout with splits.json")
        splits = Splits.read(source)
        if not work.prepared_file.is_file():
            _prepare(work, settings, data, splits, lock)
        elif Splits.read(work.splits_file) != splits:
            raise ValueError(f"{work.root} was begun with another splits.json than {source}: take another --work")
        return splits


def _prepare(work: Work, settings: Settings, data: Path, splits: Splits, lock: int | None) -> None:
    description, cases = read_json(data / "dataset.json"), [*splits.all_labelled, *splits.validation]
    counts = len(splits.pretrain), len(splits.all_labelled), len(splits.validation)
    print("prepare: {} scans without labels, {} with, {} for validation".format(*counts), flush=True)
    raw, scans, ending = work.raw / LABELLED, work.root / "scans", description["file_ending"]
    _copy(data / "imagesTr", raw / "imagesTr", cases, f"_[0-9][0-9][0-9][0-9]{ending}")
    _copy(data / "imagesTr", scans, splits.pretrain, f"_[0-9][0-9][0-9][0-9]{ending}")
    _copy(data / "labelsTr", raw / "labelsTr", cases, ending)
    write_json(raw / "dataset.json", description | {"numTraining": len(cases)})
    shutil.copy(data / "splits.json", work.splits_file)

    # nnU-Net's planner does not take 0 loader processes
    variables, threads = {"nnUNet_n_proc_DA": "1"}, str(work.threads)
    spacing = ("-overwrite_target_spacing", *settings.spacing.split()) if settings.spacing else ()
    options = ("-preset", settings.preset, "-c", CONFIGURATION, "-npfp", threads, "-np", threads, "--no_pbar")
    channels = [description["channel_names"][key] for key in sorted(description["channel_names"], key=int)]
    named = ("-d", "2", "-n", UNLABELLED[11:], "--channels", *channels, "-np", threads, "--overwrite")
    for command in (
        ("hyspark_nnunet", "dataset", "prepare", str(scans), *named),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", "1", *options, *spacing),
        ("hyspark_nnunet", "plan_and_preprocess", "-d", "2", "--like", "1", *options),
        ("nnUNetv2_plan_experiment", "-d", "1", *spacing),
    ):
        work.run("prepare", command, variables, lock=lock)
    folder, unlabelled, ours = work.preprocessed / LABELLED, work.preprocessed / UNLABELLED, PLANS_NAME[settings.preset]
    write_json(folder / "splits_final.json", splits.folds())
    plans, like = read_json(folder / f"{ours}.json"), read_json(unlabelled / f"{ours}{LIKE}.json")
    stock = with_patch_and_batch(read_json(folder / f"{NNUNET_PLANS}.json"), plans, settings.finetune_batch)
    write_json(folder / f"{STOCK_PLANS}.json", stock)
    spark = with_network_of(like, stock)
    write_json(unlabelled / f"{STOCK_PLANS}{LIKE}.json", spark)
    planned = {"pre-training": like, "pre-trained and scratch": plans, "SparK pre-training": spark, "stock": stock}
    prepared: dict[str, Any] = {name: each["configurations"][CONFIGURATION] for name, each in planned.items()}
    labels = [raw / "labelsTr" / f"{case}{ending}" for case in splits.validation]
    ceiling = dice_of_resampled_labels(labels, spacing_of_files(stock))
    print(f"prepare: at this spacing, a perfect network reaches Dice {100 * ceiling:.1f}", flush=True)
    write_json(work.prepared_file, prepared | {"Dice of resampled labels": ceiling})


def spacing_of_files(plans: Mapping[str, Any]) -> list[float]:
    """The target spacing for the axes of the files; plans name it for their transposed axes."""
    spacing = plans["configurations"][CONFIGURATION]["spacing"]
    return [spacing[axis] for axis in plans["transpose_backward"]]


def dice_of_resampled_labels(files: Sequence[Path], spacing: Sequence[float]) -> float:
    """The Dice that a perfect network of this spacing reaches at the scans' own spacing.

    Each label is resampled there and back by nnU-Net's linear interpolation, as the network's output is.

    Args:
        files: labels.
        spacing: in mm, for the axes as nnU-Net reads them, before its plan transposes them.

    Returns:
        the mean over labels of the mean over cases.

    Raises:
        ValueError: no file has a label.
    """
    found: dict[int, list[float]] = {}
    for file in files:
        segmentation, properties = SimpleITKIO().read_seg(str(file))
        own, shape, labels = properties["spacing"], segmentation.shape[1:], np.unique(segmentation).tolist()
        one_hot = np.concatenate([segmentation == label for label in labels]).astype(np.float32)
        coarse = compute_new_shape(shape, own, spacing)
        there = resample_data_or_seg_to_shape(one_hot, coarse, own, spacing, order=1, order_z=0)
        back = resample_data_or_seg_to_shape(there, shape, spacing, own, order=1, order_z=0).argmax(0)
        for channel, label in enumerate(labels):
            if label:
                before, after = segmentation[0] == label, back == channel
                found.setdefault(label, []).append(float(2 * (before & after).sum() / (before.sum() + after.sum())))
    if not found:
        raise ValueError(
            f"no label in {', '.join(map(str, files))}: choose validation cases with labels in splits.json"
        )
    return float(np.mean([np.mean(dice) for dice in found.values()]))


def with_patch_and_batch(stock: dict[str, Any], ours: dict[str, Any], batch: int) -> dict[str, Any]:
    """nnU-Net's plans with our preprocessed data and patch, and this batch; the network stays nnU-Net's.

    Raises:
        ValueError: nnU-Net's network does not fit the patch, or the data would be preprocessed differently.
    """
    plans = copy.deepcopy(stock) | {"plans_name": STOCK_PLANS}
    configuration, model = plans["configurations"][CONFIGURATION], ours["configurations"][CONFIGURATION]
    for key, value in configuration.items():
        if key.startswith(DATA_KEYS) and value != model[key]:
            raise ValueError(f"nnU-Net's plans have {key} {value}, ours {model[key]}: arms must train on the same data")
    strides = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0).tolist()
    if np.mod(model["patch_size"], strides).any():
        raise ValueError(
            f"our patch {model['patch_size']} is no multiple of the strides {strides} of nnU-Net's network: take "
            "another preset or spacing"
        )
    configuration |= {key: model[key] for key in ("data_identifier", "patch_size")} | {"batch_size": batch}
    return plans


def with_network_of(plans: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Plans of the unlabelled dataset with nnU-Net's network: SparK pre-trains on the same patches as HySparK."""
    found = copy.deepcopy(plans) | {"plans_name": STOCK_PLANS + LIKE}
    configuration = found["configurations"][CONFIGURATION]
    configuration["architecture"] = stock["configurations"][CONFIGURATION]["architecture"]
    del configuration["hyspark"]  # the preset, which nnU-Net's network has not
    return found


def _copy(source: Path, target: Path, cases: Sequence[str], ending: str) -> None:
    """The files of these cases and no others.

    Raises:
        FileNotFoundError: a case has none.
    """
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for case in cases:
        files = list(source.glob(case + ending))
        if not files:
            raise FileNotFoundError(f"splits.json names {case}, but there is no {source / (case + ending)}")
        for file in files:
            shutil.copy(file, target)
