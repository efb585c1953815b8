"""Networks in Python: ``hyspark_nnunet.load_network``, ``load_encoder`` and ``build_network``."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mypy.api
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

import hyspark_nnunet
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.spark import SparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.network_plan import by_configuration
from hyspark_nnunet.checkpoints.reference import to_reference
from hyspark_nnunet.checkpoints.state_dicts import stored_once
from hyspark_nnunet.checkpoints.storage import write_atomically, write_safetensors
from hyspark_nnunet.cli import main
from hyspark_nnunet.training.hyspark import HySparKFinetuneTrainer
from hyspark_nnunet.training.spark import SparKFinetuneTrainer
from tests.nnunet_plans import CUBIC, DATASET_JSON, make_plans, plans_of
from tests.small_networks import preset_arguments, small_arguments

PLAN_KINDS = ("SparK's pre-training", "SparK's fine-tuning", "SparK's safetensors", "nnU-Net", "nnssl")
PRETRAINED = {
    "channel_names": {"0": "CT"},
    "strides": CUBIC,
    "kernel_sizes": [[3, 3, 3]] * 4,
    "input_channels": 1,
}
FINETUNED = {**PRETRAINED, "labels": ["background", "organ"], "regions": False}


def write_plan_network(kind: str, path: Path) -> Path:
    """A PlainConvUNet with four stages."""
    plans = plans_of("PlainConvUNet", 4)
    configuration = PlansManager(plans_of("PlainConvUNet", 4)).get_configuration("3d_fullres")
    network = by_configuration(configuration).build(1, 2, True)
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": DATASET_JSON}
    about: dict[str, Any] = {"trainer_name": kind, "init_args": arguments}
    if kind in ("SparK's pre-training", "nnssl"):
        network = SparKMaskedAutoencoder(network, 1)
    if kind in ("SparK's pre-training", "SparK's fine-tuning"):
        about["hyspark"] = FINETUNED if "fine-tuning" in kind else PRETRAINED
    if kind in ("SparK's safetensors", "nnssl"):
        write_atomically({"network_weights": network.state_dict(), **about}, path.with_name("source.pth"))
        target = "safetensors" if kind == "SparK's safetensors" else "nnssl"
        assert main(["checkpoint", "convert", str(path.with_name("source.pth")), str(path), "--to", target]) == 0
    else:
        write_atomically({"network_weights": network.state_dict(), **about}, path)
    return path


def write_file(kind: str, folder: Path) -> Path:
    """A file with four stages, of HySparK's of preset S, of any kind that ``-pretrained_weights`` takes."""
    torch.manual_seed(1)
    if kind in PLAN_KINDS:
        return write_plan_network(kind, folder / "weights.pth")
    arguments = preset_arguments("S", 4)
    masked = HySparKMaskedAutoencoder(**arguments, decoder_width=16).state_dict()
    path = folder / "weights.pth"
    if kind == "pre-training":
        write_atomically({"network_weights": masked, "trainer_name": "P", "hyspark": PRETRAINED}, path)
    elif kind == "safetensors":
        write_safetensors(masked, {"trainer_name": "P", "hyspark": PRETRAINED}, path)
    elif kind == "release, masked autoencoder":
        write_atomically({"state_dict": to_reference(masked).state}, path)
    elif kind == "release, encoder":
        encoder = {name: tensor for name, tensor in masked.items() if name.startswith("encoder.")}
        write_atomically(to_reference(encoder).state, path)
    else:
        state = HySparKUNet(**arguments, num_classes=2, deep_supervision=True).state_dict()
        if kind == "fine-tuning, compiled":
            state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
            write_atomically({"network_weights": state, "trainer_name": "F", "hyspark": FINETUNED}, path)
        else:
            assert kind == "release, segmentation"
            write_atomically({"model": to_reference(state).state}, path)
    return path


