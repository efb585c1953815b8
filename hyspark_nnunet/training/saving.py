"""What a training leaves on the disk: checkpoints that are whole or not there, and the files beside them."""

import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.helpers import empty_cache
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.atomic_files import remove_half_written, replacing
from hyspark_nnunet.checkpoints.storage import read_checkpoint, write_atomically
from hyspark_nnunet.checkpoints.transfer import differences
from hyspark_nnunet.datasets.dataset_json import without_files
from hyspark_nnunet.recipe.fields import text_of, variable_name
from hyspark_nnunet.recipe.recipe import save_recipe
from hyspark_nnunet.training.continuing import FINAL, LATEST, PREVIOUS, keep_as_previous, newest_whole, progress_of
from hyspark_nnunet.training.loop import TrainingLoop
from hyspark_nnunet.training.runtime.ranks import of_first_rank

# recipe fields that a network is built from: stored in the results' plans.json, where prediction finds them
NETWORK_FIELDS = ("preset", "decoder_width")
# with another value the same weights mean something else
FIXED_FIELDS = (*NETWORK_FIELDS, "standardise_targets")
# what differs in these is told elsewhere, or comes from the checkpoint
TOLD_FIELDS = ("num_epochs", "seed")
# of a checkpoint's description, what its weights' shapes and the strides between them follow from
SIZES = (
    "input_channels",
    "n_stages",
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "n_blocks_per_stage",
    "expansion_per_stage",
    "vit_n_blocks",
)


