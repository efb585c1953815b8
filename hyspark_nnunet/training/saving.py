"""The state of a training, to a checkpoint's dictionary and back."""

from pathlib import Path
from typing import Any

from nnunetv2.utilities.helpers import empty_cache
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.datasets.dataset_json import without_files
from hyspark_nnunet.training.checkpoint_folder import FINAL, CheckpointFolder, training_progress
from hyspark_nnunet.training.loop import TrainingLoop
from hyspark_nnunet.training.resuming import check_network, check_recipe, group_mismatch
from hyspark_nnunet.training.runtime.ranks import of_first_rank


class SavedTraining(TrainingLoop):
    """The loop with its checkpoints. A ``CheckpointFolder`` decides which files are written, kept and loaded."""

    network: Any
    was_initialized: bool
    # lists of the logger that do not hold a value per epoch
    logged_once: tuple[str, ...] = ()

    def __init__(self, plans: dict, *args: Any, **kwargs: Any) -> None:
        resume = bool(plans.get("continue_training", False))  # nnU-Net removes it from the plans
        super().__init__(plans, *args, **kwargs)
        self.checkpoints = CheckpointFolder(
            self.output_folder, resume, self.write_description_files, self.print_to_log_file
        )
        # why the loaded checkpoint's optimizer could not be restored; it matters only if training goes on
        self._optimizer_mismatch: str | None = None

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    # --------------------------------------------------------------------------------- supplied by a subclass

    def describe_network(self) -> dict[str, Any]:
        """What a checkpoint says about its network, for people and for messages."""
        raise NotImplementedError

    def write_description_files(self) -> None:
        """Writes what prediction and people need beside the checkpoints."""
        raise NotImplementedError

    def build_scheduler(self, optimizer: Any, curve_epochs: int) -> Any:
        """The schedule of learning rate and weight decay.

        Args:
            optimizer: of the training.
            curve_epochs: length of the training for which the schedule's curve was made.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which schedule it trains with")

    def schedule_mismatch(self, curve_epochs: int) -> str | None:
        """Why the recipe does not fit a schedule whose curve was made for that many epochs; None: it fits."""
        return None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is loaded: adapts what depends on how the checkpoint's training began."""

    # ------------------------------------------------------------------------------------------------- writing

    def state(self, epochs_done: int, inside_epoch: dict[str, Any] | None = None) -> dict[str, Any]:
        """nnU-Net's checkpoint, with everything that exact resuming needs; tensors, numbers and strings only."""
        arguments = self.my_init_kwargs
        return {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logged_until(epochs_done),
            "init_args": arguments | {"dataset_json": without_files(arguments["dataset_json"])},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "recipe": self.recipe.as_dict(),
            "hyspark": self.describe_network(),
            "schedule": self.lr_scheduler.state_dict(),
            **self.loop_state(epochs_done, inside_epoch),
        }

    def logged_until(self, epochs_done: int) -> dict[str, Any]:
        """The logger's lists without what an unfinished epoch has logged, which is logged again."""
        lists = self.logger.get_checkpoint()
        return {key: values if key in self.logged_once else values[:epochs_done] for key, values in lists.items()}

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's hook, called when an epoch is done but not yet counted."""
        self.write_checkpoint(filename, self.current_epoch + 1)

    def write_checkpoint(self, filename: str, epochs_done: int, inside_epoch: dict[str, Any] | None = None) -> None:
        if self.rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        self.checkpoints.write(self.state(epochs_done, inside_epoch), Path(filename))

    def would_hide_earlier_training(self) -> bool:
        return of_first_rank(bool(self.checkpoints.earlier_checkpoints()))

    def on_epoch_end(self) -> None:
        """The loop's; logs and pictures need the results folder, too."""
        if self.rank == 0:
            self.checkpoints.restore()
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Mirrors nnUNetTrainer.on_train_end; nothing is removed if the final checkpoint is not written."""
        self.write_checkpoint(str(Path(self.output_folder, FINAL)), self.current_epoch)
        if self.rank == 0 and not self.disable_checkpointing:
            self.checkpoints.remove_intermediate()
        self.end_loader_processes()
        empty_cache(self.device)
        self.print_to_log_file("Training done.")

    # ------------------------------------------------------------------------------------------------- reading

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Resumes from, or validates, a checkpoint of this trainer.

        With ``--c`` the newest intact checkpoint of the folder is taken, whichever nnU-Net names. Validation
        (``--val``) needs no optimizer: different parameter groups are an error only if training goes on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no intact checkpoint, or its network has another preset.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint, needs_optimizer = filename_or_checkpoint, True
        if isinstance(checkpoint, str):
            needs_optimizer = self.checkpoints.resumes
            # to the CPU, where AdamW counts its steps; the rest is copied to its device
            checkpoint = read_checkpoint(self.checkpoints.choose(Path(checkpoint)))
        check_recipe(checkpoint, self.recipe, self.print_to_log_file)
        check_network(checkpoint, self.describe_network())
        self.on_load_checkpoint(checkpoint)
        self._optimizer_mismatch = group_mismatch(checkpoint, self.optimizer.param_groups)
        if self._optimizer_mismatch is None and checkpoint.get("schedule"):
            self._optimizer_mismatch = self.schedule_mismatch(checkpoint["schedule"]["curve_epochs"])
        if needs_optimizer:
            self.check_optimizer_restored()
        self.load_state(checkpoint)
        self.checkpoints.adopt()

    def load_state(self, checkpoint: dict[str, Any]) -> None:
        """The other side of ``state``."""
        # not by nnU-Net's load_checkpoint: it executes what a file asks for, and fails if given a dictionary
        self.bare_network.load_state_dict(checkpoint["network_weights"])
        if self._optimizer_mismatch is None:
            self._resume_schedule(checkpoint)
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.my_init_kwargs = checkpoint["init_args"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self.load_loop_state(checkpoint)

    def check_optimizer_restored(self) -> None:
        """Refuses to train with an optimizer that does not fit the loaded checkpoint.

        Raises:
            ValueError: its parameter groups or its schedule differ.
        """
        if self._optimizer_mismatch is not None:
            raise ValueError(self._optimizer_mismatch)

    def _resume_schedule(self, checkpoint: dict[str, Any]) -> None:
        """Goes on at the learning rate that was reached, even if num_epochs has changed."""
        state = checkpoint.get("schedule")
        if state is None:
            return
        epochs, steps = training_progress(checkpoint)
        self.lr_scheduler = self.build_scheduler(self.optimizer, state["curve_epochs"])
        self.lr_scheduler.continue_from(state, epochs + steps / self.num_iterations_per_epoch)
        if state["num_epochs"] != self.num_epochs:
            self.print_to_log_file(
                f"num_epochs was {state['num_epochs']} and is now {self.num_epochs}: the rest of the learning rate's "
                f"curve, from {self.lr_scheduler.progress(epochs):.0%} on, is stretched over the remaining epochs."
            )
