"""Does pre-training help with few labels, on a dataset of yours?

    python -m benchmarks.few_labels run --data FOLDER --work W        prepare, pre-train, and train all arms
    python -m benchmarks.few_labels collect --work W --to RESULTS     CSV files and recipes
    python -m benchmarks.few_labels report                            docs/results.md, docs/results_appendix.md

FOLDER is a dataset in nnU-Net's raw layout with a splits.json: lists of cases "pretrain" (images alone are used),
"labelled_N" for any numbers N, nested, and "validation". Finished runs are skipped, interrupted runs are resumed.
W/results has what is finished. The same command, started twice with a part of the --cores, shares the runs.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.few_labels.ablations import ABLATIONS
from benchmarks.few_labels.arms import ARMS, REFERENCES, Pretraining, Run, runs_of
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.commands import CommandFailed, Commands
from benchmarks.few_labels.prepare import prepare
from benchmarks.few_labels.report import write_report
from benchmarks.few_labels.results import FOLDER
from benchmarks.few_labels.settings import add_options, settings_of
from benchmarks.few_labels.subsets import MAX_SEEDS, Splits
from benchmarks.few_labels.training import finetune, pretrain
from benchmarks.few_labels.work import Work

PRETRAININGS = {pretraining.name: pretraining for pretraining in REFERENCES.values()}
Runs = list[Pretraining | Run]


def no_runs(arguments: argparse.Namespace, splits: Splits) -> Runs:
    """the datasets, plans and folds"""
    return []


def pretrainings(arguments: argparse.Namespace, splits: Splits) -> Runs:
    """the pre-trainings, after prepare"""
    return [PRETRAININGS[name] for name in arguments.names]


def runs_of_arms(arguments: argparse.Namespace, splits: Splits) -> Runs:
    """the arms' trainings with labels, after what they need: seed by seed; labels and arms in the order given"""
    arms = [(ARMS | ABLATIONS)[name] for name in arguments.arms]
    ordered: Runs = []
    for run in runs_of(arms, arguments.labels or list(splits.labelled), arguments.seeds, splits):
        # a pre-training comes just before the first run that starts from it
        ordered += [each for each in (run.arm.pretraining, run) if each is not None and each not in ordered]
    return ordered


def execute(arguments: argparse.Namespace) -> int:
    """Prepares the work folder and does the runs of a command; goes on where a run fails. Returns the exit status."""
    work = Work(arguments.work.resolve())
    settings = settings_of(arguments, work.settings_file)
    commands, failures = Commands(work, arguments.cores or os.cpu_count() or 1), []
    for run in arguments.chosen(arguments, prepare(commands, settings, arguments.data)):
        try:
            if isinstance(run, Pretraining):
                pretrain(commands, settings, run)
            else:
                finetune(commands, settings, run)
            if any(work.record("x").parent.glob("*.json")):  # none if another benchmark is at the first run
                collect(work, work.root / "results", quietly=True)
        except (CommandFailed, OSError, ValueError) as error:
            print(f"failed: {error}", flush=True)
            failures.append(str(error))
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n\n", file=sys.stderr)
    return 1 if failures else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command leaves its function in ``run``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--work", type=Path, required=True, help="folder of datasets, trainings and logs")
    shared = argparse.ArgumentParser(add_help=False, parents=[folder])
    add = shared.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="the dataset, with splits.json")
    add("--cores", type=int, choices=range(1, 1025), metavar="N", help="cores to use (default: all)")
    add_options(shared)
    training = argparse.ArgumentParser(add_help=False)
    add, seeds = training.add_argument, range(MAX_SEEDS)
    add("--labels", type=int, nargs="+", metavar="N", help="numbers of labelled cases (default: all of splits.json)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=seeds, metavar="N", help="(default: 0 1 2)")

    def command(name: str, chosen: Callable[..., Runs], *parents: argparse.ArgumentParser) -> Callable[..., Any]:
        made = commands.add_parser(name, parents=[shared, *parents], help=chosen.__doc__)
        made.set_defaults(run=execute, chosen=chosen)
        return made.add_argument

    command("prepare", no_runs)
    command("pretrain", pretrainings)("names", nargs="+", choices=PRETRAININGS)
    command("run", runs_of_arms, training)(
        "--arms",
        nargs="+",
        choices=[*ARMS, *ABLATIONS],
        default=list(ARMS),
        metavar="ARM",
        help=f"(default: {' '.join(ARMS)}); ablations: {' '.join(ABLATIONS)}",
    )
    collecting = commands.add_parser(
        "collect", parents=[folder], help="write the results of finished runs as CSV files"
    )
    collecting.add_argument("--to", type=Path, default=FOLDER, help="folder (default: that of the repository)")
    collecting.set_defaults(run=lambda arguments: collect(Work(arguments.work.resolve()), arguments.to))
    reporting = commands.add_parser("report", help="write the tables and plots of both pages on results")
    reporting.set_defaults(run=lambda arguments: write_report())
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, CommandFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
