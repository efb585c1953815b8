"""Starting a network from pre-trained weights."""

import copy
import json
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.checkpoints.report import part_of
from hyspark_nnunet.checkpoints.transfer import transfer_weights

ARGUMENTS = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": (4, 6, 8),
    "conv_op": torch.nn.Conv3d,
    "kernel_sizes": ((3, 3, 3),) * 3,
    "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "n_blocks_per_stage": (1, 2, 1),
    "expansion_per_stage": (2, 3, 2),
    "vit_n_blocks": 1,
    "vit_num_heads": 2,
}


@pytest.fixture
def pretrained() -> HySparKMaskedAutoencoder:
    torch.manual_seed(1)
    return HySparKMaskedAutoencoder(**ARGUMENTS, decoder_width=12)


@pytest.fixture
def network() -> HySparKUNet:
    torch.manual_seed(2)
    return HySparKUNet(**ARGUMENTS, num_classes=3)


def snapshot(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(network.state_dict())


def test_the_whole_encoder_is_loaded_and_the_rest_accounted_for(pretrained, network) -> None:
    before, source = snapshot(network), pretrained.state_dict()
    report = transfer_weights(network, source, "file.pth")
    for name, tensor in network.state_dict().items():
        expected = source[name] if name.startswith("encoder.") else before[name]
        assert torch.equal(tensor, expected), name
    assert report.encoder_share == 1
    fates = {entry.name: entry.fate for entry in report.entries}
    assert {n for n, fate in fates.items() if fate == "loaded"} == {n for n in before if n.startswith("encoder.")}
    assert {n for n, fate in fates.items() if fate == "random"} == {n for n in before if n.startswith("decoder.")}
    assert {n for n, fate in fates.items() if fate == "unused"} == {n for n in source if not n.startswith("encoder.")}
    image = torch.randn(1, 1, 8, 12, 8)
    for ours, theirs in zip(network.encoder(image), pretrained.encoder(image), strict=True):
        assert torch.equal(ours, theirs)


def test_another_patch_size_needs_nothing(pretrained, network) -> None:
    transfer_weights(network, pretrained.state_dict(), "file.pth")
    assert network(torch.randn(1, 1, 16, 8, 20)).shape == (1, 3, 16, 8, 20)


def test_a_fine_tuned_network_brings_its_decoder_but_not_its_heads(network) -> None:
    source = HySparKUNet(**ARGUMENTS, num_classes=3)
    before = snapshot(network)
    report = transfer_weights(network, source.state_dict(), "file.pth")
    for name, tensor in network.state_dict().items():
        expected = before[name] if "seg_layers" in name else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    heads = {(entry.fate, entry.why) for entry in report.entries if "seg_layers" in entry.name}
    why = "heads belong to the labels; the file does not name its labels"
    assert heads == {("random", why), ("unused", why)}


def test_no_shared_name(network) -> None:
    with pytest.raises(
        ValueError, match="file.pth shares no weight with this network: it holds conv.weight, the network"
    ):
        transfer_weights(network, {"conv.weight": torch.zeros(3)}, "file.pth")


def test_other_widths_name_both_and_load_nothing(network) -> None:
    source = HySparKMaskedAutoencoder(**(ARGUMENTS | {"features_per_stage": (4, 8, 8)}), decoder_width=12)
    before = snapshot(network)
    with pytest.raises(
        ValueError, match=r"\(8, 4, 3, 3, 3\) in the file, \(6, 4, 3, 3, 3\) here(.|\n)*Nothing was loaded"
    ) as error:
        transfer_weights(network, source.state_dict(), "file.pth", {"preset": "B"}, {"preset": "S"})
    assert "set HYSPARK_PRESET=B" in str(error.value) and "preset is B in the file, S here" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_partial_file_is_an_error_unless_allowed(pretrained, network, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = {n: t for n, t in pretrained.state_dict().items() if n.startswith(("encoder.stem", "encoder.stages.0"))}
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"would fill only \d+\.\d% of the encoder.*HYSPARK_ALLOW_PARTIAL=1"):
        transfer_weights(network, partial, "file.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    report = transfer_weights(network, partial, "file.pth")
    assert report.encoder_share < 0.9
    assert torch.equal(network.encoder.stem.weight, pretrained.encoder.stem.weight)


def test_differing_strides_are_noted(pretrained, network) -> None:
    report = transfer_weights(network, pretrained.state_dict(), "f", {"strides": [[1], [2]]}, {"strides": [[1], [4]]})
    assert report.notes == ["differs: strides is [[1], [2]] in the file, [[1], [4]] here"]
    assert report.notes[0] in report.table()


def test_the_report_counts_and_is_saved(pretrained, network, tmp_path: Path) -> None:
    report = transfer_weights(network, pretrained.state_dict(), "file.pth")
    ours = sum(t.numel() for t in network.state_dict().values())
    assert report.parameters("loaded", "random") == ours
    assert report.parameters("unused") == sum(
        t.numel() for n, t in pretrained.state_dict().items() if not n.startswith("encoder.")
    )
    table = report.table()
    assert "stem" in table and "stage 1" in table and "ViT" in table and "100.0% of the encoder's parameters" in table
    report.save(tmp_path / "report.json", "file.pth")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["encoder_share"] == 1 and len(saved["tensors"]) == len(report.entries)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("encoder.stem.weight", "stem"),
        ("encoder.stages.0.blocks.0.conv.bias", "stage 0"),
        ("encoder.vit.blocks.0.norm1.weight", "ViT"),
        ("decoder.levels.1.fusion.conv1.weight", "decoder level 1"),
        ("decoder.seg_layers.0.bias", "heads"),
        ("decoder.project.bias", "decoder projection"),
        ("densify.mask_tokens.0", "mask tokens"),
        ("densify.projections.0.weight", "densifying projections"),
        ("conv.weight", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part
