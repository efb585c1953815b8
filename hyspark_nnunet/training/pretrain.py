"""Self-supervised pre-training on preprocessed nnU-Net datasets, for any family of networks."""

import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible, unit_size
from hyspark_nnunet.recipe.fields import OF_INPUT
from hyspark_nnunet.recipe.recipe import PretrainRecipe
from hyspark_nnunet.recipe.sources import resolve_recipe
from hyspark_nnunet.training.case_reconstruction import cases_to_reconstruct, reconstruct_case, write_summary
from hyspark_nnunet.training.data.held_out import HeldOutPatches, fixed_mask
from hyspark_nnunet.training.data.image_transforms import pretraining_transforms
from hyspark_nnunet.training.data.loader_processes import augmenter
from hyspark_nnunet.training.data.unreadable_cases import RedrawingLoader, UnreadableCase, finite_case
from hyspark_nnunet.training.loss import loss_of_predicting_means, reconstruction_loss
from hyspark_nnunet.training.memory.step_bytes import CUDA_RESERVE, GIB, pretraining_bytes
from hyspark_nnunet.training.probe.cases import LabelledCases, cases_to_probe
from hyspark_nnunet.training.probe.linear_probe import LinearProbe, ProbeScore
from hyspark_nnunet.training.probe.scheduled import PROBE_BEFORE_KEY, ScheduledProbe
from hyspark_nnunet.training.runtime.precision import autocast_dtype
from hyspark_nnunet.training.runtime.ranks import world_size
from hyspark_nnunet.training.schedules import ProgressScheduler, cosine_between, warmup_cosine
from hyspark_nnunet.training.trainer import RecipeTrainer
from hyspark_nnunet.visualisation import Example, progress_picture, reconstruction_pictures, restore_intensities

# in the last validation, as in nnUNetTrainer: without barriers, processes drift apart until one times out
CASES_BETWEEN_BARRIERS = 20


