"""``hyspark_nnunet checkpoint inspect`` and ``convert``, without a training."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from hyspark_nnunet.architectures.presets import PRESETS
from hyspark_nnunet.checkpoints.reference import reference_form, to_reference
from hyspark_nnunet.checkpoints.storage import read_checkpoint, read_weights, write_atomically
from hyspark_nnunet.cli import main
from hyspark_nnunet.commands.dataset_network import TRAINERS, network_of_dataset
from tests.nnunet_plans import CUBIC, DATASET, DATASET_JSON, make_plans

FINETUNER, PRETRAINER = "HySparKFinetuneTrainer", "HySparKPretrainTrainer"
TARGET = ("-d", "7", "-c", "3d_fullres", "-p", "nnUNetPlans")


@pytest.fixture(autouse=True)
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of preset S, planned as far as these commands read it."""
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    plans = make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"})
    del plans["continue_training"]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


@pytest.fixture(params=[PRETRAINER, FINETUNER])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint as a training on the dataset writes it, as far as these commands read it."""
    return write_checkpoint(request.param, tmp_path / "checkpoint_final.pth")


def write_checkpoint(trainer: str, path: Path) -> Path:
    torch.manual_seed(1)
    made = network_of_dataset("7", "3d_fullres", "nnUNetPlans", trainer)
    write_atomically(
        {
            "network_weights": made.network.state_dict(),
            "trainer_name": trainer,
            "current_epoch": 12,
            "init_args": {"plans": made.plans, "configuration": "3d_fullres", "fold": 3},
            "recipe": made.recipe.as_dict(),
            "hyspark": made.description,
        },
        path,
    )
    return path


def write_stock_checkpoint(path: Path) -> Path:
    """A checkpoint as nnU-Net's own trainer writes it, with numbers of NumPy."""
    network = PlainConvUNet(1, 2, (4, 6), torch.nn.Conv3d, 3, (1, 2), 1, 2, 1, deep_supervision=True)
    plans = make_plans([16, 16, 16], CUBIC)
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99).state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(-0.5)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 5,
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": DATASET_JSON},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, path)
    return path


