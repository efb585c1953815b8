"""``checkpoint convert`` to the files of nnU-Net and nnssl, and reading these files."""

import json
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

import hyspark_nnunet
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.network_plan import by_configuration
from hyspark_nnunet.checkpoints.state_dicts import stored_once
from hyspark_nnunet.checkpoints.storage import read_weights, write_atomically
from hyspark_nnunet.cli import main
from tests.nnunet_plans import DATASET, DATASET_JSON, plans_of

CLASSES = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}
every_network = pytest.mark.parametrize("kind", CLASSES)


def stock_network(plans: dict, input_channels: int = 1) -> nn.Module:
    """As nnUNetTrainer builds it."""
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    return by_configuration(configuration).build(input_channels, 2, True)


def write_checkpoint(plans: dict, path: Path, decoder: str = "unet") -> Path:
    """A checkpoint of pre-training, as far as these commands read it."""
    torch.manual_seed(1)
    network = SparKMaskedAutoencoder(stock_network(plans), 1, decoder)
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": "all", "dataset_json": DATASET_JSON}
    content = {"network_weights": network.state_dict(), "trainer_name": "SparKPretrainTrainer", "current_epoch": 3}
    write_atomically({**content, "init_args": arguments}, path)
    return path


def convert(file: Path, out: Path, *arguments: str) -> int:
    return main(["checkpoint", "convert", str(file), str(out), "--to", *arguments])


