"""The command ``hyspark_nnunet``; what nnU-Net's own commands do is left to them.

An option is named as the parameter that it sets (``dest``). Implementations are imported when they run, so that
``--help`` is quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyspark_nnunet import __version__
from hyspark_nnunet.commands.plan_options import add_plan_commands, add_preprocess_command

FILE_HELP = (
    ".pth or .safetensors, of our trainers, nnU-Net, nnssl or the HySparK release; or hf://ORG/NAME[/FILE][@REVISION]"
)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the installation",
        description="Checks the installation and prints a line for each check. A FAIL is followed by the command that "
        "fixes it. Exit status 1 if a check fails.",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "mps"),
        help="device for the test of the networks (default: cuda, mps or cpu)",
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run only these checks, by the names in the output")
    parser.add_argument("--mend", action="store_true", help="reinstall torchvision with pip if it does not match torch")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.doctor import examine

    return examine(**_options(arguments))


def _add_checkpoint(commands: Any) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="inspect, convert and compare checkpoints",
        description="Inspects, converts and compares checkpoints. No code in a file is executed.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    inspect = actions.add_parser(
        "inspect",
        help="describe a file and check whether it fits a dataset",
        description="Prints the origin, sizes and recipe of a file; with -d also what -pretrained_weights would load "
        "on that dataset. Exit status 1 if the file is refused or does not fit.",
    )
    inspect.add_argument("file", metavar="FILE", help=FILE_HELP)
    _add_target(inspect, "dataset (number or name) to check the file for")
    inspect.add_argument(
        "-tr",
        dest="trainer",
        choices=("HySparKFinetuneTrainer", "HySparKPretrainTrainer", "SparKFinetuneTrainer", "SparKPretrainTrainer"),
        help="trainer to check the file for (default: the fine-tuning trainer of the file's network)",
    )
    inspect.set_defaults(run=_run_inspect)
    convert = actions.add_parser(
        "convert",
        help="write the weights in another format",
        description="Writes the weights in another format, reads the new file and compares every bit.",
    )
    convert.add_argument("file", metavar="FILE", help=FILE_HELP)
    convert.add_argument("out", metavar="OUT", help="new file")
    convert.add_argument(
        "--to",
        dest="kind",
        required=True,
        choices=("hyspark-release", "nnunet", "nnunet-weights", "nnssl", "safetensors"),
        help="format",
    )
    _add_target(convert, "for nnunet, nnunet-weights and nnssl: dataset (number or name) whose plan is taken")
    convert.add_argument("-f", dest="fold", default="all", help="for nnunet: fold (default: %(default)s)")
    convert.set_defaults(run=_run_convert)
    publish = actions.add_parser(
        "publish",
        help="a folder to upload to the Hugging Face hub",
        description="Writes a folder to upload to the Hugging Face hub: weights as .safetensors, config.json, the loss "
        "curve and a model card, without paths and names of cases. The licence is left to you; upload the folder by: "
        "hf upload ORG/NAME FOLDER.",
    )
    publish.add_argument("file", metavar="FILE", help=FILE_HELP)
    publish.add_argument("folder", metavar="FOLDER", help="new or empty folder")
    publish.set_defaults(run=_run_publish)
    probe = actions.add_parser(
        "probe",
        help="linear-probe Dice of encoders, without fine-tuning",
        description="Fits a linear head to the frozen encoder's features on some cases of a labelled, preprocessed "
        "dataset and prints its Dice on other cases, for random weights and for each file.",
    )
    probe.add_argument("files", nargs="*", metavar="FILE", help=FILE_HELP)
    _add_target(probe, "labelled dataset (number or name)", required=True)
    probe.add_argument(
        "--cases",
        dest="n_cases",
        metavar="CASES",
        type=int,
        default=20,
        help="number of cases to fit the head to; as many others are scored (default: %(default)s)",
    )
    probe.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="(default: %(default)s)")
    probe.set_defaults(run=_run_probe)


def _add_target(parser: argparse.ArgumentParser, meaning: str, required: bool = False) -> None:
    parser.add_argument("-d", dest="dataset", required=required, help=meaning)
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="(default: %(default)s)")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")


def _run_inspect(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.inspect_checkpoint import inspect_checkpoint

    return inspect_checkpoint(**_options(arguments))


def _run_convert(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.convert_checkpoint import convert_checkpoint

    return convert_checkpoint(**_options(arguments))


def _run_publish(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.publish_checkpoint import publish_checkpoint

    return publish_checkpoint(**_options(arguments))


def _run_probe(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.probe_checkpoints import probe_checkpoints

    return probe_checkpoints(**_options(arguments))


def _add_dataset(commands: Any) -> None:
    parser = commands.add_parser(
        "dataset",
        help="make and check datasets for pre-training",
        description="Makes and checks datasets for pre-training in nnU-Net's raw layout; see docs/unlabelled_data.md.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--raw", help="folder of raw datasets (default: nnUNet_raw)")
    shared.add_argument("-np", "--processes", type=int, help="number of processes (default: nnUNet_def_n_proc, or 8)")
    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("-d", "--dataset-id", type=int, metavar="ID", help="number of the new dataset")
    making.add_argument("-n", "--name", help="name of the new dataset")
    making.add_argument(
        "--labels",
        choices=("foreground", "none"),
        default="foreground",
        help="label files to make; none: everything is foreground",
    )
    making.add_argument("--skip-bad", action="store_true", help="skip cases that are incomplete or unreadable")
    making.add_argument("--overwrite", action="store_true", help="replace a dataset that this command made")

    prepare = actions.add_parser("prepare", parents=[shared, making], help="make a dataset from a folder of scans")
    prepare.add_argument("folder", nargs="?", help="folder of the scans; '$DATA/scans' in quotes keeps the variable")
    prepare.add_argument(
        "--channels", nargs="+", default=(), metavar="NAME", help="channel names in order, or NAME=FOLDER"
    )
    files = prepare.add_mutually_exclusive_group()
    files.add_argument("--copy", dest="files", action="store_const", const="copied", help="copy the scans, as .nii.gz")
    files.add_argument(
        "--link", dest="files", action="store_const", const="linked", help="link the scans into imagesTr"
    )
    files.add_argument(
        "--no-copy",
        dest="convert",
        action="store_false",
        help="refuse DICOM series, because they have to be written as .nii.gz",
    )
    prepare.add_argument("--relative", action="store_true", help="list paths relative to the dataset's folder")
    prepare.add_argument(
        "--no-suffix",
        dest="numbers_in_names",
        action="store_true",
        help="numbers at the end of file names (_0001) are not channels",
    )
    prepare.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help="use only these paths, for example '*/ct.nii.gz'"
    )
    prepare.add_argument("--exclude", nargs="+", default=(), metavar="PATTERN", help="do not use these paths")
    prepare.add_argument(
        "--exclude-masks", metavar="FOLDER", help="masks, called as their scans, of voxels that do not count"
    )
    prepare.add_argument(
        "--group-by",
        metavar="PATTERN",
        help="subject of a scan: a part of its path (1: the first folder), or a regular expression",
    )
    prepare.set_defaults(run=_run_prepare, files="listed")

    pool = actions.add_parser(
        "pool", parents=[shared, making], help="combine several datasets into one, without copying images"
    )
    pool.add_argument(
        "--from", nargs="+", required=True, dest="sources", metavar="ID", help="datasets (numbers or names)"
    )
    pool.add_argument(
        "--channels-from",
        nargs="+",
        default=(),
        metavar="ID",
        help="dataset whose channel names apply; then ID=CHANNELS of others",
    )
    pool.add_argument(
        "--holdout", nargs="+", default=(), metavar="FILE", help="files that list cases to leave out; FILE:KEY for JSON"
    )
    pool.set_defaults(run=_run_pool)

    check = actions.add_parser("check", parents=[shared], help="read every case and list faults")
    check.add_argument("dataset", help="number, name or folder")
    check.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of a table")
    check.add_argument("--exclude-bad", action="store_true", help="write dataset.json without the bad cases")
    check.set_defaults(run=_run_check)


def _run_prepare(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.datasets.prepare import PrepareOptions, prepare

    raw, options = _dataset_options(arguments)
    prepare(PrepareOptions(**options), raw)
    return 0


def _run_pool(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.datasets.pool import PoolOptions, pool

    raw, options = _dataset_options(arguments)
    if options["dataset_id"] is None or options["name"] is None:
        raise ValueError("give the pool a number and a name, for example -d 70 -n Pool")
    pool(PoolOptions(**options), raw)
    return 0


def _run_check(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.datasets.check import check
    from hyspark_nnunet.datasets.dataset_json import find_dataset

    if arguments.raw is None and os.path.isfile(os.path.join(arguments.dataset, "dataset.json")):
        arguments.raw = os.path.dirname(os.path.abspath(arguments.dataset))
    raw, options = _dataset_options(arguments)
    return check(find_dataset(options.pop("dataset"), raw), **options)


def _dataset_options(arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder of raw datasets, and the other options of a ``dataset`` command."""
    from hyspark_nnunet.datasets.dataset_json import raw_folder
    from hyspark_nnunet.datasets.parallel import default_processes

    options = _options(arguments)
    raw = raw_folder(options.pop("raw"))
    if options["processes"] is None:
        options["processes"] = default_processes()
    return raw, {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _add_planning(commands: Any) -> None:
    plan, plan_and_preprocess = add_plan_commands(commands)
    plan.set_defaults(run=_run_plan)
    plan_and_preprocess.set_defaults(run=_run_plan_and_preprocess)
    add_preprocess_command(commands).set_defaults(run=_run_preprocess)


def _run_plan(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.plan import plan

    plan(arguments)
    return 0


def _run_plan_and_preprocess(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.plan import plan_and_preprocess

    return plan_and_preprocess(arguments)


def _run_preprocess(arguments: argparse.Namespace) -> int:
    from hyspark_nnunet.commands.preprocess import run_preprocess

    return run_preprocess(arguments)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options by name, without the function that the parser chose."""
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each leaves its function in ``run``."""
    parser = argparse.ArgumentParser(prog="hyspark_nnunet", description="Self-supervised pre-training in nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"hyspark_nnunet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (_add_doctor, _add_dataset, _add_planning, _add_checkpoint):
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
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:  # the user's to correct: a message, not a traceback
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
