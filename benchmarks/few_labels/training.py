"""Runs one training to its end, from wherever it stands, and keeps what is reported of it."""

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.few_labels.arms import Arm, Pretraining, Run
from benchmarks.few_labels.prepare import CONFIGURATION
from benchmarks.few_labels.record import SUMMARY, keep_pretraining, keep_run
from benchmarks.few_labels.settings import Settings
from benchmarks.few_labels.work import CommandFailed, Work, read_json, write_json
from hyspark_nnunet.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS


def pretraining_folder(work: Work, settings: Settings, pretraining: Pretraining) -> Path:
    """Where nnU-Net writes a pre-training."""
    return _folder(work, settings, pretraining, pretraining.run) / "fold_all"


def fold_folder(work: Work, settings: Settings, run: Run) -> Path:
    """Where nnU-Net writes a training with labels."""
    return _folder(work, settings, run.arm, run.arm.name) / f"fold_{run.fold}"


def _folder(work: Work, settings: Settings, training: Pretraining | Arm, results: str) -> Path:
    base = f"{training.trainer}__{training.plans(settings)}__{CONFIGURATION}"
    return work.results(results) / training.dataset / base


def pretrain(work: Work, settings: Settings, pretraining: Pretraining) -> None:
    """Pre-trains on all scans without labels, unless that is done; waits where another benchmark does.

    Raises:
        CommandFailed: the training failed; the message has the end of its log.
    """
    name, folder = pretraining.run, pretraining_folder(work, settings, pretraining)
    with work.alone(name, wait=True) as lock:
        if _to_be_done(work, name, lock):
            _train(work, settings, pretraining, name, folder, pretraining.variables(settings), name, lock)
            keep_pretraining(work, settings, pretraining, folder)


def finetune(work: Work, settings: Settings, run: Run) -> None:
    """Trains with labels and keeps the scores, unless that is done or another benchmark is at it.

    nnU-Net predicts and scores the validation cases at the end, with the final weights and with mirroring.

    Raises:
        CommandFailed: the training failed; the message has the end of its log.
        FileNotFoundError: the pre-training is not finished.
    """
    arm, folder, before = run.arm, fold_folder(work, settings, run), run.arm.pretraining
    with work.alone(run.name) as lock:
        if _to_be_done(work, run.name, lock):
            weights = pretraining_folder(work, settings, before) / FINAL if before else None
            if before and not work.record(before.run).is_file():
                raise FileNotFoundError(
                    f"{run.name} starts from {weights}, which is not finished: see {work.log(before.run)}. The same "
                    "command continues it"
                )
            _train(work, settings, arm, run.name, folder, arm.variables(settings, run.seed), arm.name, lock, weights)
            dice = keep_run(work, settings, run, folder, weights)
            print(f"{run.name}: Dice {100 * dice:.1f}", flush=True)


def _to_be_done(work: Work, name: str, lock: int | None) -> bool:
    """Says what becomes of a run."""
    done = work.record(name).is_file()
    if lock is None:
        print(f"{name}: another benchmark runs it; skipped", flush=True)
    else:
        print(f"{name}: " + ("already finished" if done else f"starts; its output is in {work.log(name)}"), flush=True)
    return lock is not None and not done


def _train(
    work: Work,
    settings: Settings,
    training: Pretraining | Arm,
    name: str,
    folder: Path,
    variables: Mapping[str, str],
    arm: str,
    lock: int | None,
    weights: Path | None = None,
) -> None:
    """nnUNetv2_train from where the fold's folder stands: new, continued, or its last validation alone.

    Raises:
        CommandFailed: the training failed, or ended before its end.
    """
    more = ("-pretrained_weights", str(weights)) if weights else ()
    if (folder / FINAL).is_file():
        more = ("--val",)
    elif any((folder / checkpoint).is_file() for checkpoint in (LATEST, PREVIOUS, BEST)):
        more = ("--c",)
    write_plans(work.preprocessed / training.dataset, training, settings)
    fold = (training.dataset, CONFIGURATION, folder.name.removeprefix("fold_"))
    how = ("-tr", training.trainer, "-p", training.plans(settings), "-device", settings.device, *more)
    command = (sys.executable, "-m", "benchmarks.few_labels.nnunet_train", str(work.threads), *fold, *how)
    loading = {"nnUNet_n_proc_DA": str(settings.loader_processes)}
    work.run(name, command, {**variables, **loading}, arm, lock)
    if not (folder / SUMMARY).is_file():
        # a signal ends our trainers in order, with status 0
        raise CommandFailed(f"{name} ended before its end; the same command continues it. {work.end_of_log(name)}")


def write_plans(folder: Path, training: Pretraining | Arm, settings: Settings) -> None:
    """Writes the plans of a training whose network has other arguments than its family's."""
    if training.network:
        name = training.plans(settings)
        plans = read_json(folder / f"{training.prepared_plans(settings)}.json") | {"plans_name": name}
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"] |= training.network
        write_json(folder / f"{name}.json", plans)