class SavedTraining(TrainingLoop):
    """The loop with its checkpoints: written whole, the last two kept, the newest whole one continued."""

    network: Any
    was_initialized: bool
    # epochs for which the learning-rate curve was drawn first
    curve_epochs: int
    # lists of the logger that do not hold a value per epoch
    logged_once: tuple[str, ...] = ()

    def __init__(self, plans: dict, *args: Any, **kwargs: Any) -> None:
        # of --c; nnU-Net takes it out of the plans
        self._continue = bool(plans.get("continue_training", False))
        super().__init__(plans, *args, **kwargs)
        self._started_from: str | None = None
        self._may_overwrite = False
        self._latest_is_whole = False
        # why the optimizer could not be restored from a checkpoint that is validated alone
        self._unfit_optimizer: ValueError | None = None

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def describe_network(self) -> dict[str, Any]:
        """What a checkpoint says of its network, for people and for messages."""
        raise NotImplementedError

    def build_scheduler(self, optimizer: Any) -> Any:
        """The schedule of learning rate and weight decay."""
        raise NotImplementedError(f"{type(self).__name__} does not say which schedule it trains with")

    # ------------------------------------------------------------------------------------------------- writing

    def begin_files_beside(self) -> None:
        """Writes them, unless the folder's checkpoints are of an earlier training, which they describe till then."""
        if not self._earlier_checkpoints():
            self.write_files_beside()

    def write_files_beside(self) -> None:
        """What prediction and people need beside the checkpoints."""
        save_recipe(self.recipe, Path(self.output_folder) / "recipe.json")
        base = Path(self.output_folder_base)
        # all folds share these, and may begin at the same time
        described = {"plans.json": self.plans_manager.plans, "dataset.json": without_files(self.dataset_json)}
        for name, content in described.items():
            with replacing(base / name) as beside:
                save_json(content, str(beside), sort_keys=False)
        fingerprint = Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json"
        with replacing(base / fingerprint.name) as beside:
            shutil.copyfile(fingerprint, beside)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        """nnU-Net's; makes the results folder anew where somebody removed it under the training."""
        folder = Path(self.output_folder)
        if self.local_rank == 0 and self.was_initialized and not folder.is_dir():
            try:
                folder.mkdir(parents=True)
                self.write_files_beside()
            except OSError as error:
                print(f"WARNING: the results folder {folder} is gone, and cannot be made anew: {error}")
            else:
                super().print_to_log_file(
                    f"WARNING: the results folder {folder} was gone, and is made anew. The training goes on; earlier "
                    "checkpoints and logs are lost if nobody moved them."
                )
        super().print_to_log_file(*args, **kwargs)

    def logged_until(self, epochs_done: int) -> dict[str, Any]:
        """The logger's lists without what an unfinished epoch has logged, which is logged again."""
        lists = self.logger.get_checkpoint()
        return {key: values if key in self.logged_once else values[:epochs_done] for key, values in lists.items()}

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's hook, called when an epoch is done but not yet counted."""
        self.write_checkpoint(filename, self.current_epoch + 1)

    def write_checkpoint(self, filename: str, epochs_done: int, inside_epoch: dict[str, Any] | None = None) -> None:
        """nnU-Net's checkpoint, with all that going on exactly needs; tensors, numbers and strings only."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logged_until(epochs_done),
            "_best_ema": self._best_ema,
            "current_epoch": epochs_done,
            "init_args": self.my_init_kwargs | {"dataset_json": without_files(self.my_init_kwargs["dataset_json"])},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "recipe": self.recipe.as_dict(),
            "hyspark": self.describe_network(),
            "seed": self.seed,
            "schedule": {"curve_epochs": self.curve_epochs, **self.lr_scheduler.state_dict()},
            "inside_epoch": inside_epoch,
        }
        path = Path(filename)
        try:
            self._set_aside_earlier_checkpoints()
            if path.name == LATEST and self._latest_is_whole and path.is_file():
                keep_as_previous(path)
            write_atomically(checkpoint, path)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            raise OSError(f"{path} cannot be written ({_reason(error, path.parent)})") from error
        self._latest_is_whole = self._latest_is_whole or path.name == LATEST

    def _set_aside_earlier_checkpoints(self) -> None:
        """A training that does not continue (--c) would overwrite them: hours of somebody's work.

        Not before there is a new one to write: till then, whoever forgot --c can stop and continue.
        """
        if earlier := self._earlier_checkpoints():
            aside = Path(self.output_folder) / f"earlier_{datetime.now():%Y-%m-%d_%H-%M-%S}"
            aside.mkdir(exist_ok=True)
            self.write_files_beside()
            for file in earlier:
                file.rename(aside / file.name)
            self.print_to_log_file(
                f"This folder holds checkpoints of an earlier training. They are kept in {aside}. (To continue it: --c)"
            )
        self._may_overwrite = True  # not before: what failed is tried again at the next save

    def _earlier_checkpoints(self) -> list[Path]:
        """The folder's checkpoints that this training neither wrote nor continues."""
        return [] if self._may_overwrite else sorted(Path(self.output_folder).glob("checkpoint_*.pth"))

    def on_train_end(self) -> None:
        """Mirrors nnUNetTrainer.on_train_end; nothing is removed where the final checkpoint is not written."""
        self.current_epoch -= 1  # it is counted already
        self.save_checkpoint(str(Path(self.output_folder, FINAL)))
        self.current_epoch += 1
        if self.local_rank == 0 and not self.disable_checkpointing:
            for name in (LATEST, PREVIOUS):
                Path(self.output_folder, name).unlink(missing_ok=True)
        self.end_loader_processes()
        empty_cache(self.device)
        self.print_to_log_file("Training done.")

    # ------------------------------------------------------------------------------------------------- reading

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continues from, or validates, a checkpoint of this trainer.

        With --c the newest whole checkpoint of the folder is taken, whichever nnU-Net names. A validation (--val) needs
        no optimizer: one whose groups differ is an error once it is to train.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no whole checkpoint, or its network has another preset.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint, to_validate = filename_or_checkpoint, False
        if isinstance(checkpoint, str):
            to_validate = not self._continue
            # to the CPU, where AdamW counts its steps; the rest is copied to where it belongs
            checkpoint = read_checkpoint(self._choose(Path(checkpoint)))
        self._compare_recipe(checkpoint.get("recipe", {}))
        sizes = {key: value for key, value in self.describe_network().items() if key in SIZES}
        differing = differences(checkpoint.get("hyspark", {}), sizes)
        if differing:
            raise ValueError("the checkpoint does not fit the plan as it is now:\n" + "\n".join(differing))
        self._unfit_optimizer = None
        self.follow_optimizer(checkpoint)
        try:
            self._check_same_groups(checkpoint)
        except ValueError as error:
            if not to_validate:
                raise
            self._unfit_optimizer = error
        # not by nnU-Net's load_checkpoint: it executes what a file asks for, and fails where it is given a dictionary
        self.bare_network.load_state_dict(checkpoint["network_weights"])
        if self._unfit_optimizer is None:
            self._continue_schedule(checkpoint)
            self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.current_epoch = checkpoint["current_epoch"]
        self._inside_epoch = checkpoint.get("inside_epoch")
        self.seed = checkpoint.get("seed", self.seed)
        self._best_ema = checkpoint["_best_ema"]
        self.my_init_kwargs = checkpoint["init_args"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self._started_from, self._may_overwrite = "checkpoint", True

    def begin(self) -> None:
        """From now on it trains, and what is loaded later is what was asked for (--val_best), not the newest.

        Raises:
            ValueError: the optimizer could not be restored from the checkpoint that was loaded.
        """
        self._continue = False
        if self._unfit_optimizer is not None:
            raise self._unfit_optimizer

    def _compare_recipe(self, trained: Mapping[str, Any]) -> None:
        """Names what differs from the recipe of a checkpoint: variables are easily left out in a new shell.

        Raises:
            ValueError: the weights mean something else with this recipe.
        """
        here = self.recipe.as_dict()
        other = {name: trained[name] for name in here if name in trained and trained[name] != here[name]}
        for name in FIXED_FIELDS:
            if name in other:
                raise ValueError(
                    f"the checkpoint was trained with {name} {text_of(other[name])}, but the recipe says "
                    f"{text_of(here[name])}; set {variable_name(name)}={text_of(other[name])}"
                )
        told = {name: text_of(value) for name, value in other.items() if name not in TOLD_FIELDS}
        if told:
            differing = ", ".join(f"{name} {text_of(here[name])} (there: {value})" for name, value in told.items())
            variables = " ".join(f"{variable_name(name)}={value}" for name, value in told.items())
            self.print_to_log_file(
                f"WARNING: this recipe is not that of the checkpoint: {differing}. To go on as before: {variables}"
            )

    def _choose(self, named: Path) -> Path:
        """The file to load where nnU-Net names this one."""
        going_on, self._continue = self._continue, False
        if not going_on or named.parent != Path(self.output_folder):
            return named
        # one process decides: 64 need not read every file, and must not disagree
        choice: tuple[Path, list[str]] = (named, [])
        if self.local_rank == 0:
            remove_half_written(named.parent)
            choice = newest_whole(named.parent)
        path, faults = of_first_rank(choice)
        for fault in faults:
            self.print_to_log_file(f"WARNING: {fault}. It is passed over.")
        self.print_to_log_file(f"Continuing from {path}")
        self._latest_is_whole = path.name == LATEST
        return path

    def _continue_schedule(self, checkpoint: dict[str, Any]) -> None:
        """Goes on at the learning rate that was reached, also where num_epochs is another now."""
        state = checkpoint.get("schedule")
        if state is None:
            return
        epochs, steps = progress_of(checkpoint)
        self.curve_epochs = state["curve_epochs"]
        self.lr_scheduler = self.build_scheduler(self.optimizer)
        self.lr_scheduler.continue_from(state, epochs + steps / self.num_iterations_per_epoch)
        if state["num_epochs"] != self.num_epochs:
            self.print_to_log_file(
                f"num_epochs was {state['num_epochs']} and is {self.num_epochs}: what was left of the learning rate's "
                f"curve, from {self.lr_scheduler.progress(epochs):.0%} on, is stretched over the epochs that are left."
            )

    def follow_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Makes the optimizer anew where it follows from how the checkpoint's training began, not from the recipe."""

    def _check_same_groups(self, checkpoint: dict[str, Any]) -> None:
        """PyTorch's own message on other groups does not say what to do."""
        trained = [group.get("name") for group in checkpoint["optimizer_state"]["param_groups"]]
        here = [group.get("name") for group in self.optimizer.param_groups]
        if trained != here:
            raise ValueError(
                f"the checkpoint was trained with the parameter groups {', '.join(map(str, trained))}, but this recipe "
                f"makes {', '.join(map(str, here))}: set layer_decay, encoder_hold_epochs and decoder_warmup_epochs as "
                "they were (the checkpoint's recipe: hyspark_nnunet checkpoint inspect)"
            )


def _reason(error: Exception, folder: Path) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    try:
        return f"{lines[0]}; {shutil.disk_usage(folder).free / 1e6:,.0f} MB free in {folder}"
    except OSError:
        return lines[0]
