"""Reading and writing checkpoint files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint, read_weights, write_atomically, write_safetensors


class RunsOnLoad:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_numbers_of_numpy_read_back_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_atomically(
        {"loss": [np.float64(0.5), np.float32(1.5)], "shape": np.array([1, 2]), "device": torch.device("cpu")}, path
    )
    assert read_checkpoint(path) == {"loss": [0.5, 1.5], "shape": [1, 2], "device": "cpu"}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_atomically({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        write_atomically({"epoch": lambda: 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*nowhere.pth: give the path"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"empty.pth is empty \(0 bytes\)"):
        read_checkpoint(tmp_path / "empty.pth")


@pytest.mark.parametrize(
    "content", [b"this is text, not a checkpoint", b"PK\x03\x04 half a zip file", b"\x80\x02}q\x00"]
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match="other.pth is (refused|not a readable checkpoint)"):
        read_checkpoint(tmp_path / "other.pth")


def test_truncated_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_atomically({"network_weights": {"w": torch.zeros(10000)}}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="checkpoint.pth is not a readable checkpoint"):
        read_checkpoint(path)


def test_a_file_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    torch.save({"network_weights": RunsOnLoad(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth is refused: .*only running its code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no network weights: .*found epoch"):
        read_weights(tmp_path / "other.pth")


def test_something_else_than_a_dictionary(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor, but a checkpoint is a dictionary"):
        read_weights(tmp_path / "tensor.pth")


@pytest.mark.parametrize("key", ["network_weights", "state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(tmp_path: Path, key: str | None, prefix: str) -> None:
    state = {f"{prefix}encoder.stem.weight": torch.ones(2)}
    torch.save(state if key is None else {key: state, "epoch": 1}, tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth")
    assert list(weights.state) == ["encoder.stem.weight"]
    assert torch.equal(weights.state["encoder.stem.weight"], torch.ones(2))


def test_wrappers_in_the_middle_of_names(tmp_path: Path) -> None:
    """A part of a network was compiled or wrapped on its own."""
    names = [
        "module.encoder._orig_mod.stem.weight",
        "encoder._fsdp_wrapped_module._checkpoint_wrapped_module.stem.bias",
    ]
    torch.save({"model": {"state_dict": {name: torch.ones(2) for name in names}}, "epoch": 1}, tmp_path / "weights.pth")
    assert list(read_weights(tmp_path / "weights.pth").state) == ["encoder.stem.weight", "encoder.stem.bias"]


class TestSafetensors:
    ABOUT = {"trainer_name": "Trainer", "recipe": {"num_epochs": 5}, "hyspark": {"preset": "S"}, "current_epoch": 7}

    def test_reads_back_bit_equal_with_what_is_said_of_it(self, tmp_path: Path) -> None:
        shared = torch.randn(4, 6)
        state = {"encoder.stem.weight": shared, "a": shared.t(), "b": shared.half(), "n": torch.tensor(3)}
        write_safetensors(state, {**self.ABOUT, "optimizer_state": {}}, tmp_path / "w.safetensors")
        weights = read_weights(tmp_path / "w.safetensors")
        assert set(weights.state) == set(state)
        assert all(torch.equal(weights.state[n], t) and weights.state[n].dtype == t.dtype for n, t in state.items())
        assert weights.description == {"preset": "S"} and weights.origin == "Trainer"
        assert weights.rest == self.ABOUT

    def test_is_known_by_its_content(self, tmp_path: Path) -> None:
        write_safetensors({"w": torch.ones(2)}, {}, tmp_path / "named_otherwise.pth")
        assert torch.equal(read_weights(tmp_path / "named_otherwise.pth").state["w"], torch.ones(2))

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        write_safetensors({"w": torch.ones(1000)}, {}, path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="w.safetensors is not a readable checkpoint"):
            read_weights(path)


class TestOtherDevices:
    """A machine without CUDA reads what one with CUDA wrote. The tensors themselves cannot be made here."""

    @pytest.mark.parametrize("zipped", [True, False])
    def test_storages_that_claim_cuda(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
        path = tmp_path / "cuda.pth"
        with monkeypatch.context() as patched:
            patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
            torch.save({"state_dict": {"w": torch.arange(3.0)}}, path, _use_new_zipfile_serialization=zipped)
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="CUDA"):  # so the file does claim it
                torch.load(path, weights_only=True)
        weights = read_weights(path).state["w"]
        assert weights.device.type == "cpu" and weights.tolist() == [0, 1, 2]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    def test_to_cuda_and_back(self, tmp_path: Path) -> None:
        write_atomically({"network_weights": {"w": torch.arange(3.0, device="cuda")}}, tmp_path / "cuda.pth")
        assert read_weights(tmp_path / "cuda.pth").state["w"].device.type == "cpu"
        there = read_checkpoint(tmp_path / "cuda.pth", "cuda")["network_weights"]["w"]
        assert there.device.type == "cuda" and there.tolist() == [0, 1, 2]