KINDS = (
    "pre-training",
    "fine-tuning, compiled",
    "safetensors",
    "release, encoder",
    "release, masked autoencoder",
    "release, segmentation",
    *PLAN_KINDS,
)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[nn.Module, list[dict[str, Any]]]]:
    """The network that a fine-tuning starts from, and the tensors of its report."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def start(path: Path, dataset_json: dict, strides: list, kernel_sizes: list, own: bool) -> Any:
        trainer_class = HySparKFinetuneTrainer if own else SparKFinetuneTrainer
        plans = make_plans([16, 16, 16], strides, kernel_sizes, hyspark={"preset": "S"})
        if not own:
            plans = plans_of("PlainConvUNet", 4)
            architecture = plans["configurations"]["3d_fullres"]["architecture"]
            architecture["arch_kwargs"] |= {"strides": strides, "kernel_sizes": kernel_sizes}
        trainer = trainer_class(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        trainer.num_input_channels = len(dataset_json["channel_names"])
        trainer.network = trainer_class.build_network_architecture(
            trainer.plans_manager,
            trainer.configuration_manager,
            trainer.num_input_channels,
            len(dataset_json["labels"]),
        )
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.load_pretrained_weights(str(path))
        report = Path(trainer.output_folder) / "pretrained_weights_report.json"
        return trainer.network, json.loads(report.read_text())["tensors"]

    return start


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_a_training_starts_from(kind: str, tmp_path: Path, trained) -> None:
    path = write_file(kind, tmp_path)
    kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    changed = {
        **DATASET_JSON,
        "channel_names": {"0": "PET", "1": "CT"},
        "labels": {"background": 0, "tumour": 1, "organ": 2},
    }
    for dataset_json, kernel_sizes, their_strides in (
        (DATASET_JSON, [[3, 3, 3]] * 4, CUBIC),
        (changed, kernels, strides),
    ):
        expected, report = trained(path, dataset_json, their_strides, kernel_sizes, kind not in PLAN_KINDS)
        names = list(dataset_json["channel_names"].values())
        options: dict[str, Any] = {"strides": their_strides, "kernel_sizes": kernel_sizes}
        options |= {"input_channels": len(names), "channel_names": names}
        network = hyspark_nnunet.load_network(path, labels=list(dataset_json["labels"]), **options)
        assert [vars(entry) for entry in network.transfer_report.entries] == report
        adapted = {entry["name"] for entry in report if entry["fate"] == "adapted"}
        stem = "encoder.stages.0.0.convs.0.conv.weight" if kind in PLAN_KINDS else "encoder.stem.weight"
        assert (stem in adapted) == (dataset_json is changed)
        once = stored_once(network.state_dict())
        filled = {entry["name"] for entry in report if entry["fate"] in ("loaded", "adapted")}
        partly = {entry["name"] for entry in report if entry["fate"] == "random"}
        theirs = expected.state_dict()
        assert list(theirs) == list(network.state_dict())
        for name, tensor in once.items():
            if name in filled and name not in partly:
                assert torch.equal(tensor, theirs[name]), name
        for name in filled & partly:  # heads of which some labels are in the file
            assert torch.equal(once[name][[0, 2]], theirs[name][[0, 2]])
        encoder = hyspark_nnunet.load_encoder(path, **options)
        image = torch.randn(1, len(names), 16, 16, 16)
        for ours, feature in zip(encoder(image), expected.encoder(image), strict=True):
            assert torch.equal(ours, feature)
        assert encoder.transfer_report.encoder_share == 1


def test_a_fine_tuned_file_gives_its_own_network_with_its_heads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    written = HySparKUNet(
        **small_arguments(input_channels=2, vit_num_heads=4, kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3))),
        num_classes=3,
        expansion_per_stage_decoder=(1, 4),
    )
    about = {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "vit_num_heads": 4}
    write_atomically({"network_weights": written.state_dict(), "hyspark": about}, tmp_path / "weights.pth")
    network = hyspark_nnunet.load_network(tmp_path / "weights.pth")
    image = torch.randn(1, 2, 8, 12, 8)
    assert torch.equal(network(image), written(image))
    assert {entry.fate for entry in network.transfer_report.entries} == {"loaded"}
    # copies and files of the network do not hold the report
    assert list(network.state_dict()) == list(written.state_dict())
    assert torch.equal(copy.deepcopy(network)(image), network(image))


def test_deep_supervision_gives_the_logits_of_every_level(tmp_path: Path) -> None:
    path = write_file("pre-training", tmp_path)
    network = hyspark_nnunet.load_network(path, num_classes=5, deep_supervision=True)
    shapes = [tuple(logits.shape) for logits in network(torch.zeros(1, 1, 16, 16, 16))]
    assert shapes == [(1, 5, 16, 16, 16), (1, 5, 8, 8, 8), (1, 5, 4, 4, 4)]


def test_a_file_without_strides_is_taken_to_halve_every_axis(tmp_path: Path) -> None:
    path = write_file("release, encoder", tmp_path)
    with pytest.warns(UserWarning, match="does not contain its strides: stride 2 is assumed after the.*give strides"):
        encoder = hyspark_nnunet.load_encoder(path)
    assert encoder.unit == (8, 8, 8) and "2 is assumed" in encoder.transfer_report.table()


def test_a_network_of_planes(tmp_path: Path) -> None:
    plane: dict[str, Any] = {
        "conv_op": nn.Conv2d,
        "kernel_sizes": ((3, 3),) * 3,
        "strides": ((1, 1), (2, 2), (4, 2)),
    }
    written = HySparKUNet(**small_arguments(**plane), num_classes=2)
    write_atomically(written.state_dict(), tmp_path / "weights.pth")
    network = hyspark_nnunet.load_network(tmp_path / "weights.pth", strides=(1, 2, (4, 2)), vit_num_heads=2)
    image = torch.randn(1, 1, 16, 8)
    assert torch.equal(network(image), written(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds no segmentation heads .*: give the number of classes, for example num_classes=14"),
        ({"num_classes": 2, "strides": (1, 2)}, "strides has 2 entries, but the encoder in .* has 4 stages"),
        ({"num_classes": 2, "labels": ["a"]}, "num_classes is 2, but labels names 1: a"),
        (
            {"num_classes": 2, "channel_names": ["CT", "PET"]},
            "channel_names has 2 names, but there are 1 input channels",
        ),
        ({"num_classes": 2, "kernel_sizes": (5, 3, 3, 3)}, "does not fit this network"),
        ({"num_classes": 2, "input_channel_mapping": "MR=CT"}, "input_channel_mapping names channel MR"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_file("pre-training", tmp_path)
    with pytest.raises(ValueError, match=message):
        hyspark_nnunet.load_network(path, **options)


def test_a_file_without_an_encoder(tmp_path: Path) -> None:
    write_atomically({"conv.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no complete encoder of HySparK or of nnU-Net.*: it has conv.weight"):
        hyspark_nnunet.load_encoder(tmp_path / "other.pth")


class TestBuildNetwork:
    @pytest.mark.parametrize("preset", ["S", "B", "L"])
    def test_the_network_of_a_preset(self, preset: str) -> None:
        with torch.device("meta"):
            network = hyspark_nnunet.build_network(preset, input_channels=2, num_classes=14)
            expected = HySparKUNet(**preset_arguments(preset, 5, input_channels=2), num_classes=14)
        shapes, others = (
            {name: tensor.shape for name, tensor in made.state_dict().items()} for made in (network, expected)
        )
        assert shapes == others and network.encoder.unit == (16, 16, 16)

    def test_other_strides_and_planes(self) -> None:
        network = hyspark_nnunet.build_network("S", num_classes=2, strides=((1, 1), 2, (1, 2)), kernel_sizes=(3, 3, 5))
        logits: Tensor = network(torch.zeros(1, 1, 8, 8))
        assert logits.shape == (1, 2, 8, 8) and network.encoder.unit == (2, 4)

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="preset is 'XL', but it must be one of S, B, L"):
            hyspark_nnunet.build_network("XL", num_classes=2)
        with pytest.raises(ValueError, match="strides has 6 entries, but preset S has at most 5 stages"):
            hyspark_nnunet.build_network("S", num_classes=2, strides=(1, 2, 2, 2, 2, 2))


def test_what_is_imported(tmp_path: Path) -> None:
    """The package alone imports the standard library at most; loading a network does not import nnU-Net."""
    paths = []
    for kind in ("fine-tuning, compiled", "SparK's fine-tuning"):
        (tmp_path / kind).mkdir()
        paths.append(str(write_file(kind, tmp_path / kind)))
    script = f"""
