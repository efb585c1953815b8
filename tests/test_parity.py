"""Our networks against numbers recorded from the public HySparK release.

Two small recordings in ``tests/fixtures`` always run: a missing file is a failure. ``HYSPARK_REFERENCE_FIXTURES`` names
a folder of further recordings, every ``*.npz`` of which runs as well. Everything comes from the file: its
configuration, its kind, its weights' shapes; nothing from its name.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.dense_baseline import DenseBaseline
from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.building_blocks.transformer import sincos_positions
from hyspark_nnunet.checkpoints.reference import from_reference, to_reference
from hyspark_nnunet.masking import num_visible_units
from hyspark_nnunet.training.loss import reconstruction_loss

FIXTURES = Path(__file__).parent / "fixtures"


def recordings() -> list[Path]:
    """The recordings of the repository and those of ``HYSPARK_REFERENCE_FIXTURES``.

    Raises:
        FileNotFoundError: the variable names a folder without recordings.
    """
    files = [FIXTURES / "masked_autoencoder_small.npz", FIXTURES / "segmentation_small.npz"]
    if folder := os.environ.get("HYSPARK_REFERENCE_FIXTURES"):
        more = sorted(Path(folder).glob("*.npz"))
        if not more:
            raise FileNotFoundError(f"HYSPARK_REFERENCE_FIXTURES={folder} holds no *.npz file")
        files += more
    return files


class Recording:
    """One file of recorded numbers."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
            self.config = json.loads(str(file["config"]))
        self.state = self.part("state")

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) + 1 :]: v for k, v in self.arrays.items() if k.startswith(prefix + "/")}

    @property
    def is_autoencoder(self) -> bool:
        return "loss" in self.arrays and "active" in self.arrays

    @property
    def grid(self) -> list[int]:
        return [self.config["img_size"] // 2 ** (len(self.config["channels"]) - 1)] * 3

    def network_arguments(self) -> dict:
        prefix = "sparse_encoder.embeddings" if self.is_autoencoder else "embeddings"
        channels, depths = self.config["channels"], self.config["depths"]
        stages = range(1, len(channels) + 1)
        convs = [self.state[f"{prefix}.layer{i}.0.conv1.weight"] for i in stages]
        expands = [self.state[f"{prefix}.layer{i}.0.conv2.weight"] for i in stages]
        expansions = [len(w) // c for w, c in zip(expands, channels, strict=True)]
        assert self.config.get("exp_r", expansions) == expansions
        arguments = {
            "input_channels": self.arrays["input"].shape[1],
            "n_stages": len(channels),
            "features_per_stage": channels,
            "conv_op": torch.nn.Conv3d,
            "kernel_sizes": [tuple(w.shape[2:]) for w in convs],
            "strides": [(1, 1, 1)] + [(2, 2, 2)] * (len(channels) - 1),
            "n_blocks_per_stage": depths,
            "expansion_per_stage": expansions,
            "vit_n_blocks": self.config["vit_depth"],
            "vit_num_heads": self.config["num_heads"],
        }
        if self.is_autoencoder:
            return arguments | {"decoder_width": self.config["decoder_width"]}
        levels = range(1, len(channels))
        layers = [self.state[f"decoder.decoder{k}.layer.conv2.weight"] for k in levels]
        return arguments | {
            "num_classes": self.config["n_classes"],
            "expansion_per_stage_decoder": [len(w) // c for w, c in zip(layers, channels[1:], strict=True)],
        }

    def network(self, dtype: torch.dtype) -> torch.nn.Module:
        """Our network with the recorded weights, in training mode."""
        network = (HySparKMaskedAutoencoder if self.is_autoencoder else HySparKUNet)(**self.network_arguments())
        missing, unexpected = network.load_state_dict(from_reference(self.state).state, strict=False)
        assert not unexpected
        # the release has no deep supervision: its heads at the coarser levels are ours alone
        finest = len(self.config["channels"]) - 2
        assert {name for name in missing if not name.startswith("decoder.seg_layers.")} == set()
        assert not any(name.startswith(f"decoder.seg_layers.{finest}.") for name in missing)
        return network.to(dtype).train()


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape, name
    scale = expected.abs().max().item()
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= tolerance * max(scale, 1e-12), f"{name}: off by {worst:.3g} where the largest value is {scale:.3g}"


def assert_gradients(network: torch.nn.Module, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative L2 of each gradient; an absolute floor where it is zero in theory (a bias before a BatchNorm)."""
    assert expected
    theirs = to_reference({n: p.grad for n, p in network.named_parameters() if p.grad is not None}).state
    largest = max(g.double().norm().item() for g in expected.values())
    compared = 0
    for name, gradient in expected.items():
        difference = (theirs[name].double() - gradient.double()).norm().item()
        allowed = max(tolerance * gradient.double().norm().item(), tolerance * 1e-3 * largest)
        assert difference <= allowed, f"gradient of {name}: off by {difference:.3g}, allowed {allowed:.3g}"
        compared += 1
    assert compared == len(expected)


RECORDINGS = [Recording(path) for path in recordings()]
AUTOENCODERS = [recording for recording in RECORDINGS if recording.is_autoencoder]
SEGMENTATIONS = [recording for recording in RECORDINGS if not recording.is_autoencoder]


def over(recordings: list[Recording]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recording", recordings, ids=lambda recording: recording.name)


@over(RECORDINGS)
def test_positions_are_equal_to_the_bit(recording: Recording) -> None:
    stored = recording.state[("sparse_encoder." if recording.is_autoencoder else "") + "mae.pos_embed"][0]
    assert torch.equal(sincos_positions(recording.grid, stored.shape[1]), stored)


@over(RECORDINGS)
def test_names_convert_and_return_unchanged(recording: Recording) -> None:
    there = from_reference(recording.state)
    back = to_reference(there.state, recording.grid)
    assert set(back.state) == set(recording.state) and not back.dropped
    for name, tensor in recording.state.items():
        assert back.state[name].shape == tensor.shape, name
        if name not in there.dropped:
            assert torch.equal(back.state[name], tensor), name


@over(AUTOENCODERS)
def test_pretraining_in_float32(recording: Recording) -> None:
    network = recording.network(torch.float32)
    image, visible = recording.arrays["input"], recording.arrays["active"]
    grid = visible.shape[2:]
    assert visible.flatten(1).sum(1).eq(num_visible_units(grid, recording.config["mask_ratio"])).all()
    features = network.encoder.features(image, visible)
    skips = network.densify(features[:0:-1])
    reconstruction = network.decoder(skips)
    loss = reconstruction_loss(reconstruction, image, visible)
    for i, feature in enumerate(features):
        actual, expected = feature.image(), recording.arrays[f"fea/{i}"]
        if i == len(features) - 1:  # the recorded one carries a token at hidden positions
            expected = torch.where(visible, expected, torch.zeros(()))
        assert_close(actual, expected, 1e-4, f"feature {i}")
    assert len(recording.part("to_dec")) == len(skips)
    for i, skip in enumerate(skips):
        assert_close(skip, recording.arrays[f"to_dec/{i}"], 1e-4, f"densified feature {i}")
    assert_close(reconstruction, recording.arrays["rec"], 1e-4, "reconstruction")
    assert_close(loss, recording.arrays["loss"], 1e-4, "loss")
    ours = to_reference(network.state_dict(), grid).state
    after = {k: v for k, v in recording.part("state_after").items() if not k.startswith("dense_decoder.fuse.0.")}
    assert after
    for name, expected in after.items():
        assert_close(ours[name], expected, 1e-4, name)


@over(SEGMENTATIONS)
def test_segmentation_in_float32(recording: Recording) -> None:
    network, image = recording.network(torch.float32), recording.arrays["input"]
    features = network.encoder.features(image)
    before_vit: list[torch.Tensor] = []
    hook = network.encoder.vit.register_forward_pre_hook(lambda _, inputs: before_vit.append(inputs[0]))
    logits = network(image)
    hook.remove()
    last = len(features) - 1
    for i, feature in enumerate(features[:-1]):
        assert_close(feature.image(), recording.arrays[f"emb/{i}"], 1e-4, f"feature {i}")
    coarsest = recording.arrays[f"emb/{last}"]
    assert_close(before_vit[0].movedim(-1, 1).reshape(coarsest.shape), coarsest, 1e-4, "before the transformer")
    assert_close(features[-1].image(), recording.arrays["vit"], 1e-4, "behind the transformer")
    assert_close(logits, recording.arrays["logits"], 1e-4, "logits")
    terms = logits * recording.arrays["gradcheck_weight"]
    # the terms cancel: compare on their scale, not on that of the sum
    assert abs(terms.mean() - recording.arrays["gradcheck_loss"]) <= 1e-4 * terms.abs().mean()
    terms.mean().backward()
    assert_gradients(network, recording.part("grad"), 1e-2)


@over([recording for recording in AUTOENCODERS if "loss64" in recording.arrays])
def test_pretraining_in_float64(recording: Recording) -> None:
    network = recording.network(torch.float64)
    image, visible = recording.arrays["input"].double(), recording.arrays["active"]
    for way in (network, DenseBaseline(network, dropped_branch=False)):
        network.zero_grad()
        reconstruction = way(image, visible)
        loss = reconstruction_loss(reconstruction, image, visible)
        loss.backward()
        assert_close(loss, recording.arrays["loss64"], 1e-6, "loss")
        assert relative_l2(reconstruction, recording.arrays["rec64"]) <= 1e-6
        assert_gradients(network, recording.part("grad64"), 1e-6)
