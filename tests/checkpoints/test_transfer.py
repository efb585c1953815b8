"""Starting a network from pre-trained weights."""

import copy
import json
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.checkpoints.report import part_of
from hyspark_nnunet.checkpoints.transfer import transfer_weights
from tests.small_networks import small_arguments

ARGUMENTS = small_arguments(vit_n_blocks=1)


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
    why = "heads are matched by label; the file does not name its labels"
    assert heads == {("random", why), ("unused", why)}


def test_no_shared_name(network) -> None:
    with pytest.raises(
        ValueError, match="file.pth has no weights for this network's encoder: it holds conv.weight, the network has"
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


def test_tuples_and_lists_are_no_difference(pretrained, network) -> None:
    report = transfer_weights(network, pretrained.state_dict(), "f", {"strides": [(1,), (2,)]}, {"strides": [[1], [2]]})
    assert report.notes == []


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
        ("decoder.levels.1.refine.conv1.weight", "reconstruction level 1"),
        ("decoder.stages.1.convs.0.conv.weight", "decoder stage 1"),
        ("decoder.transpconvs.0.weight", "decoder stage 0"),
        ("decoder.seg_layers.0.bias", "heads"),
        ("decoder.project.bias", "reconstruction head"),
        ("decoder.head.weight", "reconstruction head"),
        ("densify.mask_tokens.0", "mask tokens"),
        ("densify.projections.0.weight", "densifying projections"),
        ("conv.weight", "other"),
    ],
)
def test_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def with_stages(n: int, **more) -> dict:
    """Arguments of a network of n stages with one block each."""
    return small_arguments(
        n, **{"n_blocks_per_stage": (1,) * n, "expansion_per_stage": (2,) * n, "vit_n_blocks": 1, **more}
    )


def fates(report) -> dict[str, set[str]]:
    """The fates of the tensors of each part of the network."""
    found: dict[str, set[str]] = {}
    for entry in report.entries:
        if entry.fate != "unused":
            found.setdefault(entry.part, set()).add(entry.fate)
    return found


