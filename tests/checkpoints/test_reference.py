"""Names of the public release, against the complete key list of HySparK-B."""

import json
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.checkpoints.reference import from_reference, own_form, reference_form, to_reference
from tests.small_networks import preset_arguments

KEY_LIST = Path(__file__).parents[1] / "fixtures" / "hyspark_b_state_dict_keys.json"

HYSPARK_B = preset_arguments("B", 5)
FORMS = {"sparse_encoder": "encoder", "hyspark": "masked_autoencoder", "hybird": "segmentation"}


@pytest.fixture(params=FORMS)
def release(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.Tensor]]:
    """A form of the release and a state dict of HySparK-B with made values."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(shape, generator=generator).to(getattr(torch, dtype))
        for name, shape, dtype in json.loads(KEY_LIST.read_text())[request.param]
    }
    return FORMS[request.param], state


def test_hyspark_b_goes_in_and_out(release) -> None:
    form, state = release
    assert reference_form(state) == form
    ours = from_reference(state)
    assert own_form(ours.state) == form
    back = to_reference(ours.state)
    assert {n: t.shape for n, t in back.state.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in state.items():
        assert name in ours.dropped or torch.equal(back.state[name], tensor), name


def test_hyspark_b_is_our_preset_b(release) -> None:
    form, state = release
    ours = from_reference(state).state
    if form == "segmentation":
        network = HySparKUNet(**HYSPARK_B, num_classes=14)
        # deep supervision is nnU-Net's, the release has the finest head only
        own_only = {f"decoder.seg_layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")}
    else:
        network = HySparKMaskedAutoencoder(**HYSPARK_B)
        own_only = set()
    expected = {n: p.shape for n, p in network.state_dict().items() if form != "encoder" or n.startswith("encoder.")}
    assert {n: t.shape for n, t in ours.items()} == {n: s for n, s in expected.items() if n not in own_only}


def test_nearly_half_of_the_release_is_unused(release) -> None:
    form, state = release
    dropped = from_reference(state).dropped
    parameters = {n: t.numel() for n, t in state.items() if "running" not in n and "batches" not in n}
    unused = sum(parameters.get(n, 0) for n in dropped if "pos_embed" not in n)
    share = unused / sum(parameters.values())
    assert share == pytest.approx({"masked_autoencoder": 0.46}.get(form, 0), abs=0.005)


def test_heads_of_deep_supervision_are_reported() -> None:
    arguments = HYSPARK_B | {"features_per_stage": (4, 4, 6, 6, 12), "n_blocks_per_stage": (1,) * 5, "vit_num_heads": 1}
    network = HySparKUNet(**arguments, num_classes=2)
    conversion = to_reference(network.state_dict())
    coarser = {f"decoder.seg_layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")}
    assert set(conversion.dropped) == coarser


def test_other_networks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="not a state dict of the HySparK release, because it has no stem.*conv.weight"
    ):
        from_reference({"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a state dict of a HySparK network"):
        to_reference({"conv.weight": torch.zeros(1)})


def test_unknown_names_are_refused() -> None:
    state = {"embeddings.stem.weight": torch.zeros(1), "embeddings.layer1.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 names are unknown in the HySparK release: embeddings.new"):
        from_reference(state | {"embeddings.new": torch.zeros(1)})
