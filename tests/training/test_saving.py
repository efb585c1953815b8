"""A trainer's state in a checkpoint, and a checkpoint in a trainer with another recipe."""

from pathlib import Path

import pytest
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from hyspark_nnunet.training.checkpoint_folder import BEST, FINAL, LATEST, PREVIOUS
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer, HySparKPretrainTrainer
from hyspark_nnunet.training.stepping import NonFiniteLoss
from tests.nnunet_plans import CUBIC, make_plans
from tests.training.conftest import make_trainer


class TestLoading:
    """A checkpoint meets a trainer whose recipe is another."""

    def trainer(self, trainer_class=HySparKFinetuneTrainer, resume: bool = False, **fields):
        section = {"preset": "S", trainer_class.recipe_class.kind: fields}
        plans = make_plans([16, 16, 16], CUBIC, hyspark=section) | {"continue_training": resume}
        trainer = make_trainer(trainer_class, plans)
        settings = trainer.configuration_manager
        trainer.network = trainer_class.build_network_architecture(trainer.plans_manager, settings, 1, 2)
        trainer.reset_optimizer()
        trainer.num_input_channels, trainer.was_initialized = 1, True
        return trainer

    def saved(self, trainer, name: str = FINAL, epochs: int = 1) -> str:
        trainer.write_checkpoint(str(Path(trainer.output_folder, name)), epochs)
        return str(Path(trainer.output_folder, name))

    def test_a_validation_needs_no_optimizer(self) -> None:
        trained = self.trainer(layer_decay=0.5)
        path = self.saved(trained)
        validating = self.trainer()
        validating.load_checkpoint(path)
        for name, tensor in trained.network.state_dict().items():
            assert torch.equal(validating.network.state_dict()[name], tensor)
        message = "the checkpoint was trained with the parameter groups"
        with pytest.raises(ValueError, match=message):
            validating.check_optimizer_restored()
        with pytest.raises(ValueError, match=message):
            self.trainer(resume=True).load_checkpoint(path)

    def test_a_schedule_that_ends_while_the_encoder_is_frozen_is_not_continued(self) -> None:
        path = self.saved(self.trainer(num_epochs=5, layer_decay=0.5))
        other = self.trainer(num_epochs=20, layer_decay=0.5, encoder_hold_epochs=6)
        other.load_checkpoint(path)  # a validation needs no schedule
        with pytest.raises(ValueError, match="stay frozen for 6 epochs .* made for 5: set fewer"):
            other.check_optimizer_restored()

    def test_a_checkpoint_does_not_say_where_the_scans_lie(self) -> None:
        trainer = self.trainer()
        given = trainer.my_init_kwargs["dataset_json"] | {
            "dataset": {"a": {"images": ["/clinic/a.nii.gz"], "label": "labelsTr/a.nii.gz"}},
            "hyspark_nnunet": {"left_out": {"b": "/clinic/b.nii.gz cannot be read"}},
        }
        trainer.my_init_kwargs["dataset_json"] = dict(given)
        arguments = read_checkpoint(Path(self.saved(trainer)))["init_args"]
        assert "/clinic" not in str(arguments)
        assert arguments["dataset_json"]["labels"] == given["labels"]
        assert trainer.my_init_kwargs["dataset_json"] == given

    def test_a_stop_in_the_first_epoch_does_not_hide_an_earlier_training(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """``--c`` was forgotten; it still continues the earlier training."""
        earlier = Path(self.saved(self.trainer(), epochs=3))
        trainer = self.trainer()
        trainer.stop.signal = "SIGTERM"
        with pytest.raises(SystemExit) as ended:
            trainer._stop_if_asked({})
        assert (
            ended.value.code == 0 and "earlier training, which --c continues; to train anew" in capsys.readouterr().out
        )
        assert [file.name for file in Path(trainer.output_folder).glob("**/*.pth")] == [earlier.name]
        trainer.current_epoch = 1
        with pytest.raises(SystemExit):
            trainer._stop_if_asked({})
        kept = [file.name for file in Path(trainer.output_folder).glob("**/*.pth")]
        assert sorted(kept) == sorted([earlier.name, LATEST]) and not earlier.exists()

    def test_a_loss_that_is_not_finite_does_not_hide_an_earlier_training(self) -> None:
        earlier = Path(self.saved(self.trainer(), epochs=3))
        trainer = self.trainer()
        with pytest.raises(NonFiniteLoss, match="No checkpoint is written. The folder holds .* resume with --c"):
            trainer._end_on_nonfinite("step 1")
        assert list(Path(trainer.output_folder).glob("**/*.pth")) == [earlier]

    def test_a_best_epoch_that_was_not_written_is_not_the_one_to_beat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = self.trainer()
        trainer._best_ema = 0.5

        def judge() -> bool:
            trainer._best_ema = 0.9
            return True

        def full_disk(*_: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(trainer, "judge_epoch", judge)
        monkeypatch.setattr(trainer, "picture_epoch", lambda done: None)
        for expected in (0.5, 0.9):
            with monkeypatch.context() as disk:
                if expected == 0.5:
                    disk.setattr(trainer.checkpoints, "write", full_disk)
                for name in ("train_losses", "val_losses", "epoch_start_timestamps"):
                    trainer.logger.log(name, 1.0, trainer.current_epoch)
                trainer.on_epoch_end()
            assert trainer._best_ema == expected and Path(trainer.output_folder, BEST).exists() == (expected == 0.9)

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_trial_that_writes_nothing_removes_nothing(self, kept: bool) -> None:
        trainer = self.trainer()
        files = [Path(self.saved(trainer, name)) for name in (LATEST, LATEST)] + [Path(trainer.output_folder, PREVIOUS)]
        trainer.disable_checkpointing = kept
        trainer.on_train_end()
        assert [file.exists() for file in files] == [kept] * 3
        assert Path(trainer.output_folder, FINAL).exists() != kept

    def test_a_checkpoint_inside_an_epoch_leaves_out_what_that_has_logged(self) -> None:
        """It keeps what does not belong to an epoch."""
        trainer = self.trainer(HySparKPretrainTrainer)
        lists = trainer.logger.local_logger.my_fantastic_logging
        lists |= {"train_losses": [1.0], "probe_dice": [0.4], "probe_dice_before": [0.5]}
        kept = trainer.logged_until(0)
        assert kept["train_losses"] == kept["probe_dice"] == [] and kept["probe_dice_before"] == [0.5]

    def test_the_table_of_groups_has_the_rates_to_come(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Not those of the checkpoint, whose recipe was another."""
        path = self.saved(self.trainer(initial_lr=1e-3, layer_decay=0.5))
        again = self.trainer(resume=True, initial_lr=2e-4, layer_decay=0.75)
        again.load_checkpoint(path)
        capsys.readouterr()
        again.print_groups()
        peaks = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if ": weights" in line]
        assert peaks == [f"{2e-4 * 0.75**distance:.3g}" for distance in range(8)]

    def test_what_differs_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.saved(self.trainer(initial_lr=2e-3, warmup_fraction=0.1, seed=3))
        again = self.trainer(warmup_fraction=0.1, num_epochs=7)
        capsys.readouterr()
        again.load_checkpoint(path)
        said = capsys.readouterr().out
        assert "differs from the checkpoint's: initial_lr 0.0001 (there: 0.002). To train with" in said
        assert said.count("HYSPARK_") == 1 and "HYSPARK_INITIAL_LR=0.002\n" in said

    def test_weights_that_mean_something_else_are_refused(self) -> None:
        path = self.saved(self.trainer(HySparKPretrainTrainer, standardise_targets=False))
        with pytest.raises(ValueError, match=r"standardise_targets no, .* has yes; set HYSPARK_STANDARDISE_TARGETS=no"):
            self.trainer(HySparKPretrainTrainer).load_checkpoint(path)
