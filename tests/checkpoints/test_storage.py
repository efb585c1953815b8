"""Reading and writing checkpoint files."""

import argparse
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from hyspark_nnunet.checkpoints.storage import (
    plain,
    read_checkpoint,
    read_weights,
    write_atomically,
    write_safetensors,
)


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
    "content",
    [b"not a checkpoint", b"this is text, not a checkpoint", b"PK\x03\x04 half a zip file", b"\x80\x02}q\x00"],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ValueError, match="other.pth is not a readable checkpoint") as raised:
        read_checkpoint(tmp_path / "other.pth")
    assert "weights_only" not in str(raised.value)  # torch advises to run the code in the file


def test_truncated_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_atomically({"network_weights": {"w": torch.zeros(10000)}}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="checkpoint.pth is not a readable checkpoint"):
        read_checkpoint(path)


def test_a_file_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    torch.save({"network_weights": RunsOnLoad(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth is refused: it holds posix.mkdir. .*save only the tensors"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    content = {"epoch": 3, **dict.fromkeys("abcdef", 1), "optimizer": {"state": {0: torch.ones(1)}}}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no network weights: .* the keys epoch, a, b, c, d, e, f, optimizer"):
        read_weights(tmp_path / "other.pth")


def test_something_else_than_a_dictionary(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor, but a checkpoint is a dictionary"):
        read_weights(tmp_path / "tensor.pth")


class TestPlainDataOfOthers:
    """nnU-Net logs numbers of NumPy; many scripts save their options and paths."""

    CONTENT = {
        "epoch": np.int64(3),
        "loss": [np.float64(0.5), np.float32(1.5)],
        "shape": np.arange(3),
        "args": argparse.Namespace(lr=0.1, out=Path("here")),
    }

    @pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
    def test_is_read(self, tmp_path: Path, module: bytes) -> None:
        path = tmp_path / "other.pth"
        # one stream of bytes, in which the name can be replaced by that of the other version of NumPy
        torch.save(self.CONTENT, path, _use_new_zipfile_serialization=False)
        written = re.sub(rb"numpy\._?core\.multiarray", module, path.read_bytes())
        path.write_bytes(written)
        read = read_checkpoint(path)
        assert module in written and plain(read["shape"]) == [0, 1, 2]
        assert (read["epoch"], read["loss"]) == (3, [0.5, 1.5])
        assert read["args"].lr == 0.1 and str(read["args"].out) == "here"

    @pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
    def test_paths_of_any_system(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "other.pth"
        torch.save({"out": Path("here")}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(re.sub(rb"(Posix|Windows)Path", kind.encode(), path.read_bytes()))
        assert plain(read_checkpoint(path)) == {"out": "here"}

    @pytest.mark.parametrize("content", [torch.nn.Linear(1, 1), {"state_dict": {}, "log": logging.getLogger("x")}])
    def test_objects_are_named(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "other.pth")
        name = "torch.nn.modules.linear.Linear" if isinstance(content, torch.nn.Module) else "logging.getLogger"
        with pytest.raises(ValueError, match=f"other.pth is refused: it holds {name}. .*save only the tensors"):
            read_weights(tmp_path / "other.pth")


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

    def test_metadata_of_other_programs(self, tmp_path: Path) -> None:
        """Text that is no JSON, values of other types, or no metadata at all: the weights are intact."""
        state, path = {"encoder.stem.weight": torch.ones(2)}, tmp_path / "w.safetensors"
        for metadata in (None, {"format": "pt"}, {"trainer_name": "Other", "recipe": "lr 0.1", "hyspark": "{"}):
            safetensors.torch.save_file(state, path, metadata=metadata)
            weights = read_weights(path)
            assert torch.equal(weights.state["encoder.stem.weight"], torch.ones(2)) and weights.description == {}
        assert weights.origin == "Other; the description of the network in its metadata is not readable"

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
    def test_from_cuda(self, tmp_path: Path) -> None:
        write_atomically({"network_weights": {"w": torch.arange(3.0, device="cuda")}}, tmp_path / "cuda.pth")
        assert read_weights(tmp_path / "cuda.pth").state["w"].device.type == "cpu"