def test_the_vit_goes_to_the_stage_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bottlenecks are of equal width, on stage 3 and on stage 2."""
    monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    source = HySparKUNet(**with_stages(4), num_classes=2)
    network = HySparKUNet(**with_stages(3, features_per_stage=(4, 6, 12)), num_classes=2)
    before = snapshot(network)
    report = transfer_weights(network, source.state_dict(), "file.pth")
    theirs, ours = source.state_dict(), network.state_dict()
    for name, tensor in ours.items():
        if name.startswith("encoder.stages.2."):
            assert torch.equal(tensor, theirs[name.replace("stages.2", "stages.3")]), name
        elif name.startswith("encoder.stages.1.widen."):  # 6 -> 8 in the file, 6 -> 12 here
            assert torch.equal(tensor, before[name])
        elif name.startswith("encoder."):
            assert torch.equal(tensor, theirs[name]), name
    assert "the ViT of stage 3 in the file is loaded into stage 2" in report.notes
    whys = {e.why for e in report.entries if e.name.startswith("encoder.stages.2.")}
    assert "from encoder.stages.3.blocks.0 of the file" in whys
    # of the decoder, the level between stages 0 and 1 is common
    assert torch.equal(ours["decoder.levels.1.fusion.conv1.weight"], theirs["decoder.levels.2.fusion.conv1.weight"])
    assert fates(report)["decoder level 0"] == {"random"} and fates(report)["decoder level 1"] == {"loaded"}


def test_more_stages_than_the_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    source = HySparKMaskedAutoencoder(**with_stages(3), decoder_width=12)
    network = HySparKMaskedAutoencoder(**with_stages(4), decoder_width=24)
    report = transfer_weights(network, source.state_dict(), "file.pth")
    theirs, ours = source.state_dict(), network.state_dict()
    # of the file's bottleneck, the block fits the stage as well as it did there; the ViT does not
    assert torch.equal(ours["encoder.stages.2.blocks.0.conv.weight"], theirs["encoder.stages.2.blocks.0.conv.weight"])
    assert fates(report)["ViT"] == {"random"} and "WARNING: the ViT is not loaded" in report.table()
    assert "width 8 in the file, 12 here" in report.table()
    # levels, tokens and projections count from full resolution
    assert torch.equal(ours["decoder.levels.2.refine.0.weight"], theirs["decoder.levels.1.refine.0.weight"])
    assert torch.equal(ours["densify.mask_tokens.2"], theirs["densify.mask_tokens.1"])


def test_other_widths_of_common_stages_are_refused() -> None:
    source = HySparKUNet(**with_stages(4, features_per_stage=(4, 8, 8, 12)), num_classes=2)
    network = HySparKUNet(**with_stages(3), num_classes=2)
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"stages: \[4, 8, 8, 12\] in the file, \[4, 6, 8\] here"):
        transfer_weights(network, source.state_dict(), "file.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_preset_of_a_file_that_says_nothing_is_named() -> None:
    sizes = {"S": (16, 32, 64), "B": (32, 64, 128)}
    source, network = (
        HySparKUNet(**(ARGUMENTS | {"features_per_stage": sizes[preset]}), num_classes=2) for preset in ("B", "S")
    )
    with pytest.raises(ValueError, match="The file was trained with preset B: set HYSPARK_PRESET=B"):
        transfer_weights(network, source.state_dict(), "file.pth")


def test_more_transformer_blocks_than_the_file_has(pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYSPARK_ALLOW_PARTIAL", "1")
    network = HySparKUNet(**(ARGUMENTS | {"vit_n_blocks": 2}), num_classes=2)
    report = transfer_weights(network, pretrained.state_dict(), "file.pth")
    random = {e.name for e in report.entries if e.fate == "random" and e.part == "ViT"}
    assert random == {name for name in network.state_dict() if name.startswith("encoder.vit.blocks.1.")}


def test_thin_kernels_grow_and_the_features_stay(network) -> None:
    """From kernels of 1 on an axis to 3: centred, so the encoder answers as before, without pooling on the axis."""
    thin = ARGUMENTS | {"kernel_sizes": ((1, 3, 3),) * 3}
    source = HySparKMaskedAutoencoder(**thin, decoder_width=12)
    report = transfer_weights(network, source.state_dict(), "file.pth")
    assert report.encoder_share == 1
    assert fates(report)["stem"] == {"loaded", "adapted"}
    image = torch.randn(1, 1, 8, 12, 8)
    for ours, theirs in zip(network.encoder(image), source.encoder(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kernels_that_would_be_truncated_are_refused(network) -> None:
    source = HySparKUNet(**(ARGUMENTS | {"kernel_sizes": ((5, 3, 3), (3, 3, 3), (3, 3, 3))}), num_classes=3)
    with pytest.raises(ValueError, match=r"encoder.stem.weight: \(4, 1, 5, 3, 3\) in the file, \(4, 1, 3, 3, 3\) here"):
        transfer_weights(network, source.state_dict(), "file.pth")


@pytest.mark.parametrize(("count", "named"), [(1, False), (3, False), (2, True)])
def test_equal_channels_give_equal_features(pretrained, count: int, named: bool) -> None:
    """From one channel to several: the encoder answers an image given on all of them as before."""
    source_description, target_description, mapping = {}, {}, None
    if named:
        source_description, mapping = {"channel_names": {"0": "CT"}}, "T1=CT, T2=CT"
        target_description = {"channel_names": {"0": "T1", "1": "T2"}}
    network = HySparKUNet(**(ARGUMENTS | {"input_channels": count}), num_classes=3)
    transfer_weights(network, pretrained.state_dict(), "file.pth", source_description, target_description, mapping)
    image = torch.randn(1, 1, 8, 12, 8)
    features = network.encoder(image.expand(1, count, 8, 12, 8))
    for ours, theirs in zip(features, pretrained.encoder(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_reconstruction_decoder_of_another_width_starts_at_random(pretrained) -> None:
    network = HySparKMaskedAutoencoder(**ARGUMENTS, decoder_width=24)
    report = transfer_weights(network, pretrained.state_dict(), "file.pth")
    assert report.encoder_share == 1
    assert fates(report)["reconstruction level 0"] == {"random"}
    assert "shape 12x12x2x2x2 in the file, 24x24x2x2x2 here" in report.table()


def labelled(*labels: str) -> dict:
    return {"labels": list(labels), "regions": False}


def test_heads_come_label_by_label(network) -> None:
    before, theirs = snapshot(network), HySparKUNet(**ARGUMENTS, num_classes=3).state_dict()
    source, target = labelled("background", "a", "b"), labelled("background", "b", "c")
    report = transfer_weights(network, theirs, "file.pth", source, target)
    for name in (n for n in before if "seg_layers" in n):
        tensor = network.state_dict()[name]
        assert torch.equal(tensor[:2], theirs[name][[0, 2]]) and torch.equal(tensor[2], before[name][2])
        entries = [(e.fate, e.parameters, e.why) for e in report.entries if e.name == name]
        share = tensor.numel() // 3
        assert entries == [
            ("adapted", 2 * share, "by label: background, b"),
            ("random", share, "heads are matched by label; labels not in the file: c"),
        ]


def test_heads_of_equal_labels_are_loaded_whole(network) -> None:
    source = HySparKUNet(**ARGUMENTS, num_classes=3)
    labels = labelled("background", "a", "b")
    report = transfer_weights(network, source.state_dict(), "file.pth", labels, labels)
    assert fates(report)["heads"] == {"loaded"}
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in source.state_dict().items())


def test_heads_stay_away_where_their_level_does(network) -> None:
    """A head reads its decoder level's features: without them its weights mean nothing."""
    state = HySparKUNet(**ARGUMENTS, num_classes=3).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.levels.1.")}
    labels = labelled("background", "a", "b")
    report = transfer_weights(network, state, "file.pth", labels, labels)
    by_name = {e.name: e for e in report.entries if e.fate != "unused"}
    assert by_name["decoder.seg_layers.0.weight"].fate == "loaded"
    assert by_name["decoder.seg_layers.1.weight"].fate == "random"
    assert "their decoder level is not loaded" in by_name["decoder.seg_layers.1.weight"].why
