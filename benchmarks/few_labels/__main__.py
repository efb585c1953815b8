"""Does pre-training help with few labels?

    python -m benchmarks.few_labels all --work W            prepare, pretrain, and all arms
    python -m benchmarks.few_labels collect --work W        benchmarks/few_labels/results/
    python -m benchmarks.few_labels report                  docs/results.md, docs/results_appendix.md and their plots

Each step is also a command of its own. Finished runs are skipped, interrupted runs are resumed. On another machine,
--but-collected leaves out the runs that were collected on the first.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.few_labels.ablations import ABLATIONS
from benchmarks.few_labels.arms import ARMS, REFERENCE, Arm, Pretraining, balanced
from benchmarks.few_labels.collect import check_settings, collect
from benchmarks.few_labels.commands import CommandFailed, Commands
from benchmarks.few_labels.prepare import prepare
from benchmarks.few_labels.report import write_report
from benchmarks.few_labels.results import FOLDER, Results
from benchmarks.few_labels.settings import Settings, add_options, settings_of
from benchmarks.few_labels.subsets import LABELS, MAX_SEEDS
from benchmarks.few_labels.training import finetune, pretrain
from benchmarks.few_labels.work import ROOT, Work

DATA = Path(os.environ.get("HYSPARK_REAL_DATA") or ROOT.parent / "shared" / "data")


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

    def prepare(self) -> None:
        self._do([partial(prepare, self.commands, self.settings, self.arguments.data)])

    def pretrain(self, pretraining: Pretraining = REFERENCE) -> None:
        """It takes every core: nothing else of this benchmark runs beside it."""
        commands = Commands(self.work, self.cores)
        self._do([partial(pretrain, commands, self.settings, pretraining)], commands)

    def finetune(self, arms: Iterable[Arm]) -> None:
        """The arms' trainings, after the pre-trainings that they start from."""
        runs = balanced(arms, self.arguments.labels, self.arguments.seeds)
        if self.arguments.but_collected:
            check_settings(self.work, FOLDER)
            collected = Results(FOLDER)
            runs = [run for run in runs if run.seed not in collected.seeds(run.labels, run.arm.name)]
        for pretraining in {p.name: p for run in runs if (p := run.arm.pretraining) is not None}.values():
            self.pretrain(pretraining)
        self._do([partial(finetune, self.commands, self.settings, run) for run in runs])

    def _do(self, tasks: Sequence[Callable[[], None]], commands: Commands | None = None) -> None:
        if not self.failures:
            self.failures += (commands or self.commands).side_by_side(tasks, self.arguments.jobs)


def run_prepare(benchmark: Benchmark) -> None:
    """The datasets, plans and folds."""
    benchmark.prepare()


def run_pretrain(benchmark: Benchmark) -> None:
    """The pre-training, after prepare."""
    benchmark.prepare()
    benchmark.pretrain()


def run_finetune(benchmark: Benchmark) -> None:
    """An arm's trainings with labels, after what it needs."""
    benchmark.prepare()
    benchmark.finetune([ARMS[benchmark.arguments.arm]])


def run_ablation(benchmark: Benchmark) -> None:
    """An ablation's pre-training, where it has one of its own, and its trainings with labels."""
    name = benchmark.arguments.name
    benchmark.prepare()
    benchmark.finetune(ABLATIONS[name].arms(name))


def run_all(benchmark: Benchmark) -> None:
    """Everything but the ablations."""
    benchmark.prepare()
    benchmark.finetune(ARMS.values())


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
    folder.add_argument("--work", type=Path, required=True, help="folder of data, trainings and logs")
    shared = argparse.ArgumentParser(add_help=False, parents=[folder])
    shared.add_argument("--data", type=Path, default=DATA, help="folder that holds hippocampus/ (default: %(default)s)")
    shared.add_argument(
        "--jobs", type=at_least_one, default=1, help="trainings side by side, which share the cores (default: 1)"
    )
    shared.add_argument(
        "--cores",
        type=at_least_one,
        metavar="N",
        help="how many cores this command takes, where others run beside it (default: all)",
    )
    add_options(shared)
    seeds = argparse.ArgumentParser(add_help=False)
    seeds.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        choices=range(MAX_SEEDS),
        metavar="N",
        help="(default: 0 1 2)",
    )

    seeds.add_argument(
        "--but-collected",
        action="store_true",
        help="leave out the runs whose results are in the repository: begun on one machine, ended on another",
    )

    def add(name: str, run: Callable[[Benchmark], None], labels: Sequence[int] = ()) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[shared, seeds] if labels else [shared], help=run.__doc__)
        if labels:
            made.add_argument(
                "--labels", type=int, nargs="+", default=labels, choices=LABELS, help="(default: %(default)s)"
            )
        made.set_defaults(run=lambda arguments: _run(run, arguments))
        return made

    add("prepare", run_prepare)
    add("pretrain", run_pretrain)
    add("finetune", run_finetune, LABELS).add_argument("--arm", required=True, choices=ARMS)
    add("all", run_all, LABELS)
    add("ablation", run_ablation, LABELS[:1]).add_argument(
        "name", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS)
    )
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
