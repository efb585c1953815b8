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
from collections.abc import Sequence
from pathlib import Path

from benchmarks.few_labels.ablations import ABLATIONS
from benchmarks.few_labels.arms import ARMS, Run
from benchmarks.few_labels.collect import collect
from benchmarks.few_labels.prepare import prepare
from benchmarks.few_labels.report import write_report
from benchmarks.few_labels.results import FOLDER
from benchmarks.few_labels.settings import add_options, settings_of
from benchmarks.few_labels.subsets import MAX_SEEDS
from benchmarks.few_labels.training import finetune, pretrain
from benchmarks.few_labels.work import CommandFailed, Work


def execute(arguments: argparse.Namespace) -> int:
    """Prepares the work folder and does the runs of a command; goes on where a run fails. Returns the exit status."""
    work = Work(arguments.work.resolve(), arguments.cores or os.cpu_count() or 1)
    settings = settings_of(arguments, work.settings_file)
    splits = prepare(work, settings, arguments.data)
    arms = [(ARMS | ABLATIONS)[name] for name in arguments.arms]
    counts = arguments.labels or splits.labelled
    failures: list[str] = []
    tried: set[str] = set()  # pre-trainings, once each, just before the first run that starts from them
    # seed by seed, arms side by side: whatever is done can be compared at any time
    for run in [Run(arm, n, seed, splits.fold(n, seed)) for seed in arguments.seeds for n in counts for arm in arms]:
        before = run.arm.pretraining
        try:
            if before and before.run not in tried:
                tried.add(before.run)
                pretrain(work, settings, before)
            finetune(work, settings, run)
            if work.records():  # none if another benchmark is at the first run
                collect(work, work.root / "results")
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
    work, shared = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    work.add_argument("--work", type=Path, required=True, help="folder of datasets, trainings and logs")
    shared.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the dataset, with splits.json")
    shared.add_argument("--cores", type=int, choices=range(1, 1025), metavar="N", help="cores to use (default: all)")
    add_options(shared)
    preparing = commands.add_parser("prepare", parents=[work, shared], help="the datasets, plans and folds")
    preparing.set_defaults(run=execute, arms=[], labels=[], seeds=[])
    running = commands.add_parser("run", parents=[work, shared], help="the arms' trainings, after what they need")
    running.set_defaults(run=execute)
    add, seeds = running.add_argument, range(MAX_SEEDS)
    add("--labels", type=int, nargs="+", metavar="N", help="numbers of labelled cases (default: all of splits.json)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=seeds, metavar="N", help="(default: 0 1 2)")
    names = f"(default: {' '.join(ARMS)}); ablations: {' '.join(ABLATIONS)}"
    add("--arms", nargs="+", choices=[*ARMS, *ABLATIONS], default=list(ARMS), metavar="ARM", help=names)
    collecting = commands.add_parser("collect", parents=[work], help="write the results of finished runs as CSV files")
    collecting.add_argument("--to", type=Path, default=FOLDER, help="folder (default: that of the repository)")
    collecting.set_defaults(run=lambda a: print(f"{collect(Work(a.work.resolve()), a.to)} runs are in {a.to}"))
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
