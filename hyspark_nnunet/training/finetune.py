"""Fine-tuning the pre-trained encoder for segmentation."""

from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from hyspark_nnunet.architectures import HySparKUNet
from hyspark_nnunet.architectures.from_plans import OWN_ARCHITECTURE, encoder_arguments
from hyspark_nnunet.masking import mask_grid, unit_size
from hyspark_nnunet.training.optimization import parameter_groups, skip_frozen
from hyspark_nnunet.training.recipe import FinetuneRecipe, resolve_recipe
from hyspark_nnunet.training.schedules import ProgressScheduler, decoder_first, held_back, warmup_polynomial
from hyspark_nnunet.training.trainer import HySparKTrainer


class HySparKFinetuneTrainer(HySparKTrainer):
    """nnU-Net's training with HySparKUNet, started from ``-pretrained_weights`` or from scratch.

    Everything but network, optimiser and schedule is nnU-Net's.
    """

    recipe_class = FinetuneRecipe
    recipe: FinetuneRecipe
    has_heads = True

    def check_configuration(self, settings: ConfigurationManager, name: str) -> None:
        strides = encoder_arguments(settings, self.recipe.preset)["strides"]
        mask_grid(settings.patch_size, unit_size(strides))

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        # nnU-Net gives the coarsest output no weight: with a single output nothing would be left to train on
        n_stages = encoder_arguments(self.configuration_manager, self.recipe.preset)["n_stages"]
        self.enable_deep_supervision = n_stages > 2

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """HySparKUNet for the plan and the preset its "hyspark" section names; nnU-Net calls this to predict, too."""
        if configuration_manager.network_arch_class_name == OWN_ARCHITECTURE:
            return get_network_from_plans(
                configuration_manager.network_arch_class_name,
                configuration_manager.network_arch_init_kwargs,
                configuration_manager.network_arch_init_kwargs_req_import,
                num_input_channels,
                num_output_channels,
                deep_supervision=enable_deep_supervision,
            )
        section = configuration_manager.configuration.get("hyspark")
        recipe = resolve_recipe(FinetuneRecipe, section, environment={})
        return HySparKUNet(
            input_channels=num_input_channels,
            num_classes=num_output_channels,
            deep_supervision=enable_deep_supervision,
            **encoder_arguments(configuration_manager, recipe.preset),
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ProgressScheduler]:
        optimizer, scheduler = super().configure_optimizers()
        optimizer.register_step_pre_hook(skip_frozen)
        return optimizer, scheduler

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The encoder apart where the recipe treats it otherwise."""
        apart = self.recipe.decoder_warmup_epochs > 0 or self.recipe.encoder_hold_epochs > 0
        return parameter_groups(
            self.bare_network, self.weight_decay, self.initial_lr, apart, layer_decay=self.recipe.layer_decay
        )

    def group_notes(self) -> dict[str, str]:
        alone, hold, factor = (
            self.recipe.decoder_warmup_epochs,
            self.recipe.encoder_hold_epochs,
            self.recipe.encoder_hold_factor,
        )
        notes = []
        if alone:
            notes.append(f"frozen for {alone} epochs while the decoder warms up")
        if hold > alone or (hold and not alone):
            notes.append(f"frozen for {hold} epochs" if factor == 0 else f"{factor:g} of the rate for {hold} epochs")
        return {"encoder": ", ".join(notes)}

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> ProgressScheduler:
        recipe, epochs = self.recipe, self.num_epochs
        curve = partial(warmup_polynomial, warmup_fraction=recipe.warmup_fraction, exponent=recipe.polynomial_exponent)
        return ProgressScheduler(
            optimizer,
            epochs,
            partial(decoder_first, alone_fraction=recipe.decoder_warmup_epochs / epochs, curve=curve),
            # a continued training takes the weight decay of its recipe, not of the checkpoint's optimizer
            lambda progress: self.weight_decay,
            partial(
                held_back,
                frozen_fraction=recipe.decoder_warmup_epochs / epochs,
                hold_fraction=recipe.encoder_hold_epochs / epochs,
                hold_factor=recipe.encoder_hold_factor,
            ),
        )

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """As nnU-Net's, for the stages the network takes of the plan."""
        if not self.enable_deep_supervision:
            return None
        strides = encoder_arguments(self.configuration_manager, self.recipe.preset)["strides"]
        return [list(scale) for scale in 1 / np.cumprod(np.vstack(strides), axis=0)][:-1]

    def train_step(self, batch: dict) -> dict:
        self.advance_schedule()
        return super().train_step(batch)
