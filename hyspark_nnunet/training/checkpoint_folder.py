"""The folder of a fold's checkpoints: what is written to it, what is kept, and which checkpoint a training resumes."""

import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hyspark_nnunet.atomic_files import remove_half_written, replacing
from hyspark_nnunet.checkpoints.storage import check_whole, read_checkpoint, write_atomically
from hyspark_nnunet.training.runtime.ranks import is_first_rank, of_first_rank

FINAL, LATEST, PREVIOUS, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "previous", "best"))


class CheckpointFolder:
    """Checkpoints of one training, and of nobody else.

    - The latest checkpoint is kept as the previous one when a new one is written.
    - Checkpoints of an earlier training are moved to a folder of their own before the first one is written.
    - ``--c`` resumes from the intact checkpoint with the most training steps, whichever nnU-Net names.

    Files are written by the first rank only; the caller sees to that.

    Args:
        path: of the folder.
        resume: ``--c`` was given.
        write_description: writes the files that describe the folder's checkpoints (plans, recipe).
        log: writes a line to the training log.
    """

    def __init__(
        self, path: str | Path, resume: bool, write_description: Callable[[], None], log: Callable[[str], object]
    ) -> None:
        self.path = Path(path)
        self._resume = resume
        self._write_description = write_description
        self._log = log
        # the checkpoints in the folder are this training's: it has written them, or it was loaded from one
        self._is_ours = False
        # this training has written or loaded the latest checkpoint: it is worth keeping
        self._latest_is_intact = False

    # ------------------------------------------------------------------------------------------------- writing

    def write_description(self) -> None:
        """Writes the files that describe the checkpoints, unless they still describe those of an earlier training."""
        if not self.earlier_checkpoints():
            self._write_description()

    def restore(self) -> None:
        """Creates the folder again if somebody removed it during the training."""
        if self.path.is_dir():
            return
        try:
            self.path.mkdir(parents=True)
            self._write_description()
        except OSError as error:
            print(f"WARNING: the results folder {self.path} is gone and cannot be created again: {error}")
        else:
            self._log(
                f"WARNING: the results folder {self.path} was gone and has been created again. The training goes on; "
                "earlier checkpoints and logs are lost unless somebody moved them."
            )

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Writes a checkpoint completely or not at all, usually into this folder.

        Raises:
            OSError: it cannot be written; says why, and how much space is left.
        """
        self.restore()
        try:
            self._set_aside_earlier_checkpoints()
            if path.name == LATEST and self._latest_is_intact and path.is_file():
                self._keep_as_previous(path)
            write_atomically(checkpoint, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise OSError(f"{path} cannot be written ({_reason(error, path.parent)})") from error
        self._latest_is_intact = self._latest_is_intact or path.name == LATEST

    def remove_intermediate(self) -> None:
        """Removes what is needed only until the final checkpoint is written."""
        for name in (LATEST, PREVIOUS):
            (self.path / name).unlink(missing_ok=True)

    def earlier_checkpoints(self) -> list[Path]:
        """Checkpoints in the folder that this training neither wrote nor resumes."""
        return [] if self._is_ours else sorted(self.path.glob("checkpoint_*.pth"))

    def _set_aside_earlier_checkpoints(self) -> None:
        """Moves the checkpoints that a training without ``--c`` would overwrite: hours of somebody's work.

        Not before there is a new one to write, which is after the first epoch: until then, a user who forgot ``--c``
        can stop and resume.
        """
        if earlier := self.earlier_checkpoints():
            aside = self.path / f"earlier_{datetime.now():%Y-%m-%d_%H-%M-%S}"
            aside.mkdir(exist_ok=True)
            self._write_description()
            for file in earlier:
                file.rename(aside / file.name)
            self._log(
                f"This folder held checkpoints of an earlier training, now in {aside}. (--c would have resumed it.)"
            )
        self._is_ours = True  # not before: if moving failed, the next write tries again

    def _keep_as_previous(self, latest: Path) -> None:
        """Gives the latest checkpoint a second name, which it keeps when the next one replaces it."""
        with replacing(self.path / PREVIOUS) as beside:
            try:
                os.link(latest, beside)
            except OSError:  # a file system without hard links
                shutil.copy2(latest, beside)

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def resumes(self) -> bool:
        """Does the next load resume the training?"""
        return self._resume

    def stop_resuming(self) -> None:
        """From now on the file that is asked for is loaded (``--val_best``), not the one to resume from."""
        self._resume = False

    def choose(self, requested: Path) -> Path:
        """The file to load when nnU-Net requests one: with ``--c``, once, the one to resume from.

        The first rank decides: the others need not read every file, and must not disagree.

        Raises:
            ValueError: no checkpoint is intact.
        """
        resume, self._resume = self._resume, False
        if not resume or requested.parent != self.path:
            return requested
        choice: tuple[Path, list[str]] = (requested, [])
        if is_first_rank():
            remove_half_written(self.path)
            choice = newest_intact(self.path)
        path, faults = of_first_rank(choice)
        for fault in faults:
            self._log(f"WARNING: {fault}. This file is skipped.")
        self._log(f"Continuing from {path}")
        self._latest_is_intact = path.name == LATEST
        return path

    def adopt(self) -> None:
        """A checkpoint was loaded: the folder's checkpoints belong to this training now."""
        self._is_ours = True

    @property
    def is_ours(self) -> bool:
        """Has this training written or loaded a checkpoint?"""
        return self._is_ours


def training_progress(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Finished epochs, and steps of the next one."""
    return checkpoint["current_epoch"], (checkpoint.get("inside_epoch") or {}).get("iterations", 0)


def newest_intact(folder: str | Path) -> tuple[Path, list[str]]:
    """The intact checkpoint of a folder with the most training steps.

    nnU-Net takes the final one, then the latest, then the best, whatever they contain.

    Returns:
        the file, and what is wrong with the files that were skipped.

    Raises:
        ValueError: none is intact, or a file cannot be opened.
    """
    faults, found = [], []
    for name in (FINAL, LATEST, PREVIOUS, BEST):
        path = Path(folder) / name
        if path.is_file():
            try:
                # only its numbers are read here
                found.append((training_progress(read_checkpoint(path, mmap=True)), path))
            except OSError as error:  # it may be intact and the newest: an older one must not replace it
                raise ValueError(
                    f"{path} cannot be read ({error.strerror or error}): make it readable, or move it away to resume "
                    "another checkpoint"
                ) from error
            except (ValueError, KeyError, AttributeError) as error:
                faults.append(str(error) if isinstance(error, ValueError) else f"{path} is not a training checkpoint")
    for _, path in sorted(found, key=lambda entry: entry[0], reverse=True):
        try:
            check_whole(path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path, faults
    raise ValueError("there is no intact checkpoint to continue from:\n" + "\n".join(faults))


def _reason(error: Exception, folder: Path) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    try:
        return f"{lines[0]}; {shutil.disk_usage(folder).free / 1e6:,.0f} MB free in {folder}"
    except OSError:
        return lines[0]
