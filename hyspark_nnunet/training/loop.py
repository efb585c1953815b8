"""nnU-Net's training loop, which can be interrupted and resumed at any step."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from hyspark_nnunet.checkpoints.storage import plain
from hyspark_nnunet.recipe.recipe import Recipe
from hyspark_nnunet.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS
from hyspark_nnunet.training.runtime.randomness import generator_states, restore_generators, seed_generators
from hyspark_nnunet.training.runtime.ranks import (
    any_rank,
    every_rank,
    from_torchrun,
    global_rank,
    of_first_rank,
    world_size,
)
from hyspark_nnunet.training.runtime.signals import StopRequest, command_to_continue, leave_on_signal
from hyspark_nnunet.training.stepping import NonFiniteLoss, take_step

VALIDATION_LEFT = (
    f"The training is finished, {FINAL} is written. To run only the validation: the same command with --val"
)

EARLIER_KEPT = "The folder holds the checkpoints of an earlier training, which --c continues"


class TrainingLoop(nnUNetTrainer):
    """Epochs, steps, what happens between them, and how a training is interrupted.

    Seed, epoch and rank determine what an epoch draws; a checkpoint holds what an interrupted epoch has done.
    """

    recipe: Recipe
    _best_ema: float | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_generator = torch.Generator()
        self.seed = of_first_rank(self.mask_generator.seed()) if self.recipe.seed is None else self.recipe.seed
        self.stop = StopRequest()
        self._iteration_in_epoch = 0
        self._nonfinite_in_row = 0
        self._skipped_in_epoch = 0
        self._known_unreadable: set[str] = set()
        # outputs of this epoch's steps
        self._train_outputs: list[dict] = []
        # state of an interrupted epoch, from its checkpoint
        self._inside_epoch: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        """Number of this process among all that train together, on all machines."""
        return global_rank()

    # --------------------------------------------------------------------------------- supplied by a subclass

    def batch_loss(self, batch: dict) -> Tensor:
        """Forward and loss of a batch."""
        raise NotImplementedError

    def gradient_clip(self) -> float:
        """Gradients of a larger L2 norm are scaled down to it."""
        raise NotImplementedError

    def drop_gradients(self) -> None:
        """Removes gradients that must not change any weight."""

    def advance_schedule(self) -> None:
        """Sets the learning rate of this step."""
        raise NotImplementedError

    def would_hide_earlier_training(self) -> bool:
        """Does the folder hold checkpoints that this training neither wrote nor resumes?"""
        raise NotImplementedError

    def write_checkpoint(self, filename: str, epochs_done: int, inside_epoch: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint of ``epochs_done`` complete epochs and maybe a part of the next; only on rank 0.

        Raises:
            OSError: it cannot be written.
        """
        raise NotImplementedError

    def judge_epoch(self) -> bool:
        """Logs the validation of an epoch. Returns whether the epoch is the best so far."""
        raise NotImplementedError

    def picture_epoch(self, done: int) -> None:
        """Draws the pictures that are due after ``done`` epochs; on rank 0."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------- loop

    def run_training(self) -> None:
        """Trains to the end, or until SIGTERM or SIGUSR1: then a checkpoint is written and the process exits with 0.

        Mirrors nnUNetTrainer.run_training.
        """
        with self.stop:
            self.on_train_start()
            while self.current_epoch < self.num_epochs:
                self.on_epoch_start()
                self.on_train_epoch_start()
                self._resume_epoch()
                self._train_epoch()
                self.on_train_epoch_end(self._train_outputs)
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    self.on_validation_epoch_end(self._validate_epoch())
                self.on_epoch_end()
            self.on_train_end()
        if any_rank(self.stop.signal is not None):
            print(VALIDATION_LEFT)
            sys.exit(0)
        leave_on_signal(VALIDATION_LEFT)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._iteration_in_epoch = self._skipped_in_epoch = 0
        seed_generators(self.seed, self.current_epoch, self.rank, masks=self.mask_generator)

    def _resume_epoch(self) -> None:
        """Restores the state of an interrupted epoch; any other epoch begins at its start."""
        inside, self._inside_epoch, self._train_outputs = self._inside_epoch, None, []
        if inside is None:
            return
        self._iteration_in_epoch = inside["iterations"]
        states = inside["ranks"]
        if len(states) == world_size():
            state = states[self.rank]
            losses = state["losses"]
            restore_generators(state["generators"], self.mask_generator)
        else:
            self.print_to_log_file(
                f"The checkpoint was written by {len(states)} processes, now there are {world_size()}: crops and masks "
                "will differ from here on."
            )
            losses = np.mean([state["losses"] for state in states], axis=0).tolist()
            here = (self.current_epoch, self.rank, self._iteration_in_epoch)
            seed_generators(self.seed, *here, masks=self.mask_generator)
        self.print_to_log_file(f"Continuing after {self._iteration_in_epoch} steps of this epoch")
        self._train_outputs = [{"loss": loss} for loss in losses]

    def _train_epoch(self) -> None:
        while self._iteration_in_epoch < self.num_iterations_per_epoch:
            before = self._state_of_rank()
            batches = [self._draw(self.dataloader_train) for _ in range(self.recipe.gradient_accumulation)]
            self._stop_if_asked(before)
            self._train_outputs.append(self.train_step(*batches))

    def _validate_epoch(self) -> list[dict]:
        before = self._state_of_rank()
        outputs = []
        for _ in range(self.num_val_iterations_per_epoch):
            batch = self._draw(self.dataloader_val)
            self._stop_if_asked(before)
            outputs.append(self.validation_step(batch))
        return outputs

    def _draw(self, loader: Iterator[dict]) -> dict:
        """The next batch; logs each case that could not be read once."""
        try:
            batch = next(loader)
        except RuntimeError:
            # a queue that signals all processes of a job also ends the loader processes: no further batch is needed
            if self.stop.signal is None:
                raise
            return {}
        for case, fault in batch.get("unreadable", {}).items():
            if case not in self._known_unreadable:
                self._known_unreadable.add(case)
                self.print_to_log_file(f"WARNING: {fault}. Other cases are drawn instead.")
        return batch

    # ----------------------------------------------------------------------------------------------------- steps

    def train_step(self, *batches: dict) -> dict:
        """One optimizer step with the mean gradient of the batches.

        Raises:
            NonFiniteLoss: too many consecutive steps had a loss or gradient that is not finite; names the cases.
        """
        self.advance_schedule()
        self._iteration_in_epoch += 1
        step = take_step(
            self.network,
            self.optimizer,
            self.grad_scaler,
            self.batch_loss,
            batches,
            self.gradient_clip(),
            self.drop_gradients,
        )
        if step.taken:
            self._nonfinite_in_row = 0
            return {"loss": float(np.mean(step.losses))}
        # a new gradient scaler begins at a scale that is too large on purpose: its first steps are no fault
        self._nonfinite_in_row += not step.scale_lowered
        self._skipped_in_epoch += 1
        cases = sorted({str(case) for part in every_rank(_cases(batches)) for case in part})
        text = (
            f"loss or gradient of step {self._iteration_in_epoch} of epoch {self.current_epoch} is not finite; "
            f"cases of the batch: {', '.join(cases) or 'unknown'}"
        )
        if self._nonfinite_in_row > self.recipe.max_nonfinite_steps:
            self._end_on_nonfinite(text)
        way = f"; the gradient scale is lowered to {self.grad_scaler.get_scale():g}" if step.scale_lowered else ""
        self.print_to_log_file(f"WARNING: {text}. The step is skipped{way}.")
        return {"loss": float("nan")}

    def _end_on_nonfinite(self, text: str) -> None:
        # the step with this loss has no output yet
        self._train_outputs.append({"loss": float("nan")})
        if self._write_unless_it_hides(self._state_of_rank()):
            kept = f"{LATEST} holds the weights before them, {PREVIOUS} those of the save before that"
        else:
            kept = f"No checkpoint is written. {EARLIER_KEPT}"
        raise NonFiniteLoss(
            f"{text}. This happened in {self._nonfinite_in_row} consecutive steps, more than max_nonfinite_steps "
            f"{self.recipe.max_nonfinite_steps}. {kept}. Check the cases for NaN voxels, or lower the learning rate; "
            "then resume with --c"
        )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Mirrors nnUNetTrainer.on_train_epoch_end, without the steps that were skipped."""
        losses = [loss for part in every_rank([output["loss"] for output in train_outputs]) for loss in part]
        finite = [loss for loss in losses if np.isfinite(loss)]
        self.logger.log("train_losses", float(np.mean(finite)) if finite else float("nan"), self.current_epoch)
        if self._skipped_in_epoch:
            self.print_to_log_file(f"{self._skipped_in_epoch} steps of this epoch were skipped (see above).")

    def on_epoch_end(self) -> None:
        """Logs, checkpoints and pictures. Mirrors nnUNetTrainer.on_epoch_end.

        nnU-Net writes the latest checkpoint before it knows whether the epoch was the best: a training resumed from it
        would compare with an outdated value.
        """
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        # the types that a checkpoint restores: nnU-Net averages its Dice in float32 or float64, as the earlier values
        self.logger.load_checkpoint(plain(self.logger.get_checkpoint()))
        train_loss, val_loss, start, end = (
            self.logger.get_value(key, step=-1)
            for key in ("train_losses", "val_losses", "epoch_start_timestamps", "epoch_end_timestamps")
        )
        self.print_to_log_file("train_loss", np.round(train_loss, decimals=4))
        self.print_to_log_file("val_loss", np.round(val_loss, decimals=4))
        best_before = self._best_ema
        best = self.judge_epoch()
        self.print_to_log_file(f"Epoch time: {np.round(end - start, decimals=2)} s")
        done = self.current_epoch + 1
        due = (BEST, best), (LATEST, done % self.save_every == 0 and done != self.num_epochs)
        for name in (name for name, is_due in due if is_due):
            written = False
            with self.warn_if_not_written(name):
                self.write_checkpoint(str(Path(self.output_folder, name)), done)
                written = True
            if name == BEST and not written:
                # later epochs are compared with the one in the file
                self._best_ema = best_before
        if self.rank == 0:
            with self.warn_if_not_written("pictures"):
                self.picture_epoch(done)
        self.current_epoch += 1

    @contextmanager
    def warn_if_not_written(self, what: str) -> Iterator[None]:
        """Logs what cannot be written and goes on: there may be room for the next checkpoint or picture."""
        try:
            yield
        except OSError as error:
            self.print_to_log_file(f"WARNING: {what} not written: {error}. The training goes on.")

    # --------------------------------------------------------------------------------- state and interruption

    def loop_state(self, epochs_done: int, inside_epoch: dict[str, Any] | None) -> dict[str, Any]:
        """The loop's entries in a checkpoint."""
        return {
            "current_epoch": epochs_done,
            "inside_epoch": inside_epoch,
            "seed": self.seed,
            "_best_ema": self._best_ema,
        }

    def load_loop_state(self, checkpoint: dict[str, Any]) -> None:
        """The other side of ``loop_state``; earlier checkpoints have no seed and nothing of an unfinished epoch."""
        self.current_epoch = checkpoint["current_epoch"]
        self._inside_epoch = checkpoint.get("inside_epoch")
        self.seed = checkpoint.get("seed", self.seed)
        self._best_ema = checkpoint["_best_ema"]

    def _state_of_rank(self) -> dict[str, Any]:
        """The state of this process in a checkpoint inside an epoch."""
        losses = [output["loss"] for output in self._train_outputs]
        return {"losses": losses, "generators": generator_states(self.mask_generator)}

    def _write_inside_epoch(self, state: dict[str, Any]) -> None:
        inside = {"iterations": self._iteration_in_epoch, "ranks": every_rank(state)}
        self.write_checkpoint(str(Path(self.output_folder, LATEST)), self.current_epoch, inside)

    def _write_unless_it_hides(self, state: dict[str, Any]) -> bool:
        """Writes a checkpoint, but not in the first epoch if the folder holds an earlier training.

        Its user may have forgotten ``--c``, which would then resume the new training.
        """
        if self.current_epoch == 0 and self.would_hide_earlier_training():
            return False
        self._write_inside_epoch(state)
        return True

    def end_loader_processes(self) -> None:
        """Ends batchgenerators' processes, which would otherwise outlive the training."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()

    def _stop_if_asked(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint and exits if any process has received a signal.

        Args:
            state: of this process before the current batch was drawn; that batch is dropped.
        """
        if not any_rank(self.stop.signal is not None):
            return
        written = self._write_unless_it_hides(state)
        self.end_loader_processes()
        if self.rank == 0 and not written:
            self.print_to_log_file(
                f"Stopped in the first epoch; no checkpoint is written. {EARLIER_KEPT}; to train anew, move them away."
            )
        elif self.rank == 0:
            self.print_to_log_file(
                f"Stopped by {self.stop.signal or 'the signal of another process'} in epoch {self.current_epoch} after "
                f"{self._iteration_in_epoch} of {self.num_iterations_per_epoch} steps. To continue: "
                f"{command_to_continue(sys.argv, from_torchrun(), os.environ)}"
            )
        sys.exit(0)


def _cases(batches: tuple[dict, ...]) -> list[str]:
    return [str(case) for batch in batches for case in batch.get("keys", [])]