class PretrainTrainer(RecipeTrainer):
    """Pre-trains a family's masked autoencoder; labels serve nnU-Net's foreground sampling and the probe alone.

    Data loading and spatial augmentation are nnU-Net's.
    """

    recipe_class: ClassVar[type[PretrainRecipe]] = PretrainRecipe
    recipe: PretrainRecipe
    logged_once = (PROBE_BEFORE_KEY,)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.unit = unit_size(self.strides)
        self.grid = mask_grid(self.configuration_manager.patch_size, self.unit)
        self.num_visible = num_visible_units(self.grid, self.recipe.mask_ratio)
        self._target_is_clean = self.recipe.intensity_augmentation == OF_INPUT
        # voxels with it carry no reconstruction loss; None: the dataset has none
        self._ignore_label = self.label_manager.ignore_label if self.label_manager.has_ignore_label else None
        # of the held-out patches, once they are drawn
        self._loss_of_means: float | None = None
        self.probe = ScheduledProbe(self.recipe, self.logger, self.print_to_log_file, self._score_encoder)

    def check_configuration(self, settings: ConfigurationManager, name: str) -> None:
        if settings.previous_stage_name is not None:
            raise ValueError(
                f"configuration '{name}' is the second stage of a cascade, whose input holds the first stage's "
                f"segmentation: pre-train on '{settings.previous_stage_name}' or 3d_fullres"
            )
        super().check_configuration(settings, name)
        grid = mask_grid(settings.patch_size, unit_size(self.family.strides(settings, self.recipe)))
        num_visible_units(grid, self.recipe.mask_ratio)

    # ------------------------------------------------------------------------------------------------ network

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager | None,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The masked autoencoder for the plan and its recipe."""
        recipe = resolve_recipe(
            cls.recipe_class, cls.family.section(configuration_manager.configuration), environment={}
        )
        return cls.family.masked_autoencoder(configuration_manager, recipe, num_input_channels)

    def run_convolutions(self, image: Tensor) -> None:
        # the decoder has none, and its BatchNorm would count this image
        visible = fixed_mask(0, len(image), self.grid, self.recipe.mask_ratio, self.recipe.mask_block)
        self.bare_network.encoder.features(image, visible.to(self.device), self.num_visible)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing: pre-training has no deep supervision."""

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net's plot runs the network without a mask."""

    def _build_loss(self) -> Any:
        return partial(reconstruction_loss, standardised=self.recipe.standardise_targets)

    def build_scheduler(self, optimizer: torch.optim.Optimizer, curve_epochs: int) -> ProgressScheduler:
        recipe = self.recipe
        return ProgressScheduler(
            optimizer,
            self.num_epochs,
            partial(warmup_cosine, warmup_fraction=recipe.warmup_fraction),
            partial(cosine_between, start=recipe.weight_decay, end=recipe.final_weight_decay),
            curve_epochs=curve_epochs,
        )

    # --------------------------------------------------------------------------------------------------- data

    def get_dataloaders(self) -> tuple[Any, HeldOutPatches]:
        """nnU-Net's training loader without the work on labels, and the fixed validation patches.

        Mirrors nnUNetTrainer.get_dataloaders.
        """
        patch_size = self.configuration_manager.patch_size
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        transforms = self.get_training_transforms(
            patch_size,
            rotation,
            None,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        transforms = pretraining_transforms(transforms, self.recipe.intensity_augmentation, self._ignore_label)
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        if self.fold == "all":
            self.print_to_log_file("Fold 'all' trains on all cases: the validation loss is computed on training cases.")

        def make_loader(dataset: Any, initial_size: Any, transforms: BasicTransform | None) -> RedrawingLoader:
            loader = RedrawingLoader(
                dataset,
                self.batch_size,
                initial_size,
                patch_size,
                self.label_manager,
                oversample_foreground_percent=self.oversample_foreground_percent,
                probabilistic_oversampling=self.probabilistic_oversampling,
                transforms=transforms,
            )
            # voxels without annotation are as useful as any here; nnU-Net would draw no patch around them
            loader.has_ignore = False
            return loader

        if self.recipe.probe_every:
            own = LabelledCases(
                self.preprocessed_dataset_folder,
                self.dataset_class,
                self.label_manager,
                dataset_tr.identifiers,
                dataset_val.identifiers,
            )
            cases = cases_to_probe(
                own, self.recipe.probe_dataset, self.plans_manager, self.configuration_name, self.dataset_json
            )
            if self.rank == 0:
                self.probe.draw(cases, patch_size, mirror_axes or ())
        held_out = HeldOutPatches(
            make_loader(dataset_val, patch_size, None),
            self.num_val_iterations_per_epoch,
            self.grid,
            self.recipe.mask_ratio,
            self.rank,
            pin_memory=self.device.type == "cuda",
            mask_block=self.recipe.mask_block,
            ignore_label=self._ignore_label,
        )
        if self._ignore_label is not None:
            self.print_to_log_file(f"Voxels with the ignore label ({self._ignore_label}) carry no reconstruction loss.")
        if not_finite := sorted(set(self.gather(list(held_out.not_finite)))):
            self.print_to_log_file(
                f"WARNING: validation cases have voxels that are not finite: {', '.join(not_finite)}. Their patches "
                "are left out of the validation loss. See: hyspark_nnunet dataset check"
            )
        training_loader = make_loader(dataset_tr, initial_patch_size, transforms)
        processes = get_allowed_n_proc_DA()
        return augmenter(training_loader, processes, max(6, processes // 2), self.device.type == "cuda"), held_out

    # -------------------------------------------------------------------------------------------------- steps

    def choose_autocast_dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.device)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.rank == 0:
            self._log_memory()
        self.probe.score_start(self.current_epoch)

    def _log_memory(self) -> None:
        """Logs the memory that a step is estimated to take; nnU-Net's plans size their batch for dense training."""
        patch_size, mixed = self.configuration_manager.patch_size, self.autocast_dtype is not None
        try:
            # random weights of the meta device must not change the training's random numbers
            with torch.random.fork_rng(devices=[]):
                n_bytes = pretraining_bytes(
                    partial(
                        self.family.masked_autoencoder,
                        self.configuration_manager,
                        self.recipe,
                        self.num_input_channels,
                    ),
                    self.batch_size,
                    self.num_input_channels,
                    patch_size,
                    self.recipe.mask_ratio,
                    self.recipe.activation_checkpointing,
                    mixed,
                )
        except Exception as error:  # an estimate must not end a training
            self.print_to_log_file(f"The memory of a step could not be estimated: {type(error).__name__}: {error}")
            return
        batch, patch = self.batch_size, " x ".join(map(str, patch_size))
        patches = f"{batch} patch" if batch == 1 else f"{batch} patches"
        if self.device.type == "cuda":
            n_bytes += CUDA_RESERVE
        self.print_to_log_file(
            f"A step of {patches} of {patch} voxels is estimated to take {n_bytes / GIB:.1f} GB of "
            f"{'each GPU' if self.device.type == 'cuda' else 'memory'}"
        )

    def _score_encoder(self, probe: LinearProbe) -> ProbeScore:
        self.network.eval()
        with self.autocast():
            return probe.score(self.bare_network.encoder, self.device)

    def _loss_of(
        self, image: Tensor, visible: Tensor, target: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """The loss against ``target`` (None: against the image itself) of ``counted`` voxels (None: of all)."""
        with self.autocast():
            reconstruction = self.network(image, visible, self.num_visible)
        return self.loss(reconstruction, image if target is None else target, visible, counted=counted)

    def gradient_clip(self) -> float:
        return self.recipe.gradient_clip

    def batch_loss(self, batch: dict) -> Tensor:
        image = batch["data"].to(self.device, non_blocking=True)
        visible = sample_visible(
            len(image), self.grid, self.recipe.mask_ratio, self.mask_generator, block=self.recipe.mask_block
        )
        target = counted = None
        if self._target_is_clean or self._ignore_label is not None:
            # channels of the clean image, then the one that says which voxels count
            channels = image.shape[1] if self._target_is_clean else 0
            extra = batch["target"].to(self.device, non_blocking=True)
            target = extra[:, :channels] if self._target_is_clean else None
            counted = extra[:, channels:].bool() if self._ignore_label is not None else None
        return self._loss_of(image, visible.to(self.device, non_blocking=True), target, counted) * self.loss_share

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.dataloader_val.restart()
        if self._loss_of_means is None:
            losses = [
                loss_of_predicting_means(image, visible, self.recipe.standardise_targets, counted)
                for image, visible, counted in map(self._on_device, self.dataloader_val.batches)
            ]
            loss = self._loss_of_means = float(np.mean(self.gather([loss * self.loss_share for loss in losses])))
            self.print_to_log_file(
                f"On the validation patches, predicting the mean of every hidden block gives a loss of {loss:.4f}"
            )

    def _on_device(self, batch: dict) -> list[Tensor | None]:
        """Image, mask and counted voxels (None: all) of held-out patches."""
        tensors = (batch.get(name) for name in ("data", "visible", "counted"))
        return [None if t is None else t.to(self.device, non_blocking=True) for t in tensors]

    def validation_step(self, batch: dict) -> dict:
        image, visible, counted = self._on_device(batch)
        return {"loss": self._loss_of(image, visible, counted=counted).cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        losses = self.gather([output["loss"] * self.loss_share for output in val_outputs])
        self.logger.log("val_losses", np.mean(losses), self.current_epoch)

    def judge_epoch(self) -> bool:
        """The best epoch has the lowest validation loss; nnU-Net takes the highest Dice."""
        self.probe.score_epoch(self.current_epoch)
        val_loss = self.logger.get_value("val_losses", step=-1)
        # nnU-Net's attribute for the best value so far, which its checkpoints contain
        if not np.isfinite(val_loss) or (self._best_ema is not None and val_loss >= self._best_ema):
            return False
        self._best_ema = float(val_loss)
        self.print_to_log_file(f"New best validation loss: {np.round(val_loss, decimals=4)}")
        return True

    def picture_epoch(self, done: int) -> None:
        path = Path(self.output_folder) / "progress.png"
        progress_picture(self.logger.get_value, path, self.probe.curve, self.probe.before, self._loss_of_means)
        if done in (1, self.num_epochs) or done % self.recipe.picture_every == 0:
            self._picture_held_out(Path(self.output_folder) / "reconstructions" / f"epoch_{done:04d}.png", done)

    # ------------------------------------------------------------------------------------------------ results

    @torch.no_grad()
    def _reconstruct(self, image: Tensor, visible: Tensor) -> Tensor:
        """Reconstruction (C, *spatial) of one patch, in the units of the loss, float32 on the CPU."""
        with self.autocast():
            reconstruction = self.bare_network(
                image[None].to(self.device), visible[None].to(self.device), self.num_visible
            )
        return reconstruction[0].float().cpu()

    def _picture_held_out(self, path: Path, epoch: int) -> None:
        examples = self.dataloader_val.examples(self.recipe.num_pictures)
        if not examples:
            return
        self.network.eval()
        rows = []
        for case, image, visible, counted in examples:
            restored = self._reconstruct(image, visible)
            if self.recipe.standardise_targets:
                restored = restore_intensities(restored, image, self.unit, counted)
            rows.append(Example(case, image, visible, restored, counted))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._picture(rows, path, f"epoch {epoch}")

    def _picture(self, rows: list[Example], path: Path, title: str) -> None:
        reconstruction_pictures(rows, path, title, self.configuration_manager.spacing, self.recipe.standardise_targets)

    def _counted_voxels(self, segmentation: np.ndarray) -> Tensor | None:
        """BoolTensor (1, *spatial), False for voxels with the ignore label; None: the dataset has none."""
        if self._ignore_label is None:
            return None
        return torch.from_numpy(segmentation[:1]) != self._ignore_label

    @torch.no_grad()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The last step of nnU-Net's command: the reconstruction error of validation cases, and a few pictures.

        With thousands of cases this would take hours: ``final_validation_cases`` of the recipe limits them.

        Args:
            save_probabilities: not used; pre-training has none.
        """
        self.network.eval()
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        _, every = self.do_split()
        keys = cases_to_reconstruct(every, self.recipe.final_validation_cases)
        selected = f"{len(keys)} of {len(every)} validation cases"
        self.print_to_log_file(f"Final validation of {selected} (final_validation_cases)")
        pictured = set(keys[: self.recipe.num_pictures])
        # rounds in which all processes have a case
        rounds = len(keys) // world_size()
        keys = keys[self.rank :: world_size()]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, keys)
        results: list[dict[str, Any]] = []
        for number, key in enumerate(keys, start=1):
            if self.is_ddp and number <= rounds and number % CASES_BETWEEN_BARRIERS == 0:
                torch.distributed.barrier()
            try:
                image, segmentation = finite_case(dataset, key)
            except UnreadableCase as fault:
                self.print_to_log_file(f"WARNING: {fault}. It is left out.")
                continue
            case = reconstruct_case(
                image,
                self.configuration_manager.patch_size,
                self.unit,
                self.recipe.mask_ratio,
                self._reconstruct,
                self.recipe.mask_block,
                self.recipe.standardise_targets,
                self._counted_voxels(segmentation),
            )
            if case is None:
                self.print_to_log_file(f"WARNING: case {key} has no hidden voxel without the ignore label: left out.")
                continue
            results.append({"case": key, "n_patches": case.n_patches, "metrics": case.metrics})
            self.print_to_log_file(
                f"{key}: reconstruction loss {case.loss:.4f} over {case.n_patches} patches (predicting the mean of "
                f"every hidden block: {case.loss_of_means:.4f})"
            )
            if key in pictured:
                row = Example(key, case.image, case.visible, case.restored, case.counted)
                self._picture([row], folder / f"{key}.png", key)
        results = sorted(self.gather(results), key=lambda result: result["case"])
        if self.rank == 0:
            about = {
                "selected_cases": selected,
                "mask_ratio": self.recipe.mask_ratio,
                "mask_unit": list(self.unit),
                "epoch": self.current_epoch,
            }
            mean = write_summary(results, about, folder / "summary.json")
            seconds = round(time.monotonic() - start)
            self.print_to_log_file(f"Validation complete after {seconds} s: {folder / 'summary.json'}")
            if mean:
                self.logger.log_summary("final_val/reconstruction_loss", mean["reconstruction_loss"])
                self.print_to_log_file("Mean reconstruction loss: ", mean["reconstruction_loss"])
