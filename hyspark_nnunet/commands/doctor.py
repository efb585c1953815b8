"""The command ``hyspark_nnunet doctor``: checks an installation and prints how to fix it.

Each check prints a line. After a failed check, the others still run.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial

from hyspark_nnunet.commands.installation_checks import (
    FOLDERS,
    MEND_OPTION,
    Finding,
    check_folder,
    check_nnunet,
    check_pretraining,
    check_python,
    check_segmentation,
    check_torch,
    check_torchvision,
    check_trainers,
    check_variables,
    error_text,
    mend_torchvision,
)


def _default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checks(device: str | None = None) -> dict[str, Callable[[], Finding]]:
    """All checks by name; the causes of a fault come before its effects."""
    return {
        "python": check_python,
        "nnunetv2": check_nnunet,
        "torch": check_torch,
        "torchvision": check_torchvision,
        **{variable: partial(check_folder, variable) for variable in FOLDERS},
        "variables": check_variables,
        "trainers": check_trainers,
        "pretraining": lambda: check_pretraining(device or _default_device()),
        "segmentation": lambda: check_segmentation(device or _default_device()),
    }


def examine(device: str | None = None, only: Sequence[str] | None = None, mend: bool = False) -> int:
    """Runs the checks and prints a line for each.

    Args:
        device: for the test of the networks; None: cuda, mps or cpu, the first that is available.
        only: names of the checks to run; None: all.
        mend: reinstall a torchvision that does not match torch.

    Returns:
        exit status: 1 if a check failed, 2 if ``only`` names a check that does not exist.
    """
    all_checks = checks(device)
    unknown = [name for name in only or () if name not in all_checks]
    if unknown:
        print(f"no check has the name {', '.join(unknown)}: choose from {', '.join(all_checks)}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # warnings of the libraries would stand between the lines
    failed = 0
    for name in only or all_checks:
        try:
            finding = all_checks[name]()
        except Exception as error:  # an error in a check is a fault of the installation
            finding = Finding(name, "FAIL", error_text(error), "fix the checks that fail above first")
        if mend and name == "torchvision" and finding.status == "FAIL" and MEND_OPTION in finding.mend:
            print(finding, flush=True)
            finding = mend_torchvision()
        print(finding, flush=True)
        failed += finding.status == "FAIL"
    return 1 if failed else 0
