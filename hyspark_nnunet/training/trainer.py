"""What both trainers share: the recipe, the network's description, checkpoints, pre-trained weights."""

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from hyspark_nnunet.architectures.from_plans import check_preset
from hyspark_nnunet.checkpoints.description import describe_network
from hyspark_nnunet.checkpoints.storage import read_checkpoint, read_weights, write_atomically
from hyspark_nnunet.checkpoints.transfer import differences, transfer_weights
from hyspark_nnunet.training.optimization import describe_groups, parameter_groups
from hyspark_nnunet.training.recipe import FinetuneRecipe, PretrainRecipe, resolve_recipe, save_recipe, variable_name
from hyspark_nnunet.training.schedules import ProgressScheduler

# recipe fields that a network is built from: stored in the results' plans.json, where prediction finds them
NETWORK_FIELDS = ("preset", "decoder_width")
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


class HySparKTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a recipe, AdamW on a schedule, and checkpoints that are written whole or not at all.

    Args:
        plans: of nnU-Net; the configuration may carry a "hyspark" section (see ``recipe``).
        configuration: name of a configuration.
        fold: 0 to 4, or "all".
        dataset_json: of the data set.
        device: where to train.

    Raises:
        ValueError: the recipe, the configuration or the patch size is not possible; names the value.
    """

    recipe_class: ClassVar[type[PretrainRecipe] | type[FinetuneRecipe]]
    # does the network end in heads for the data set's labels?
    has_heads: ClassVar[bool] = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        # before nnU-Net makes a folder or a log file
        settings = PlansManager(plans).get_configuration(configuration)
        self.recipe = resolve_recipe(self.recipe_class, settings.configuration.get("hyspark"))
        check_preset(settings, self.recipe.preset)
        self.check_configuration(settings, configuration)

        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.recipe.initial_lr
        self.weight_decay = self.recipe.weight_decay
        self.num_epochs = self.recipe.num_epochs
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.recipe.num_val_iterations_per_epoch
        self.oversample_foreground_percent = self.recipe.oversample_foreground_percent
        self.save_every = self.recipe.save_every
        self._iteration_in_epoch = 0
        self._started_from: str | None = None
        self._may_overwrite = False

    def check_configuration(self, settings: ConfigurationManager, name: str) -> None:
        """Refuses what this trainer cannot train, before anything is written.

        Raises:
            ValueError: names the value and the way out.
        """

    # ------------------------------------------------------------------------------------------------ network

    def initialize(self) -> None:
        """Builds network, optimizer and loss, as nnU-Net does, once the recipe is part of the plans."""
        if not self.was_initialized:
            self._check_preprocessed()
            self._check_same_network_as_other_folds()
            self._write_recipe_to_plans()
        super().initialize()
        self._route_pretrained_weights()
        self.print_to_log_file(f"\nRecipe of {type(self).__name__}:\n{self.recipe.describe()}\n", add_timestamp=False)

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def describe_network(self) -> dict[str, Any]:
        """What a checkpoint says of its network, for people and for messages."""
        return describe_network(
            self.configuration_manager,
            self.dataset_json,
            self.recipe.preset,
            self.num_input_channels,
            with_heads=self.has_heads,
            names={
                "dataset": self.plans_manager.dataset_name,
                "configuration": self.configuration_name,
                "plans": self.plans_manager.plans_name,
            },
        )

    def _check_preprocessed(self) -> None:
        folder = self.preprocessed_dataset_folder
        if folder is None or not Path(folder).is_dir() or not any(Path(folder).iterdir()):
            dataset_id = self.plans_manager.dataset_name[7:10].lstrip("0")
            raise FileNotFoundError(
                f"{self.plans_manager.dataset_name} is not preprocessed for configuration '{self.configuration_name}': "
                f"{folder} is missing or empty. Run: nnUNetv2_preprocess -d {dataset_id} "
                f"-c {self.configuration_name} -plans_name {self.plans_manager.plans_name}"
            )

    def _write_recipe_to_plans(self) -> None:
        """So that the results' plans.json, which prediction reads, says which network was trained."""
        fields = {name: value for name, value in self.recipe.as_dict().items() if name in NETWORK_FIELDS}
        plan, kind = self.configuration_manager.configuration.get("hyspark") or {}, self.recipe.kind
        section = {**plan, kind: {**plan.get(kind, {}), **fields}}
        self.plans_manager.plans["configurations"][self.configuration_name]["hyspark"] = section
        self.configuration_manager.configuration["hyspark"] = section
        if self.recipe.batch_size is not None:
            self.configuration_manager.configuration["batch_size"] = self.recipe.batch_size

    def _check_same_network_as_other_folds(self) -> None:
        """All folds share one plans.json: it can describe one network only."""
        folder = Path(self.output_folder_base)
        others = [f for f in folder.glob("fold_*/checkpoint_*.pth") if f.parent != Path(self.output_folder)]
        if not others or not (folder / "plans.json").is_file():
            return
        earlier = PlansManager(str(folder / "plans.json")).get_configuration(self.configuration_name)
        trained = resolve_recipe(self.recipe_class, earlier.configuration.get("hyspark"), environment={}).as_dict()
        for name, value in self.recipe.as_dict().items():
            if name in NETWORK_FIELDS and value != trained[name]:
                raise ValueError(
                    f"{folder} holds folds trained with {name} {trained[name]} ({others[0].parent.name}), but this "
                    f"recipe has {name} {value}: the folds share one plans.json, which describes one network. Set "
                    f"{variable_name(name)}={trained[name]}, or keep the new one apart by another plans name (-p) or "
                    f"results folder"
                )

    # ------------------------------------------------------------------------------------------- optimisation

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ProgressScheduler]:
        """AdamW; norms, biases and mask tokens do not decay."""
        # not of self.network: torch.compile's wrapper gives the parameters other names
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.initial_lr)
        scheduler = self.build_scheduler(optimizer)
        self.print_to_log_file(f"\n{describe_groups(optimizer, self.group_notes())}\n", add_timestamp=False)
        return optimizer, scheduler

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return parameter_groups(self.bare_network, self.weight_decay, self.initial_lr)

    def group_notes(self) -> dict[str, str]:
        """What the log says of the groups of a part, "encoder" or "decoder"."""
        return {}

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> ProgressScheduler:
        """The schedule of learning rate and weight decay."""
        raise NotImplementedError(f"{type(self).__name__} does not say which schedule it trains with")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._iteration_in_epoch = 0

    def advance_schedule(self) -> None:
        """Sets the learning rate of this iteration; nnU-Net sets it once an epoch, too coarse for a warm-up."""
        self.lr_scheduler.step(self.current_epoch + self._iteration_in_epoch / self.num_iterations_per_epoch)
        self._iteration_in_epoch += 1

    # -------------------------------------------------------------------------------------------- checkpoints

    def on_train_start(self) -> None:
        """As nnU-Net's; saves the recipe, too."""
        if not self.was_initialized:
            self.initialize()
        if self.local_rank == 0:
            save_recipe(self.recipe, Path(self.output_folder) / "recipe.json")
        if self._started_from is None:
            self.print_to_log_file("No -pretrained_weights given: training from random weights.")
        super().on_train_start()

    def _set_aside_earlier_checkpoints(self) -> None:
        """A training that does not continue (--c) would overwrite them: hours of somebody's work.

        Not before there is a new one to write: till then, whoever forgot --c can stop and continue.
        """
        earlier = sorted(Path(self.output_folder).glob("checkpoint_*.pth"))
        already, self._may_overwrite = self._may_overwrite, True
        if not earlier or already:
            return
        aside = Path(self.output_folder) / f"earlier_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        aside.mkdir()
        for file in earlier:
            file.rename(aside / file.name)
        self.print_to_log_file(
            f"This folder holds checkpoints of an earlier training. They are kept in {aside}. (To continue it: --c)"
        )

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the recipe and a description of the network; tensors, numbers and strings only."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoint = {
            "network_weights": self.bare_network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "recipe": self.recipe.as_dict(),
            "hyspark": self.describe_network(),
            **self.extra_state(),
        }
        self._set_aside_earlier_checkpoints()
        write_atomically(checkpoint, filename)

    def extra_state(self) -> dict[str, Any]:
        """What a trainer adds to its checkpoints."""
        return {}

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continues from, or validates, a checkpoint of this trainer.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no whole checkpoint, or its network has another preset.
        """
        if not self.was_initialized:
            self.initialize()
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = read_checkpoint(checkpoint, self.device)
        trained, here = checkpoint.get("recipe", {}), self.recipe.as_dict()
        for name in NETWORK_FIELDS:
            if name in here and name in trained and trained[name] != here[name]:
                raise ValueError(
                    f"the checkpoint was trained with {name} {trained[name]}, but the recipe says {here[name]}; "
                    f"set {variable_name(name)}={trained[name]}"
                )
        sizes = {key: value for key, value in self.describe_network().items() if key in SIZES}
        differing = differences(checkpoint.get("hyspark", {}), sizes)
        if differing:
            raise ValueError("the checkpoint does not fit the plan as it is now:\n" + "\n".join(differing))
        self._check_same_groups(checkpoint)
        # not by nnU-Net's load_checkpoint: it executes what a file asks for, and fails where it is given a dictionary
        self.bare_network.load_state_dict(checkpoint["network_weights"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.current_epoch = checkpoint["current_epoch"]
        self._best_ema = checkpoint["_best_ema"]
        self.my_init_kwargs = checkpoint["init_args"]
        self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
        self._started_from, self._may_overwrite = "checkpoint", True
        self.restore_extra_state(checkpoint)

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

    def restore_extra_state(self, checkpoint: dict[str, Any]) -> None:
        """The other side of ``extra_state``."""

    # --------------------------------------------------------------------------------------- pretrained weights

    def _route_pretrained_weights(self) -> None:
        """Lets ``-pretrained_weights`` load through ``checkpoints.transfer``.

        nnU-Net loads them by a function of its module ``run_training`` that demands every key with equal shape, and
        leaves a trainer no other hook. Only this trainer's network is rerouted.
        """
        stock: Callable[..., None] = run_training.load_pretrained_weights

        def load(network: nn.Module, fname: str, verbose: bool = False) -> None:
            if network is self.network:
                self.load_pretrained_weights(fname)
            else:
                stock(network, fname, verbose=verbose)

        # run as a script, nnU-Net's module has another name
        for name in (run_training.__name__, "__main__", "__mp_main__"):
            module = sys.modules.get(name)
            if getattr(module, "load_pretrained_weights", None) is stock:
                module.load_pretrained_weights = load  # type: ignore[union-attr]

    def load_pretrained_weights(self, path: str) -> None:
        """Starts the network from a file; prints and saves what was loaded, adapted, left at random and unused.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no checkpoint or does not fit; nothing is loaded then.
        """
        weights = read_weights(path)
        report = transfer_weights(
            self.bare_network,
            weights.state,
            path,
            weights.description,
            self.describe_network(),
            self.recipe.input_channel_mapping,
        )
        self._started_from = path
        self.print_to_log_file(f"\nWeights from {path} ({weights.origin}):\n{report.table()}\n", add_timestamp=False)
        if self.local_rank == 0:
            report.save(Path(self.output_folder) / "pretrained_weights_report.json", path)

    # ---------------------------------------------------------------------------------------------------- ranks

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks, joined."""
        if not self.is_ddp:
            return values
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]
