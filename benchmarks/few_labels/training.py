"""Runs one training to its end, from wherever it stands, and keeps what is reported of it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.few_labels.arms import Pretraining, Run, plans_of
from benchmarks.few_labels.commands import CommandFailed, Commands, alone, end_of_log
from benchmarks.few_labels.prepare import (
    CONFIGURATION,
    LABELLED,
    LABELLED_ID,
    LIKE,
    UNLABELLED,
    UNLABELLED_ID,
    write_plans,
)
from benchmarks.few_labels.record import keep_pretraining, keep_run
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import Work
from hyspark_nnunet.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS


def pretraining_folder(work: Work, settings: Settings, pretraining: Pretraining) -> Path:
    """Where nnU-Net writes a pre-training."""
    base = f"{pretraining.trainer}__{pretraining.plans(settings)}__{CONFIGURATION}"
    return work.results(pretraining.run) / UNLABELLED / base / "fold_all"


def fold_folder(work: Work, settings: Settings, run: Run) -> Path:
    """Where nnU-Net writes a training with labels."""
    base = f"{run.arm.trainer}__{run.arm.plans(settings)}__{CONFIGURATION}"
    return work.results(run.arm.name) / LABELLED / base / f"fold_{run.fold}"


def pretrain(commands: Commands, settings: Settings, pretraining: Pretraining) -> None:
    """Pre-trains on all scans without labels, unless that is done; waits where another benchmark does.

    Raises:
        CommandFailed: the training failed; the message has the end of its log.
    """
    work, name, plans = commands.work, pretraining.run, pretraining.plans(settings)
    with alone(work, name, wait=True) as lock:
        if _to_be_done(work, name, lock):
            folder = pretraining_folder(work, settings, pretraining)
            words = (UNLABELLED_ID, CONFIGURATION, "all", "-tr", pretraining.trainer, "-p", plans)
            write_plans(work, UNLABELLED, plans_of(pretraining.family, settings) + LIKE, plans, pretraining.network)
            _train(commands, settings, name, folder, words, pretraining.variables(settings), name, lock)
            keep_pretraining(work, settings, commands.threads, pretraining, folder)


def finetune(commands: Commands, settings: Settings, run: Run) -> None:
    """Trains with labels and scores the validation cases, unless that is done or another benchmark is at it.

    nnU-Net predicts the validation cases at the end of a training, with the final weights and with mirroring; these
    predictions are scored. nnUNetv2_predict would make the same ones again.

    Raises:
        CommandFailed: a command failed; the message has the end of its log.
        FileNotFoundError: the pre-training has not been done.
    """
    work, name, arm, plans = commands.work, run.name, run.arm, run.arm.plans(settings)
    with alone(work, name) as lock:
        if not _to_be_done(work, name, lock):
            return
        folder, more = fold_folder(work, settings, run), ()
        weights = arm.pretraining and pretraining_folder(work, settings, arm.pretraining) / FINAL
        if arm.pretraining and weights:
            if not work.record(arm.pretraining.run).is_file():
                raise FileNotFoundError(f"{name} starts from {weights}, which is not finished: run pretrain first")
            more = ("-pretrained_weights", str(weights))
        words = (LABELLED_ID, CONFIGURATION, str(run.fold), "-tr", arm.trainer, "-p", plans)
        write_plans(work, LABELLED, plans_of(arm.family, settings), plans, arm.network)
        _train(commands, settings, name, folder, words, arm.variables(settings, run.seed), arm.name, lock, more)
        scores = folder / "few_labels_scores.json"
        files = ("-djfile", str(folder.parent / "dataset.json"), "-pfile", str(folder.parent / "plans.json"))
        folders = (str(work.validation_labels), str(folder / "validation"))
        command = ("nnUNetv2_evaluate_folder", *folders, *files, "-o", str(scores), "-np", "1")
        commands.run(name, command, {}, arm.name, lock)
        dice = keep_run(work, settings, commands.threads, run, folder, scores, weights)
        print(f"{name}: Dice {100 * dice:.1f}", flush=True)


def _to_be_done(work: Work, name: str, lock: int | None) -> bool:
    """Says what becomes of a run."""
    done = work.record(name).is_file()
    if lock is None:
        print(f"{name}: another benchmark runs it; skipped", flush=True)
    else:
        print(f"{name}: " + ("already finished" if done else f"starts; its output is in {work.log(name)}"), flush=True)
    return lock is not None and not done


def _train(
    commands: Commands,
    settings: Settings,
    name: str,
    folder: Path,
    words: Sequence[str],
    variables: Mapping[str, str],
    arm: str,
    lock: int | None,
    more: Sequence[str] = (),
) -> None:
    """nnUNetv2_train from where the fold's folder stands: new, continued, or its last validation alone.

    Args:
        commands: of the work folder.
        settings: device and loader processes.
        name: of the run.
        folder: of the fold.
        words: dataset, configuration, fold, trainer and plans, as the command takes them.
        variables: the recipe.
        arm: whose folder of results is nnU-Net's.
        lock: on the run.
        more: words of a new training alone.

    Raises:
        CommandFailed: the training failed, or ended before its end.
    """
    summary = folder / "validation" / "summary.json"
    if (folder / FINAL).is_file():
        more = ("--val",)
    elif any((folder / checkpoint).is_file() for checkpoint in (LATEST, PREVIOUS, BEST)):
        more = ("--c",)
    if not ((folder / FINAL).is_file() and summary.is_file()):
        threads = commands.threads
        # nnU-Net's CPU trainings take every core
        part = settings.device == "cpu" and threads != os.cpu_count()
        program = ("python", "-m", "benchmarks.few_labels.nnunet_train", str(threads)) if part else ("nnUNetv2_train",)
        loading = {"nnUNet_n_proc_DA": str(settings.loader_processes)}
        command = (*program, *words, "-device", settings.device, *more)
        commands.run(name, command, {**variables, **loading}, arm, lock)
    if not summary.is_file():
        # a signal ends our trainers in order, with status 0
        log = end_of_log(commands.work.log(name))
        raise CommandFailed(f"{name} ended before its end; the same command continues it. {log}")