import sys
before = set(sys.modules)
import hyspark_nnunet
print(*set(sys.modules) - before)
for path in {paths!r}:
    hyspark_nnunet.load_network(path)
print([name for name in ("nnunetv2", "matplotlib", "SimpleITK") if name in sys.modules])
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    package, network = done.stdout.splitlines()
    others = set(package.split()) - {"hyspark_nnunet"}
    assert {name.partition(".")[0] for name in others} <= sys.stdlib_module_names
    assert network == "[]"


def test_the_results_are_typed_for_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By mypy, with the project's settings and cache; py.typed says that users' code may be checked so, too."""
    root = Path(__file__).resolve().parents[1]
    assert (root / "hyspark_nnunet/py.typed").is_file()
    monkeypatch.chdir(root)
    settings = re.sub(r"^packages = .*$", "", (root / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    code = """
import hyspark_nnunet
reveal_type(hyspark_nnunet.load_network("file.pth").transfer_report)
reveal_type(hyspark_nnunet.load_encoder("file.pth").output_channels)
hyspark_nnunet.load_network("file.pth", num_classes="two")
"""
    said, errors, _ = mypy.api.run(["--config-file", str(tmp_path / "pyproject.toml"), "-c", code])
    assert 'Revealed type is "hyspark_nnunet.checkpoints.report.TransferReport"' in said, said + errors
    assert 'Revealed type is "typing.Sequence[int]"' in said
    assert said.count("error:") == 1 and 'Argument "num_classes"' in said


def test_the_top_level_names_what_it_offers() -> None:
    assert set(hyspark_nnunet.__all__) <= set(dir(hyspark_nnunet))
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        hyspark_nnunet.load_everything  # noqa: B018
