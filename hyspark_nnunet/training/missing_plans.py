"""A hint where nnU-Net stops at plans that do not exist yet.

nnU-Net finds the trainer first, then opens the plans file, then builds the trainer: the one place before a trainer's
own checks where a person who forgot to preprocess ends, with no more than "No such file or directory".
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def hint_for(error: BaseException) -> str | None:
    """What to do about a missing plans file or dataset.json of a preprocessed data set; None: it is another error."""
    if not isinstance(error, FileNotFoundError) or not error.filename:
        return None
    file = Path(str(error.filename))
    dataset = file.parent.name
    if file.suffix != ".json" or not dataset.startswith("Dataset"):
        return None
    command, planner = "nnUNetv2_plan_and_preprocess", ""
    if file.stem.startswith("nnUNetHySparK"):
        command, planner = "hyspark_nnunet plan_and_preprocess", f" (with the -preset or --like of '{file.stem}')"
    elif file.stem not in ("nnUNetPlans", "dataset"):
        planner = f" (with the planner that writes '{file.stem}')"
    return (
        f"{dataset} is not preprocessed yet: {file} does not exist. Run: {command} -d {int(dataset[7:10])} "
        f"-c 3d_fullres{planner}"
    )


def explain_missing_plans() -> None:
    """Prints the hint behind the traceback of a command that ends so."""
    earlier: Hook = sys.excepthook
    if earlier.__module__ == __name__:  # nnU-Net imports the plugin anew for every search
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, error, traceback)
        hint = hint_for(error)
        if hint is not None:
            print(f"\n{hint}", file=sys.stderr)

    sys.excepthook = hook
