"""The lines of a run's log that are worth keeping in the repository."""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.few_labels.work import ROOT, Work

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?: ")
KEPT = re.compile(
    r"\$ |This split has|No -pretrained_weights|No linear probe|Fold 'all'|Continuing|WARNING|Ended on|Stopped by"
    r"|Training done|Mean reconstruction loss|Mean Validation Dice"
)
EPOCH = re.compile(r"Epoch (\d+)$")
OF_EPOCH = re.compile(r"Current learning rate|train_loss|val_loss|Pseudo dice|probe_dice|Epoch time")
# from the first to the last line of the account of the weights
WEIGHTS_FIRST, WEIGHTS_LAST = "Weights from ", "of the encoder's parameters come from the file"


def key_lines(log: Path, work: Work) -> list[str]:
    """Commands, split, the account of the weights, first and last epoch, warnings, results; no path of this machine."""
    lines = [
        without_paths(STAMP.sub("", line.rstrip()), work)
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    numbers = [int(match[1]) for line in lines if (match := EPOCH.match(line))]
    shown = {min(numbers), max(numbers)} if numbers else set()
    return list(_chosen(lines, shown))


def _chosen(lines: list[str], epochs: set[int]) -> Iterator[str]:
    in_weights, in_epoch = False, False
    for line in lines:
        if match := EPOCH.match(line):
            in_epoch = int(match[1]) in epochs
            if in_epoch:
                yield line
        elif line.startswith(WEIGHTS_FIRST) or in_weights:
            in_weights = WEIGHTS_LAST not in line
            yield line
        elif KEPT.match(line) or (in_epoch and OF_EPOCH.match(line)):
            yield line


def without_paths(line: str, work: Work) -> str:
    """The line with $WORK and $REPOSITORY for the folders of this machine."""
    for path, name in ((work.root, "$WORK"), (ROOT, "$REPOSITORY"), (Path.home(), "$HOME")):
        line = line.replace(str(path), name)
    return line
