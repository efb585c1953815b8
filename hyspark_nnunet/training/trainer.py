"""What both trainers share: recipe, network, optimizer, the cases of a fold, pre-trained weights."""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from hyspark_nnunet.atomic_files import replacing
from hyspark_nnunet.building_blocks.depthwise import choose_memory_formats, depthwise_convolutions
from hyspark_nnunet.building_blocks.recomputation import set_recomputation
from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.checkpoints.storage import read_weights
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from hyspark_nnunet.cpu_allocator import keep_freed_memory
from hyspark_nnunet.datasets.dataset_json import without_files
from hyspark_nnunet.datasets.preprocessed import check_holds_cases, preprocess_command
from hyspark_nnunet.datasets.subjects import recorded_subjects, write_splits
from hyspark_nnunet.masking import mask_grid, unit_size
from hyspark_nnunet.recipe.recipe import Recipe, save_recipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.data.fold_cases import (
    N_FOLDS,
    SPLITS,
    check_can_be_split,
    check_fold,
    check_fold_is_preprocessed,
    listed_cases,
    missing_cases,
    raw_folder_of,
)
from hyspark_nnunet.training.distributed import DistributedTraining
from hyspark_nnunet.training.network_family import NetworkFamily
from hyspark_nnunet.training.optimization import describe_groups, parameter_groups
from hyspark_nnunet.training.pretrained_weights import route_pretrained_weights
from hyspark_nnunet.training.resuming import check_other_folds
from hyspark_nnunet.training.runtime.ranks import of_first_rank
from hyspark_nnunet.training.schedules import ProgressScheduler


