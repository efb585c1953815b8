"""The command ``hyspark_nnunet``; what nnU-Net's own commands do is left to them.

A command is a function that adds its parser; its implementation is imported only when it runs, so ``--help`` is quick.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hyspark_nnunet import __version__


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the installation and say how to mend it",
        description="Checks the installation, one line each, with what to do about every FAIL. Exit status 1 if any.",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), help="where the networks are tried (default: cuda, mps or cpu)"
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="only these checks; the lines begin with the names")
    parser.add_argument("--mend", action="store_true", help="reinstall a torchvision that does not fit torch, by pip")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.doctor import examine

    return examine(arguments.device, only=arguments.only, mend=arguments.mend)


def _add_checkpoint(commands: Any) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="say what a checkpoint is and whether it fits a data set; convert it",
        description="Says what a checkpoint is and whether it fits a data set, and converts it. Nothing in a file is "
        "executed.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    inspect = actions.add_parser(
        "inspect",
        help="what a file is, and whether it fits a data set",
        description="Prints what a file is, its sizes and recipe; with -d also what -pretrained_weights would do on "
        "that data set. Exit status 1 where the file is refused or does not fit.",
    )
    inspect.add_argument("file", metavar="FILE", help=".pth or .safetensors, of ours or of the HySparK release")
    _add_dataset(inspect, "data set (number or name) that the file is to fit")
    inspect.add_argument(
        "-tr",
        dest="trainer",
        default="HySparKFinetuneTrainer",
        choices=("HySparKFinetuneTrainer", "HySparKPretrainTrainer"),
        help="trainer that would start from it (default: %(default)s)",
    )
    inspect.set_defaults(run=_run_inspect)
    convert = actions.add_parser(
        "convert",
        help="the same weights as another kind of file",
        description="Writes the weights as another kind of file, reads it back and compares, bit by bit.",
    )
    convert.add_argument("file", metavar="FILE", help=".pth or .safetensors, of ours or of the HySparK release")
    convert.add_argument("out", metavar="OUT", help="new file")
    convert.add_argument("--to", required=True, choices=("hyspark-release", "nnunet", "safetensors"), help="kind")
    _add_dataset(convert, "for nnunet: data set (number or name) of the checkpoint")
    convert.add_argument("-f", dest="fold", default="all", help="for nnunet: fold (default: %(default)s)")
    convert.set_defaults(run=_run_convert)


def _add_dataset(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("-d", dest="dataset", help=meaning)
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="(default: %(default)s)")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")


def _run_inspect(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.checkpoints.inspection import inspect_checkpoint

    a = arguments
    return _reported(lambda: inspect_checkpoint(a.file, a.dataset, a.configuration, a.plans, a.trainer))


def _run_convert(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.checkpoints.conversion import convert_checkpoint

    a = arguments
    return _reported(lambda: convert_checkpoint(a.file, a.out, a.to, a.dataset, a.configuration, a.plans, a.fold))


def _reported(command: Callable[[], int]) -> int:
    """The command's exit status; what a file or a person got wrong is a line, not a traceback."""
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each leaves its function in ``run``."""
    parser = argparse.ArgumentParser(prog="hyspark_nnunet", description="HySparK as a plugin of nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"hyspark_nnunet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_add_doctor, _add_checkpoint):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; None: those of the command line.

    Returns:
        exit status.
    """
    arguments = build_parser().parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
