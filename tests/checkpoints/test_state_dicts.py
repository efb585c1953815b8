"""Networks are found in files under any key and prefix."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.reference import to_reference
from hyspark_nnunet.checkpoints.state_dicts import find_state_dicts
from hyspark_nnunet.checkpoints.storage import read_weights
from tests.small_networks import small_arguments


def weights(value: float = 0.0) -> dict[str, Tensor]:
    """Some tensors of an encoder."""
    return {"encoder.stem.weight": torch.full((2,), value), "encoder.stages.0.blocks.0.conv.bias": torch.ones(3)}


KEYS = ["network_weights", "state_dict", "model", "module", "model_state_dict", "net", "weights", "params", "0"]
WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
PREFIXES = ["model", "net", "backbone", "pl_module", "online"]


@given(
    keys=st.lists(st.sampled_from(KEYS), max_size=3),
    prefix=st.lists(st.sampled_from(WRAPPERS + PREFIXES), max_size=3),
    middle=st.sampled_from(["", *WRAPPERS]),
    in_list=st.booleans(),
    beside=st.booleans(),
)
def test_under_any_key_and_prefix(keys: list[str], prefix: list[str], middle: str, in_list: bool, beside: bool) -> None:
    def renamed(name: str) -> str:
        first, *rest = name.split(".")
        return ".".join(filter(None, [*prefix, first, middle, *rest]))

    content: dict = {renamed(name): tensor for name, tensor in weights().items()}
    if prefix and beside:
        content["head.weight"] = torch.ones(1)
    for depth, key in enumerate(reversed(keys)):
        content = {"epoch": depth, key: [content] if in_list else content, "optimizer": {"state": {0: torch.ones(1)}}}
    (found,) = find_state_dicts(content)
    assert found.tensors.keys() - {"head.weight"} == weights().keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in weights().items())
    # the names of others are left aside with their prefix
    assert ("head.weight" in found.tensors) <= all(word in WRAPPERS for word in prefix)
    assert (found.rest.get("epoch") is not None) == bool(keys)


@pytest.mark.parametrize(
    ("content", "place", "others"),
    [
        ({"student": weights(1), "teacher": weights(2)}, "teacher", "student"),
        ({"model": weights(1), "model_ema": {"module": weights(2)}}, "model_ema.module", "model"),
        ({"state_dict": weights(1), "state_dict_ema": weights(2)}, "state_dict_ema", "state_dict"),
        (
            {"state_dict": {f"{who}.{n}": t for who, v in (("student", 1), ("ema", 2)) for n, t in weights(v).items()}},
            "state_dict.ema",
            "state_dict.student",
        ),
        (weights(2) | {f"queue.{name}": tensor for name, tensor in weights(1).items()}, "the top level", "queue"),
    ],
)
def test_of_two_networks_the_averaged_one(content: dict, place: str, others: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "two.pth")
    read = read_weights(tmp_path / "two.pth")
    assert read.state["encoder.stem.weight"].tolist() == [2, 2] and set(read.state) == set(weights())
    assert read.origin == f"unknown; weights of {place}, not of {others}"


def test_without_a_network_the_largest_group() -> None:
    content = {"stats": {"mean": torch.ones(1)}, "model": {"a.weight": torch.ones(1), "module.a.bias": torch.ones(1)}}
    (found,) = find_state_dicts(content)
    assert set(found.tensors) == {"a.weight", "a.bias"} and found.place == "model"
    assert find_state_dicts({"epoch": 1, "lists": [[1, 2], "text"]}) == []


def test_a_dictionary_that_contains_itself() -> None:
    content: dict = {"model": weights()}
    content["self"] = content
    assert find_state_dicts(content)[0].tensors.keys() == weights().keys()


def test_the_pretraining_files_of_the_release(tmp_path: Path) -> None:
    """As ``save_checkpoint_with_meta_info_and_opt_state`` of the release writes them, with the network's settings."""
    network = HySparKMaskedAutoencoder(**small_arguments(), decoder_width=12)
    optimizer = torch.optim.AdamW(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    module = to_reference(network.state_dict()).state | {"config": {"mask_ratio": 0.6, "sbn": True}}
    content = {
        "args": "{'ep': 1000}",
        "input_size": 96,
        "arch": "hyspark",
        "epoch": 3,
        "performance_desc": "0.4 0.5",
        "module": module,
        "optimizer": optimizer.state_dict(),
        "is_pretrain": True,
    }
    torch.save(content, tmp_path / "release.pth")
    read = read_weights(tmp_path / "release.pth")
    expected = network.state_dict()
    assert read.state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state.items())
    assert read.origin == "HySparK release, masked autoencoder" and read.rest["epoch"] == 3