class RecipeTrainer(DistributedTraining):
    """nnU-Net's trainer with a recipe, AdamW on a schedule, and ``-pretrained_weights`` that adapt to the network.

    Args:
        plans: of nnU-Net; the configuration may have a "hyspark" section (see ``recipe``).
        configuration: name of a configuration.
        fold: 0 to 4, or "all".
        dataset_json: of the dataset.
        device: where to train.

    Raises:
        ValueError: recipe, configuration or patch size cannot be trained; names the value and what to do.
    """

    recipe_class: ClassVar[type[Recipe]]
    # the networks that a subclass trains
    family: ClassVar[NetworkFamily]
    # does the network end in heads for the dataset's labels?
    has_heads: ClassVar[bool] = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        if not nnUNet_results.is_set():  # nnU-Net would fail with a TypeError
            raise ValueError(
                "nnUNet_results is not set: export nnUNet_results=FOLDER, the folder that trainings are written to"
            )
        # before nnU-Net creates a folder or a log file
        settings = PlansManager(plans).get_configuration(configuration)
        section = self.family.section(settings.configuration)
        self.recipe = resolve_recipe(self.recipe_class, section, section_words=self.family.section_words)
        self.check_configuration(settings, configuration)

        super().__init__(plans, configuration, fold, dataset_json, device)
        self.autocast_dtype = self.choose_autocast_dtype()
        if self.autocast_dtype != torch.float16:
            self.grad_scaler = None  # nnU-Net's; other types have float32's range
        self.initial_lr = self.recipe.initial_lr
        self.weight_decay = self.recipe.weight_decay
        self.num_epochs = self.recipe.num_epochs
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.recipe.num_val_iterations_per_epoch
        self.oversample_foreground_percent = self.recipe.oversample_foreground_percent
        self.save_every = self.recipe.save_every
        # the file of -pretrained_weights
        self.pretrained_weights: str | None = None

    def check_configuration(self, settings: ConfigurationManager, name: str) -> None:
        """Refuses what this trainer cannot train, before anything is written.

        Raises:
            ValueError: names the value and what to do.
        """
        self.recipe.refuse(self.family.without_meaning(self.recipe))
        self.family.check(settings, self.recipe)
        mask_grid(settings.patch_size, unit_size(self.family.strides(settings, self.recipe)))

    @property
    def strides(self) -> Sequence[Sequence[int]]:
        """Strides of the encoder's stages, per axis."""
        return self.family.strides(self.configuration_manager, self.recipe)

    # ------------------------------------------------------------------------------------------------ network

    def initialize(self) -> None:
        """Writes the recipe into the plans, then builds network, optimizer and loss.

        Mirrors nnUNetTrainer.initialize, whose DDP is limited to one machine.

        Raises:
            RuntimeError: it was called before.
        """
        if self.was_initialized:
            raise RuntimeError("initialize was called twice: a trainer builds its network once")
        self._check_preprocessed()
        check_other_folds(Path(self.output_folder), self.configuration_name, self.recipe, self.family.section)
        self._write_recipe_to_plans()
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        if self.recipe.seed is not None:
            torch.manual_seed(self.recipe.seed)
        self.network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        set_recomputation(self.network, self.recipe.activation_checkpointing)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            self.choose_memory_formats()
        self.compile_network()
        self.reset_optimizer()
        if self.is_ddp:
            self.distribute_network()
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True
        self.logger.update_config({"hparas": {**self.recipe.as_dict(), "batch_size": self.global_batch_size}})
        route_pretrained_weights(self)
        recipe = self.recipe.describe(unused=self.family.without_meaning(self.recipe))
        self.print_to_log_file(f"\nRecipe of {type(self).__name__}:\n{recipe}\n", add_timestamp=False)

    def choose_memory_formats(self) -> None:
        """Measures which memory format is faster for the depth-wise convolutions, and logs it; nothing without any."""
        convolutions = depthwise_convolutions(self.network)
        if not convolutions:
            return
        patch_size = self.configuration_manager.patch_size
        image = torch.zeros(self.batch_size, self.num_input_channels, *patch_size, device=self.device)
        with self.autocast():
            lines = choose_memory_formats(self.network, partial(self.run_convolutions, image))
        # the same in all processes, or they would round differently
        chosen = of_first_rank([convolution.channels_first for convolution in convolutions])
        for convolution, channels_first in zip(convolutions, chosen, strict=True):
            convolution.channels_first = channels_first
        lines = ["Depth-wise convolutions take the faster memory format, forward and backward pass together:", *lines]
        self.print_to_log_file("\n    ".join(lines))

    def run_convolutions(self, image: Tensor) -> None:
        """Runs the part of the network that has depth-wise convolutions as a training step does.

        Args:
            image: (B, C, *patch), with the batch size of this process.
        """
        raise NotImplementedError

    def describe_network(self) -> dict[str, Any]:
        return self.family.describe(
            self.configuration_manager,
            self.dataset_json,
            self.recipe,
            self.num_input_channels,
            with_heads=self.has_heads,
            names={
                "dataset": self.plans_manager.dataset_name,
                "configuration": self.configuration_name,
                "plans": self.plans_manager.plans_name,
            },
        )

    def write_description_files(self) -> None:
        save_recipe(self.recipe, Path(self.output_folder) / "recipe.json")
        base = Path(self.output_folder_base)
        # all folds share these files, and may start at the same time
        described = {"plans.json": self.plans_manager.plans, "dataset.json": without_files(self.dataset_json)}
        for name, content in described.items():
            with replacing(base / name) as beside:
                save_json(content, str(beside), sort_keys=False)
        fingerprint = Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json"
        if fingerprint.is_file():  # not needed; nnU-Net keeps it for people
            with replacing(base / fingerprint.name) as beside:
                shutil.copyfile(fingerprint, beside)

    def _check_preprocessed(self) -> None:
        folder = self.preprocessed_dataset_folder
        check_holds_cases(None if folder is None else Path(folder), self.plans_manager, self.configuration_name)

    def _write_recipe_to_plans(self) -> None:
        """Prediction reads the results' plans.json, and builds the network from it."""
        fields = self.family.network_fields(self.recipe)
        name, kind = self.family.section_name, self.recipe.kind
        plan = self.configuration_manager.configuration.get(name) or {}
        section = {**plan, kind: {**plan.get(kind, {}), **fields}}
        self.plans_manager.plans["configurations"][self.configuration_name][name] = section
        self.configuration_manager.configuration[name] = section
        if self.recipe.batch_size is not None:
            self.configuration_manager.configuration["batch_size"] = self.recipe.batch_size

    # ------------------------------------------------------------------------------------------- optimization

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ProgressScheduler]:
        """The optimizer and its schedule; norms, biases and mask tokens do not decay."""
        # not the parameters of self.network: torch.compile's wrapper renames them
        optimizer = self.build_optimizer(self.parameter_groups())
        return optimizer, self.build_scheduler(optimizer, self.num_epochs)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW for these parameter groups."""
        return torch.optim.AdamW(groups, lr=self.initial_lr)

    def reset_optimizer(self) -> None:
        """Builds optimizer and schedule for the parameter groups as they are now."""
        self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return parameter_groups(self.bare_network, self.weight_decay, self.initial_lr)

    def group_notes(self) -> dict[str, str]:
        """Remarks in the log on the groups of a part, "encoder" or "decoder"."""
        return {}

    def print_groups(self) -> None:
        """Logs the parameter groups; they depend on the weights that the training starts from."""
        self.advance_schedule()  # a checkpoint's optimizer has the rates of its recipe
        self.print_to_log_file(f"\n{describe_groups(self.optimizer, self.group_notes())}\n", add_timestamp=False)

    def choose_autocast_dtype(self) -> torch.dtype | None:
        """The type of the forward pass: as in nnU-Net float16 on CUDA; None: float32, no autocast."""
        return torch.float16 if self.device.type == "cuda" else None

    def autocast(self) -> Any:
        """A context for the forward pass."""
        return nullcontext() if self.autocast_dtype is None else torch.autocast("cuda", self.autocast_dtype)

    def advance_schedule(self) -> None:
        """Sets the learning rate of this step; nnU-Net sets it once per epoch, too coarse for a warm-up."""
        self.lr_scheduler.step(self.current_epoch + self._iteration_in_epoch / self.num_iterations_per_epoch)

    # ----------------------------------------------------------------------------------------------------- start

    def on_train_start(self) -> None:
        """Loads data, writes plans and recipe. Mirrors nnUNetTrainer.on_train_start, but only rank 0 writes."""
        if not self.was_initialized:
            self.initialize()
        self.checkpoints.stop_resuming()
        self.check_optimizer_restored()
        if self.pretrained_weights is None and not self.checkpoints.is_ours:
            self.print_to_log_file("No -pretrained_weights given: training from random weights.")
        self.print_groups()
        if self.rank == 0:
            self._check_all_cases_preprocessed()
        self.make_split_in_turn()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.print_plans()
        empty_cache(self.device)
        if self.rank == 0:
            self.dataset_class.unpack_dataset(
                self.preprocessed_dataset_folder,
                overwrite_existing=False,
                num_processes=max(1, round(get_allowed_n_proc_DA() // 2)),
                verify=True,
            )
            self.checkpoints.write_description()
            self.plot_network_architecture()
            self._save_debug_information()
        if self.is_ddp:
            dist.barrier()

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's training and validation cases of the fold.

        Raises:
            ValueError: the fold cannot be trained; says what to do.
        """
        splits_file = Path(self.preprocessed_dataset_folder_base, SPLITS)
        preprocessed = self._preprocessed_cases()
        if self.fold != "all" and not splits_file.is_file():
            check_can_be_split(preprocessed, splits_file)
            if subjects := recorded_subjects(self.dataset_json):
                write_splits(preprocessed, subjects, N_FOLDS, splits_file)
                self.print_to_log_file(f"Folds that keep subjects together: {splits_file}")
        training, validation = super().do_split()
        check_fold(self.fold, training, validation, splits_file)
        if not self.checkpoints.is_ours:  # else the loaders name missing cases and draw others
            check_fold_is_preprocessed(self.fold, [*training, *validation], preprocessed, splits_file)
        return training, validation

    def _preprocessed_cases(self) -> list[str]:
        dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        return dataset_class.get_identifiers(self.preprocessed_dataset_folder)

    def _check_all_cases_preprocessed(self) -> None:
        folder, name = Path(self.preprocessed_dataset_folder_base), self.plans_manager.dataset_name
        message = missing_cases(
            listed_cases(raw_folder_of(name), folder, self.dataset_json),
            self._preprocessed_cases(),
            preprocess_command(self.plans_manager, self.configuration_name),
            None if self.fold == "all" else folder / SPLITS,
        )
        if message is not None:
            self.print_to_log_file(f"WARNING: {message}")

    # --------------------------------------------------------------------------------------- pretrained weights

    def load_pretrained_weights(self, path: str) -> None:
        """Loads a file into the network; logs and saves what was loaded, adapted, left at random, and unused.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no checkpoint or does not fit; nothing was loaded.
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
        self.pretrained_weights = path
        self.print_to_log_file(f"\nWeights from {path} ({weights.origin}):\n{report.table()}\n", add_timestamp=False)
        if self.rank == 0:
            report.save(Path(self.output_folder) / "pretrained_weights_report.json", path)
        self.on_pretrained_weights_loaded(report)

    def on_pretrained_weights_loaded(self, report: TransferReport) -> None:
        """Called when weights were loaded from a file: adapts what depends on which layers were loaded.

        Args:
            report: of the transfer.
        """