def weights_equal(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


class TestInspect:
    def test_says_what_a_file_is(self, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
        assert main(["checkpoint", "inspect", str(checkpoint)]) == 0
        printed = capsys.readouterr().out
        trainer = read_checkpoint(checkpoint)["trainer_name"]
        for words in (trainer, f"{DATASET}, configuration 3d_fullres, plans nnUNetPlans, fold 3", "num_epochs", "ViT"):
            assert words in printed
        assert re.search(r"^epoch +12$", printed, re.MULTILINE)
        assert re.search(r"^preset +S$", printed, re.MULTILINE)
        assert re.search(r"^input channels +1: CT$", printed, re.MULTILINE)
        assert re.search(r"^stages +4 of widths 16, 32, 64, 128$", printed, re.MULTILINE)
        assert re.search(r"^spacing +\[1.0, 1.0, 1.0\]$", printed, re.MULTILINE)
        assert ("background, organ" in printed) == (trainer == FINETUNER)
        state = read_weights(checkpoint).state
        assert f"{sum(t.numel() for t in state.values()):,}" in printed

    def test_says_that_it_fits(self, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
        assert main(["checkpoint", "inspect", str(checkpoint), *TARGET]) == 0
        printed = capsys.readouterr().out
        assert "100.0% of the encoder's parameters come from the file." in printed and printed.endswith("Fits.\n")

    def test_says_that_it_does_not_fit(self, checkpoint: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HYSPARK_PRESET", "B")
        assert main(["checkpoint", "inspect", str(checkpoint), *TARGET]) == 1
        printed = capsys.readouterr().out
        assert "Does not fit" in printed and "set HYSPARK_PRESET=S" in printed
        assert f"{[16, 32, 64, 128]} in the file, {list(PRESETS['B'].features_per_stage[:4])} here" in printed

    def test_other_numbers_of_stages(self, preprocessed: Path, tmp_path: Path, capsys) -> None:
        file = write_checkpoint(FINETUNER, tmp_path / "four.pth")
        plans = make_plans([16, 16, 16], CUBIC[:3], hyspark={"preset": "S"})
        (preprocessed / "three.json").write_text(json.dumps(plans))
        assert main(["checkpoint", "inspect", str(file), "-d", DATASET, "-p", "three"]) == 1
        printed = capsys.readouterr().out
        assert "WARNING: the ViT is not loaded" in printed and "HYSPARK_ALLOW_PARTIAL=1" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("-d", "8"), "no data ?set in .* is called Dataset008_.*plan and preprocess"),
            (("-d", "7", "-p", "other"), "other.json is missing: choose other plans with -p \\(nnUNetPlans"),
            (("-d", "7", "-c", "3d_lowres"), "has no configuration 3d_lowres: choose one of 3d_fullres"),
        ],
    )
    def test_datasets_that_are_not_there(self, checkpoint: Path, arguments, message: str, capsys) -> None:
        assert main(["checkpoint", "inspect", str(checkpoint), *arguments]) == 1
        assert re.search(message, capsys.readouterr().err)

    def test_a_release(self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        torch.save(to_reference(read_weights(checkpoint).state).state, tmp_path / "release.pth")
        assert main(["checkpoint", "inspect", str(tmp_path / "release.pth")]) == 0
        printed = capsys.readouterr().out
        assert "HySparK release" in printed and re.search(r"^trained on +not in the file$", printed, re.MULTILINE)

    @pytest.mark.parametrize("allowed", ["0", "1"])
    def test_a_stock_nnunet_checkpoint_never_fits(self, tmp_path: Path, capsys, monkeypatch, allowed: str) -> None:
        monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", allowed)
        file, target = write_stock_checkpoint(tmp_path / "stock.pth"), (*TARGET, "-tr", FINETUNER)
        assert main(["checkpoint", "inspect", str(file), *target]) == 1
        printed = capsys.readouterr().out
        assert f"{DATASET}, configuration 3d_fullres, plans nnUNetPlans, fold 0" in printed and "Fits" not in printed
        assert "has no weights for this network's encoder: it holds encoder.stages.0.0.convs.0.conv.weight" in printed
        command = f"nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainer -p nnUNetPlans -pretrained_weights {file}"
        assert f"It is a checkpoint of nnUNetTrainer on {DATASET}" in printed and command in printed
        # and its weights alone
        torch.save({"state_dict": read_weights(file).state}, file)
        assert main(["checkpoint", "inspect", str(file), *target]) == 1
        assert "nnUNetv2_train DATASET CONFIGURATION FOLD -tr SparKFinetuneTrainer -p PLANS" in capsys.readouterr().out

    def test_a_part_that_is_allowed(self, checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
        state = {name: t for name, t in read_weights(checkpoint).state.items() if "encoder.vit" not in name}
        torch.save(state, tmp_path / "part.pth")
        assert main(["checkpoint", "inspect", str(tmp_path / "part.pth"), *TARGET]) == 0
        assert re.search(r"Fits in part: \d+\.\d% of the encoder", capsys.readouterr().out)

    def test_files_that_are_none(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "model.safetensors").touch()
        assert main(["checkpoint", "inspect", str(tmp_path)]) == 1
        assert f"is a folder: give a checkpoint file, such as {tmp_path}/model.safetensors" in capsys.readouterr().err
        assert main(["checkpoint", "inspect", str(tmp_path / "nowhere.pth")]) == 1
        assert "no checkpoint file at" in capsys.readouterr().err


class TestConvert:
    def convert(self, file: Path, out: Path, *arguments: str) -> int:
        return main(["checkpoint", "convert", str(file), str(out), "--to", *arguments])

    def test_to_safetensors_and_back(self, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "weights.safetensors"
        assert self.convert(checkpoint, out, "safetensors") == 0
        source, back = read_weights(checkpoint), read_weights(out)
        assert weights_equal(source.state, back.state) and back.description == source.description
        with safetensors.safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["recipe"]) == read_checkpoint(checkpoint)["recipe"]
        assert str(tmp_path) not in json.dumps(metadata)
        # and from there to a checkpoint of the dataset
        assert self.convert(out, tmp_path / "again.pth", "nnunet", *TARGET) == 0
        assert weights_equal(source.state, read_weights(tmp_path / "again.pth").state)

    def test_to_the_release_and_back(self, checkpoint: Path, tmp_path: Path, capsys) -> None:
        out = tmp_path / "release.pth"
        assert self.convert(checkpoint, out, "hyspark-release") == 0
        printed = capsys.readouterr().out
        assert "WARNING" in printed and "4 stages, widths [16, 32, 64, 128]" in printed
        state, back = read_weights(checkpoint).state, read_weights(out).state
        assert reference_form(read_checkpoint(out)) in ("masked_autoencoder", "segmentation")
        missing = set(state) - set(back)
        assert all(re.match(r"decoder\.seg_layers\.[01]\.", name) and name in printed for name in missing)
        assert weights_equal({name: t for name, t in state.items() if name not in missing}, back)

    def test_to_a_complete_checkpoint(self, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "model" / "fold_all" / "checkpoint_final.pth"
        out.parent.mkdir(parents=True)
        assert self.convert(checkpoint, out, "nnunet", *TARGET) == 0
        made, source = read_checkpoint(out), read_checkpoint(checkpoint)
        expected = {"network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch"}
        expected |= {"init_args", "trainer_name", "inference_allowed_mirroring_axes", "recipe", "hyspark"}
        assert expected <= set(made) and made["trainer_name"] == source["trainer_name"]
        assert weights_equal(made["network_weights"], source["network_weights"])
        assert made["init_args"]["configuration"] == "3d_fullres"
        assert str(tmp_path) not in json.dumps(
            {k: v for k, v in made.items() if k in ("init_args", "recipe", "hyspark")}
        )
        # what nnU-Net reads to predict
        section = json.loads((out.parents[1] / "plans.json").read_text())["configurations"]["3d_fullres"]["hyspark"]
        assert section[source["trainer_name"].removeprefix("HySparK").removesuffix("Trainer").lower()]["preset"] == "S"
        assert json.loads((out.parents[1] / "dataset.json").read_text()) == DATASET_JSON

    @pytest.mark.parametrize(("said", "expected"), [({}, (0, 1)), ({"inference_allowed_mirroring_axes": None}, None)])
    def test_mirroring_is_the_files_or_along_all_axes_of_the_plan(
        self, preprocessed: Path, tmp_path: Path, said: dict, expected: tuple | None
    ) -> None:
        plans = make_plans([16, 16], [axes[:2] for axes in CUBIC], hyspark={"preset": "S"})
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
        file, out = write_checkpoint(FINETUNER, tmp_path / "flat.pth"), tmp_path / "out.pth"
        write_atomically(read_checkpoint(file) | said, file)
        assert self.convert(file, out, "nnunet", *TARGET) == 0
        assert read_checkpoint(out)["inference_allowed_mirroring_axes"] == expected

    def test_a_training_continues_from_it(self, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
        out = tmp_path / "out.pth"
        assert self.convert(checkpoint, out, "nnunet", *TARGET) == 0
        monkeypatch.setenv("nnUNet_results", str(tmp_path))
        trainer_class = TRAINERS[read_checkpoint(out)["trainer_name"]]
        plans = make_plans([16, 16, 16], CUBIC, hyspark={"preset": "S"})
        trainer = trainer_class(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
        settings = trainer.configuration_manager
        trainer.network = trainer_class.build_network_architecture(trainer.plans_manager, settings, 1, 2)
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.num_input_channels, trainer.was_initialized = 1, True
        trainer.load_checkpoint(str(out))
        assert weights_equal(trainer.network.state_dict(), read_weights(checkpoint).state)
        assert trainer.current_epoch == 0

    def test_a_release_becomes_a_checkpoint(self, checkpoint: Path, tmp_path: Path, capsys) -> None:
        source = read_weights(checkpoint).state
        torch.save(to_reference(source).state, tmp_path / "release.pth")
        out = tmp_path / "out.pth"
        assert self.convert(tmp_path / "release.pth", out, "nnunet", *TARGET) == 0
        made = read_weights(out).state
        assert set(made) == set(source)
        coarse = re.compile(r"decoder\.seg_layers\.[01]\.")
        assert all(torch.equal(made[name], tensor) for name, tensor in source.items() if not coarse.match(name))
        printed = capsys.readouterr().out
        assert ("They are assumed to be background, organ" in printed) == any("seg_layers" in name for name in source)

    def test_what_would_have_to_be_adapted_is_refused(self, checkpoint: Path, preprocessed: Path, capsys) -> None:
        content = DATASET_JSON | {"channel_names": {"0": "T1", "1": "T2"}}
        (preprocessed / "dataset.json").write_text(json.dumps(content))
        out = checkpoint.with_name("out.pth")
        assert self.convert(checkpoint, out, "nnunet", *TARGET) == 1
        printed = capsys.readouterr().err
        assert "tensors would be adapted or left out, first encoder.stem.weight" in printed
        assert "train with -pretrained_weights" in printed and not out.exists()

    def test_other_labels_are_refused(self, tmp_path: Path, capsys, preprocessed: Path) -> None:
        file = write_checkpoint(FINETUNER, tmp_path / "tuned.pth")
        torch.save(to_reference(read_weights(file).state).state, tmp_path / "release.pth")
        content = DATASET_JSON | {"labels": {"background": 0, "a": 1, "b": 2}}
        (preprocessed / "dataset.json").write_text(json.dumps(content))
        assert self.convert(tmp_path / "release.pth", tmp_path / "out.pth", "nnunet", *TARGET) == 1
        assert f"has 2 heads, but {DATASET} has 3 (background, a, b)" in capsys.readouterr().err

    def test_nothing_is_overwritten(self, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
        before = checkpoint.read_bytes()
        assert self.convert(checkpoint, checkpoint, "safetensors") == 1
        assert "exists: choose another name" in capsys.readouterr().err and checkpoint.read_bytes() == before

    def test_a_dataset_is_needed_for_nnunet(self, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
        assert self.convert(checkpoint, checkpoint.with_name("out.pth"), "nnunet") == 1
        assert "belongs to a dataset: name it with -d" in capsys.readouterr().err

    def test_other_networks_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        torch.save({"state_dict": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        assert self.convert(tmp_path / "other.pth", tmp_path / "out.pth", "safetensors") == 1
        assert "holds no complete encoder of HySparK or of nnU-Net" in capsys.readouterr().err
