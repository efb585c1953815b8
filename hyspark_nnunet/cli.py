"""The command ``hyspark_nnunet``; what nnU-Net's own commands do is left to them.

A command is a function that adds its parser; its implementation is imported only when it runs, so ``--help`` is quick.
"""

import argparse
import sys
from collections.abc import Sequence
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each leaves its function in ``run``."""
    parser = argparse.ArgumentParser(prog="hyspark_nnunet", description="HySparK as a plugin of nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"hyspark_nnunet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_add_doctor,):
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
