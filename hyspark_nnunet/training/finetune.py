"""Fine-tuning for segmentation, for any family of networks."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from hyspark_nnunet.checkpoints.report import TransferReport
from hyspark_nnunet.recipe.fields import SGD, variable_name
from hyspark_nnunet.recipe.recipe import FinetuneRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.data.loader_processes import augmenter
from hyspark_nnunet.training.data.unreadable_cases import RedrawingLoader, UnreadableCase, check_first_stage, fault_of
from hyspark_nnunet.training.optimization import (
    FIRST_LAYER_RATE,
    drop_frozen,
    layer_of,
    layer_rates,
    parameter_groups,
    rates_of_groups,
    skip_frozen,
)
from hyspark_nnunet.training.runtime.ranks import world_size
from hyspark_nnunet.training.schedules import ProgressScheduler, decoder_first, frozen_first, warmup_polynomial
from hyspark_nnunet.training.trainer import RecipeTrainer

# as in nnUNetTrainer.train_step
GRADIENT_CLIP = 12.0


class FinetuneTrainer(RecipeTrainer):
    """nnU-Net's training of a family's segmentation network, from ``-pretrained_weights`` or from random weights.

    Everything but network, optimizer and schedule is nnU-Net's.
    """

    recipe_class: ClassVar[type[FinetuneRecipe]] = FinetuneRecipe
    recipe: FinetuneRecipe
    has_heads = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        # of a training that started from a file; None: those of the recipe
        self._layer_rates: Mapping[str, float] | None = None
        # nnU-Net gives the coarsest output no weight: a single output would have no loss
        self.enable_deep_supervision = len(self.strides) > 2

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager | None,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The segmentation network for the plan and its recipe; nnU-Net calls this to predict, too."""
        recipe = resolve_recipe(
            cls.recipe_class, cls.family.section(configuration_manager.configuration), environment={}
        )
        return cls.family.segmentation_network(
            configuration_manager, recipe, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def run_convolutions(self, image: Tensor) -> None:
        self.network(image)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ProgressScheduler]:
        optimizer, scheduler = super().configure_optimizers()
        optimizer.register_step_pre_hook(skip_frozen)
        return optimizer, scheduler

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW, or SGD with the momentum of nnUNetTrainer."""
        if self.recipe.optimizer == SGD:
            return torch.optim.SGD(groups, lr=self.initial_lr, momentum=0.99, nesterov=True)
        return super().build_optimizer(groups)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Separate groups for the encoder if its learning rate differs from the decoder's."""
        apart = self.recipe.decoder_warmup_epochs > 0 or self.recipe.encoder_hold_epochs > 0
        rates = self._layer_rates
        if rates is None:
            decay = self.recipe.layer_decay
            rates = {} if decay is None else layer_rates(self.bare_network, decay)
        return parameter_groups(self.bare_network, self.weight_decay, self.initial_lr, apart, rates)

    def on_pretrained_weights_loaded(self, report: TransferReport) -> None:
        """Gives the layers that were loaded from the file lower learning rates.

        Layers that were not loaded, or had to be adapted, train at the full rate.
        """
        to_learn = [entry.name for entry in report.entries if entry.fate in ("random", "adapted")]
        new_layers = {layer_of(name) for name in to_learn if name.startswith("encoder.")}
        self._layer_rates = layer_rates(self.bare_network, self.recipe.layer_decay, new_layers)
        self.reset_optimizer()
        if self.recipe.layer_decay is None:
            self.print_to_log_file(
                "Layers loaded from the file have lower learning rates, the lower the closer to the input: the "
                f"first trains at {FIRST_LAYER_RATE:.2g} of the decoder's rate. For equal rates, set "
                "HYSPARK_LAYER_DECAY=1\n",
                add_timestamp=False,
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the rates of the encoder's layers, which depend on the file that the training started from.

        If ``layer_decay`` has changed, the new value applies, except to layers that were not loaded from that file.
        """
        rates = rates_of_groups(self.bare_network, checkpoint["optimizer_state"]["param_groups"])
        decay = self.recipe.layer_decay
        if checkpoint.get("recipe", {}).get("layer_decay") == decay:
            self._layer_rates = rates
        elif rates and decay is not None:
            new_layers = [layer for layer, rate in rates.items() if rate == 1]
            self._layer_rates = layer_rates(self.bare_network, decay, new_layers)
        else:
            return
        self.reset_optimizer()

    def group_notes(self) -> dict[str, str]:
        alone, hold = self.recipe.decoder_warmup_epochs, self.recipe.encoder_hold_epochs
        notes = []
        if alone:
            notes.append(f"frozen for {alone} epochs while the decoder warms up")
        if hold > alone:
            notes.append(f"frozen for {hold} epochs")
        return {"encoder": ", ".join(notes)}

    def schedule_mismatch(self, curve_epochs: int) -> str | None:
        frozen_epochs = max(self.recipe.decoder_warmup_epochs, self.recipe.encoder_hold_epochs)
        if frozen_epochs < curve_epochs:  # the recipe's own check knows its num_epochs alone
            return None
        return (
            f"the encoder would stay frozen for {frozen_epochs} epochs (decoder_warmup_epochs or encoder_hold_epochs), "
            f"but the checkpoint's schedule was made for {curve_epochs}: set fewer"
        )

    def build_scheduler(self, optimizer: torch.optim.Optimizer, curve_epochs: int) -> ProgressScheduler:
        recipe = self.recipe
        frozen_epochs = max(recipe.decoder_warmup_epochs, recipe.encoder_hold_epochs)
        curve = partial(warmup_polynomial, warmup_fraction=recipe.warmup_fraction, exponent=recipe.polynomial_exponent)
        return ProgressScheduler(
            optimizer,
            self.num_epochs,
            partial(decoder_first, alone_fraction=recipe.decoder_warmup_epochs / curve_epochs, curve=curve),
            # a resumed training takes the weight decay of its recipe, not of the checkpoint's optimizer
            lambda progress: self.weight_decay,
            partial(frozen_first, frozen_fraction=frozen_epochs / curve_epochs),
            curve_epochs,
        )

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """As in nnU-Net, for the stages that the network has."""
        if not self.enable_deep_supervision:
            return None
        return [list(scale) for scale in 1 / np.cumprod(np.vstack(self.strides), axis=0)][:-1]

    # --------------------------------------------------------------------------------------------- processes

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's division of the batch among the processes.

        Raises:
            ValueError: there are fewer patches than processes, or batch_dice needs a batch that is divisible.
        """
        super()._set_batch_size_and_oversample()
        total, processes = self.global_batch_size, world_size()
        if self.configuration_manager.batch_dice and total % processes:
            raise ValueError(
                f"a batch of {total} patches is not divisible among {processes} processes, as nnU-Net's Dice over the "
                f"batch (batch_dice in the plan) requires: set {variable_name('batch_size')} to a multiple of "
                f"{processes}"
            )

    def unused_parameters(self) -> list[nn.Parameter]:
        """Heads without weight in the loss: the coarsest; without deep supervision all but the last."""
        heads = list(self.bare_network.decoder.seg_layers)
        unused = heads[:1] if self.enable_deep_supervision else heads[:-1]
        return [parameter for head in unused for parameter in head.parameters()]

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, with the same weights for one and for several processes.

        Under DDP nnU-Net gives the coarsest output a weight of 1e-6 so that its head has a gradient; here that head
        needs none (``unused_parameters``).
        """
        loss = super()._build_loss()
        if self.is_ddp and self.enable_deep_supervision:
            weights = np.array([1 / 2**level for level in range(len(loss.weight_factors))])
            weights[-1] = 0
            loss.weight_factors = tuple(weights / weights.sum())
        return loss

    # -------------------------------------------------------------------------------------------------- data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, but an unreadable case is drawn again. Mirrors nnUNetTrainer.get_dataloaders.

        Raises:
            FileNotFoundError: a cascade's first stage has not segmented every case.
        """
        patch_size, labels = self.configuration_manager.patch_size, self.label_manager
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        targets = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }
        augmentation = self.get_training_transforms(
            patch_size,
            rotation,
            scales,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            **targets,
        )
        processes, on_cuda = get_allowed_n_proc_DA(), self.device.type == "cuda"
        datasets = self.get_tr_and_val_datasets()
        for dataset in datasets:
            check_first_stage(dataset)
        loaders = [
            RedrawingLoader(
                dataset,
                self.batch_size,
                size,
                patch_size,
                labels,
                oversample_foreground_percent=self.oversample_foreground_percent,
                probabilistic_oversampling=self.probabilistic_oversampling,
                transforms=transforms,
            )
            for dataset, size, transforms in zip(
                datasets,
                (initial_patch_size, patch_size),
                (augmentation, self.get_validation_transforms(scales, **targets)),
                strict=True,
            )
        ]
        validating = max(1, processes // 2) if processes else 0
        return (
            augmenter(loaders[0], processes, max(6, processes // 2), on_cuda),
            augmenter(loaders[1], validating, max(3, processes // 4), on_cuda),
        )

    # -------------------------------------------------------------------------------------------------- steps

    def gradient_clip(self) -> float:
        return GRADIENT_CLIP

    def drop_gradients(self) -> None:
        drop_frozen(self.optimizer)

    def batch_loss(self, batch: dict) -> Tensor:
        image = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [part.to(self.device, non_blocking=True) for part in target]
        else:
            target = target.to(self.device, non_blocking=True)
        with self.autocast():
            return self.loss(self.network(image), target) * self.loss_share

    def judge_epoch(self) -> bool:
        """As in nnU-Net: the best epoch has the highest moving average of the Dice."""
        dice = self.logger.get_value("dice_per_class_or_region", step=-1)
        self.print_to_log_file("Pseudo dice", [np.round(value, decimals=4) for value in dice])
        average = self.logger.get_value("ema_fg_dice", step=-1)
        if self._best_ema is not None and not average > self._best_ema:
            return False
        self._best_ema = float(average)
        self.print_to_log_file(f"Yayy! New best EMA pseudo Dice: {np.round(average, decimals=4)}")
        return True

    def picture_epoch(self, done: int) -> None:
        self.logger.plot_progress_png(self.output_folder)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; if it fails on a case that cannot be read, the error names the case.

        Raises:
            UnreadableCase: the files of a case are damaged.
        """
        try:
            super().perform_actual_validation(save_probabilities)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            keys = list(self.do_split()[1])
            dataset = self.dataset_class(
                self.preprocessed_dataset_folder, keys, self.folder_with_segs_from_previous_stage
            )
            for key in keys:
                if (fault := fault_of(dataset, key)) is not None:
                    raise UnreadableCase(f"{fault}; preprocess again, then repeat with --val") from error
            raise
