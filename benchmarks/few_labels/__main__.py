"""Does pre-training help with few labels, on a dataset of yours?

    python -m benchmarks.few_labels run --data FOLDER --work W        prepare, pre-train, and train all arms
    python -m benchmarks.few_labels collect --work W --to RESULTS     CSV files, recipes, key lines of the logs
    python -m benchmarks.few_labels report                            docs/results.md, docs/results_appendix.md

FOLDER is a dataset in nnU-Net's raw layout with a splits.json: lists of cases "pretrain" (images alone are used),
"labelled_N" for any numbers N, nested, and "validation". Finished runs are skipped, interrupted runs are resumed.
W/results has what is finished.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.few_labels.ablations import ABLATIONS
from benchmarks.few_labels.arms import ARMS, REFERENCE, SPARK_REFERENCE, Arm, Pretraining, runs_of
from benchmarks.few_labels.collect import check_settings, collect
from benchmarks.few_labels.commands import CommandFailed, Commands
from benchmarks.few_labels.prepare import prepare
from benchmarks.few_labels.report import write_report
from benchmarks.few_labels.results import FOLDER, Results
from benchmarks.few_labels.settings import Settings, add_options, settings_of
from benchmarks.few_labels.subsets import MAX_SEEDS, Splits
from benchmarks.few_labels.training import finetune, pretrain
from benchmarks.few_labels.work import Work

PRETRAININGS = {pretraining.name: pretraining for pretraining in (REFERENCE, SPARK_REFERENCE)}


class Benchmark:
    """The steps on one work folder.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work = Work(arguments.work.resolve())
        self.settings: Settings = settings_of(arguments, self.work.settings_file)
        self.cores = arguments.cores or os.cpu_count() or 1
        self.commands = Commands(self.work, max(1, self.cores // arguments.jobs))
        self.failures: list[str] = []

    def prepare(self) -> Splits:
        """The datasets, plans and folds."""
        return prepare(self.commands, self.settings, self.arguments.data)

    def pretrain(self, pretrainings: Sequence[Pretraining]) -> None:
        """Each takes every core: nothing else of this benchmark runs beside it."""
        commands = Commands(self.work, self.cores)
        for pretraining in pretrainings:
            self._do([partial(pretrain, commands, self.settings, pretraining)], commands)

    def run(self, arms: Sequence[Arm]) -> None:
        """The arms' trainings, after the pre-trainings that they start from."""
        splits = self.prepare()
        runs = runs_of(arms, self.arguments.labels or list(splits.labelled), self.arguments.seeds, splits)
        if self.arguments.but_collected:
            check_settings(self.work, FOLDER)
            collected = Results(FOLDER)
            runs = [run for run in runs if run.seed not in collected.seeds(run.labels, run.arm.name)]
        self.pretrain(list({p.name: p for run in runs if (p := run.arm.pretraining) is not None}.values()))
        self._do([partial(finetune, self.commands, self.settings, run) for run in runs])

    def _do(self, tasks: Sequence[Callable[[], None]], commands: Commands | None = None) -> None:
        if not self.failures:
            then = partial(collect, self.work, self.work.root / "results", quietly=True)
            self.failures += (commands or self.commands).side_by_side(tasks, self.arguments.jobs, then)


def run_prepare(benchmark: Benchmark) -> None:
    """the datasets, plans and folds"""
    benchmark.prepare()


def run_pretrain(benchmark: Benchmark) -> None:
    """the pre-trainings, after prepare"""
    benchmark.prepare()
    benchmark.pretrain([PRETRAININGS[name] for name in benchmark.arguments.names])


def run_arms(benchmark: Benchmark) -> None:
    """the arms' trainings with labels, after what they need: seed by seed; labels and arms in the order given"""
    benchmark.run([ARMS[name] for name in benchmark.arguments.arms])


def run_ablation(benchmark: Benchmark) -> None:
    """an ablation's trainings with labels, after what they need"""
    name = benchmark.arguments.name
    benchmark.run(ABLATIONS[name].arms(name))


def at_least_one(text: str) -> int:
    """A whole number from 1 on, as a type of argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


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
    add("--jobs", type=at_least_one, default=1, metavar="N", help="trainings side by side (default: 1)")
    add("--cores", type=at_least_one, metavar="N", help="cores that all of them take (default: all)")
    add_options(shared)
    training = argparse.ArgumentParser(add_help=False)
    add, seeds = training.add_argument, range(MAX_SEEDS)
    add("--labels", type=int, nargs="+", metavar="N", help="numbers of labelled cases (default: all of splits.json)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=seeds, metavar="N", help="(default: 0 1 2)")
    add("--but-collected", action="store_true", help="leave out runs whose results are in the repository")

    def command(name: str, run: Callable[[Benchmark], None], *parents: argparse.ArgumentParser) -> Callable[..., Any]:
        made = commands.add_parser(name, parents=[shared, *parents], help=run.__doc__)
        made.set_defaults(run=lambda arguments: _run(run, arguments))
        return made.add_argument

    command("prepare", run_prepare)
    command("pretrain", run_pretrain)("names", nargs="+", choices=PRETRAININGS)
    command("run", run_arms, training)("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    command("ablation", run_ablation, training)("name", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS))
    collecting = commands.add_parser(
        "collect", parents=[folder], help="write the results of finished runs as CSV files"
    )
    collecting.add_argument("--to", type=Path, default=FOLDER, help="folder (default: that of the repository)")
    collecting.set_defaults(run=lambda arguments: collect(Work(arguments.work.resolve()), arguments.to))
    reporting = commands.add_parser("report", help="write the tables and plots of both pages on results")
    reporting.set_defaults(run=lambda arguments: write_report())
    return parser


def _run(step: Callable[[Benchmark], None], arguments: argparse.Namespace) -> int:
    benchmark = Benchmark(arguments)
    step(benchmark)
    if benchmark.failures:
        print(f"\n{len(benchmark.failures)} failed:", *benchmark.failures, sep="\n\n", file=sys.stderr)
    return 1 if benchmark.failures else 0


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
    sys.exit(main())
