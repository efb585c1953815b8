"""Checkpoints on the Hugging Face hub, from a server on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hyspark_nnunet.checkpoints.hub import Address, local_file, parse_address
from hyspark_nnunet.checkpoints.storage import read_weights, write_atomically, write_safetensors
from tests.hub_server import GATED, Hub, served


def write_repository(folder: Path, *names: str, value: float = 1.0) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("a model\n")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        state = {"encoder.stem.weight": torch.full((2,), value)}
        if name.endswith(".safetensors"):
            write_safetensors(state, {"trainer_name": "Trainer"}, folder / name)
        else:
            write_atomically({"network_weights": state}, folder / name)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repositories = tmp_path / "repositories"
    write_repository(repositories / "team/model/main", "model.safetensors")
    write_repository(repositories / "team/model/v2", "model.safetensors", value=2.0)
    write_repository(repositories / "team/several/main", "a.pth", "folder/b.safetensors")
    write_repository(repositories / "team/none/main")
    with served(repositories, tmp_path / "cache", monkeypatch) as hub:
        yield hub


def value_of(address: str) -> float:
    return float(read_weights(address).state["encoder.stem.weight"][0])


def test_the_only_checkpoint_is_found_and_downloaded_once(hub: Hub) -> None:
    for _ in range(2):
        assert value_of("hf://team/model") == 1.0
    assert hub.downloads == ["team/model/model.safetensors@main"]


def test_a_file_and_a_revision(hub: Hub) -> None:
    assert value_of("hf://team/model@v2") == value_of("hf://team/model/model.safetensors@v2") == 2.0
    assert value_of("hf://team/several/folder/b.safetensors") == 1.0
    assert hub.downloads == ["team/model/model.safetensors@v2", "team/several/folder/b.safetensors@main"]


def test_without_a_connection_the_cache_is_taken(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value_of("hf://team/model") == 1.0 and value_of("hf://team/model@v2") == 2.0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.warns(UserWarning, match="cannot be reached: of hf://team/model, the files in the cache are used"):
        assert value_of("hf://team/model") == 1.0
    assert value_of("hf://team/model/model.safetensors@v2") == 2.0
    for address in ("hf://team/several/a.pth", "hf://team/model@v3", "hf://team/none"):
        with pytest.raises(ConnectionError, match=rf"{address} is not in the cache .*cache, and {hub.url} cannot be"):
            local_file(address)


def test_a_server_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"cannot be reached \(.*\). Check the connection.*hf download team/model"
    ):
        local_file("hf://team/model")


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("hf://team/nothing", FileNotFoundError, "has no repository team/nothing, or it is private: .*hf auth login"),
        ("hf://team/nothing/a.pth", FileNotFoundError, "has no repository team/nothing"),
        (f"hf://{GATED}", PermissionError, "gated is gated: ask for access at http.*/team/gated, then log in"),
        (f"hf://{GATED}/a.pth", PermissionError, "gated/a.pth is gated: ask for access"),
        ("hf://team/model@v9", FileNotFoundError, "team/model has no revision v9"),
        ("hf://team/model/other.pth", FileNotFoundError, "has no file other.pth; its checkpoints are: model.safetens"),
        ("hf://team/none", FileNotFoundError, "hf://team/none holds no checkpoint .*; it has README.md"),
        (
            "hf://team/several",
            ValueError,
            "holds 2 checkpoints: name one of them: hf://team/several/a.pth, hf://team/several/folder/b.safetensors",
        ),
        ("hf://team", ValueError, "is not an address on the Hugging Face hub: write hf://ORG/NAME"),
        ("hf://team/model@", ValueError, "is not an address on the Hugging Face hub: write hf://ORG/NAME"),
        ("hf://te--am/mo del", ValueError, "is not an address on the Hugging Face hub: "),
    ],
)
def test_what_cannot_be_had(address: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        local_file(address)


def test_paths_are_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path / "a.pth", "folder/a.pth"):
        assert local_file(path) == Path(path)


def test_addresses_read_back() -> None:
    for text in ("hf://a/b", "hf://a/b/c/d.pth", "hf://a/b@refs/pr/1", "hf://a/b/c.pth@v1"):
        assert str(parse_address(text)) == text
    assert parse_address("hf://a/b/c/d.pth@v1") == Address("a/b", "c/d.pth", "v1")