def stored(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a dataset without plans."""
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


@every_network
@pytest.mark.parametrize("decoder", ["unet", "reconstruction"])
def test_nnunets_own_loader_takes_the_weights(kind: str, decoder: str, tmp_path: Path, capsys) -> None:
    plans = plans_of(kind)
    file, out = write_checkpoint(plans, tmp_path / "checkpoint.pth", decoder), tmp_path / "weights.pth"
    assert convert(file, out, "nnunet-weights") == 0
    printed = capsys.readouterr().out
    source = read_weights(file).state
    torch.manual_seed(2)
    network = stock_network(plans)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_pretrained_weights(network, str(out))
    state = stored_once(network.state_dict())
    for name, tensor in state.items():
        if "seg_layers" in name:
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("encoder.") or decoder == "unet":
            assert torch.equal(tensor, source[name]), name
        else:
            assert tensor.ndim == 1 or not torch.equal(tensor, before[name]), name
    said = "as in the file" if decoder == "unet" else "freshly initialised"
    assert f"decoder: {said}" in printed and "densify.mask_tokens.0" in printed
    # all names, and each tensor once in the file
    weights = stored(out)["network_weights"]
    assert set(weights) == {name for name in network.state_dict() if "seg_layers" not in name}
    assert len({t.untyped_storage().data_ptr() for t in weights.values()}) == len(stored_once(weights))
    size = sum(tensor.nbytes for tensor in stored_once(weights).values())
    assert out.stat().st_size < size + 2000 * len(weights)


@every_network
def test_the_layout_of_nnssl(kind: str, tmp_path: Path) -> None:
    file, out = write_checkpoint(plans_of(kind), tmp_path / "checkpoint.pth"), tmp_path / "nnssl.pth"
    assert convert(file, out, "nnssl") == 0
    content = stored(out)
    plan, names = content["nnssl_adaptation_plan"], set(content["network_weights"])
    assert set(names) == {name for name in stock_network(plans_of(kind)).state_dict() if "seg_layers" not in name}
    kwargs = plans_of(kind)["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    architecture = plan["architecture_plans"]
    assert architecture["arch_class_name"] == kind and architecture["arch_kwargs"] == kwargs
    assert architecture["arch_kwargs_requiring_import"] == ["conv_op", "norm_op", "dropout_op", "nonlin"]
    sizes = {"spacing": [1.0] * 3, "patch_size": [16] * 3}
    assert plan["pretrain_plan"] == {"configurations": {"3d_fullres": sizes}}
    assert plan["pretrain_num_input_channels"] == 1 and plan["key_to_lpe"] is None
    assert plan["recommended_downstream_patchsize"] == plan["pretrain_patch_size"] == [16] * 3
    network = CLASSES[kind](1, **{k: None if k == "dropout_op" else v for k, v in kwargs_imported(kwargs).items()})
    assert plan["key_to_encoder"] == network.key_to_encoder and plan["key_to_stem"] == network.key_to_stem
    assert set(plan["keys_to_in_proj"]) == set(network.keys_to_in_proj)
    assert {f"{key}.weight" for key in plan["keys_to_in_proj"]} < names
    assert {"type", "name", "apa_citations"} == set(content["citations"][0])


def kwargs_imported(kwargs: dict) -> dict:
    classes = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "dropout_op": None, "nonlin": nn.LeakyReLU}
    return {**kwargs, **classes, "num_classes": 2}


class TestFromNnssl:
    @pytest.fixture(params=CLASSES)
    def file(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """In the layout of nnssl's models: all names, one channel, the output of pre-training as seg_layers."""
        torch.manual_seed(3)
        plans = plans_of(request.param)
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        plan = {
            "architecture_plans": {
                "arch_class_name": request.param,
                "arch_kwargs": architecture["arch_kwargs"],
                "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
            },
            "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": (160, 160, 160)}}},
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": (160, 160, 160),
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
            "key_to_lpe": None,
        }
        network = stock_network(plans).state_dict()
        torch.save({"network_weights": network, "nnssl_adaptation_plan": plan}, tmp_path / "theirs.pth")
        return tmp_path / "theirs.pth"

    def test_inspect(self, file: Path, capsys: pytest.CaptureFixture) -> None:
        assert main(["checkpoint", "inspect", str(file)]) == 0
        printed = capsys.readouterr().out
        kind = stored(file)["nnssl_adaptation_plan"]["architecture_plans"]["arch_class_name"]
        rows = {line.partition(" ")[0]: line.split(maxsplit=1)[1] for line in printed.splitlines() if " " in line}
        assert rows["source"] == "nnssl" and rows["network"] == kind
        assert rows["stages"] == "3 of widths 4, 6, 8" and rows["kernels"] == "3x3x3, 3x3x3, 3x3x3"
        assert "[160, 160, 160]" in printed and "[1, 1, 1]" in printed
        # each tensor is counted once
        assert f"{sum(t.numel() for t in read_weights(file).state.values()):,}" in printed

    def test_load_network_and_encoder(self, file: Path) -> None:
        state = read_weights(file).state
        with pytest.raises(ValueError, match="holds no segmentation heads"):
            hyspark_nnunet.load_network(file)
        network = hyspark_nnunet.load_network(file, num_classes=5, input_channels=2)
        assert type(network).__name__ in CLASSES
        assert network.transfer_report.encoder_share == 1
        loaded = stored_once(network.state_dict())
        stem = next(name for name in state if state[name].shape[1:] == (1, 3, 3, 3))
        torch.testing.assert_close(loaded[stem].sum(1), state[stem].sum(1))
        for name, tensor in loaded.items():
            assert torch.equal(tensor, state[name]) or name == stem or "seg_layers" in name, name
        assert network(torch.randn(1, 2, 8, 8, 8)).shape == (1, 5, 8, 8, 8)
        encoder = hyspark_nnunet.load_encoder(file)
        features = encoder(torch.randn(1, 1, 8, 8, 8))
        assert [feature.shape[1:] for feature in features] == [(4, 8, 8, 8), (6, 4, 4, 4), (8, 2, 2, 2)]
        assert all(
            torch.equal(tensor, state[f"encoder.{name}"])
            for name, tensor in encoder.state_dict().items()
            if f"encoder.{name}" in state
        )
        with pytest.raises(ValueError, match="vit_num_heads is 2, but .* which has no ViT"):
            hyspark_nnunet.load_encoder(file, vit_num_heads=2)

    def test_to_stock_nnunet(self, file: Path, tmp_path: Path) -> None:
        assert convert(file, tmp_path / "out.pth", "nnunet-weights") == 0
        theirs, ours = stored(file)["network_weights"], stored(tmp_path / "out.pth")["network_weights"]
        assert set(ours) == {name for name in theirs if "seg_layers" not in name}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_checkpoint(plans_of("PlainConvUNet"), tmp_path / "checkpoint.pth")

    @pytest.mark.parametrize("kind", ["hyspark-release", "nnunet"])
    def test_formats_of_other_networks(self, file: Path, tmp_path: Path, kind: str, capsys) -> None:
        assert convert(file, tmp_path / "out.pth", kind, "-d", "7") == 1
        assert (
            f"--to {kind} is for HySparK's networks, but {file} holds nnU-Net's PlainConvUNet"
            in capsys.readouterr().err
        )

    def test_a_plan_that_does_not_fit(self, file: Path, preprocessed: Path, tmp_path: Path, capsys) -> None:
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans_of("ResidualEncoderUNet")))
        assert convert(file, tmp_path / "out.pth", "nnunet-weights", "-d", "7") == 1
        assert "choose plans with the file's network (-p)" in capsys.readouterr().err
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans_of("PlainConvUNet")))
        names = {"channel_names": {"0": "T1", "1": "T2"}}
        (preprocessed / "dataset.json").write_text(json.dumps(DATASET_JSON | names))
        assert convert(file, tmp_path / "out.pth", "nnunet-weights", "-d", "7") == 1
        assert (
            "without adaptation: 1 tensors would be adapted or left out, first encoder.stages"
            in capsys.readouterr().err
        )
        assert not (tmp_path / "out.pth").exists()

    def test_a_file_that_does_not_say_its_patch(self, file: Path, preprocessed: Path, tmp_path: Path, capsys) -> None:
        alone, out = tmp_path / "weights.safetensors", tmp_path / "nnssl.pth"
        assert convert(file, alone, "safetensors") == 0
        bare = tmp_path / "bare.pth"
        torch.save(read_weights(alone).state, bare)
        assert convert(bare, out, "nnssl") == 1
        assert "does not say the patch size and spacing" in capsys.readouterr().err
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans_of("PlainConvUNet")))
        assert convert(bare, out, "nnssl", "-d", "7") == 0
        expected = stored_once(read_weights(file).state)
        found = read_weights(out).state
        assert set(found) < set(expected) and all(torch.equal(t, expected[n]) for n, t in found.items())
