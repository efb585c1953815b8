"""Every block of docs/own_pipeline.md, run one after another, with a small checkpoint and small patches."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.checkpoints.storage import write_atomically
from hyspark_nnunet.cli import main
from tests.hub_server import served
from tests.small_networks import preset_arguments
from tests.test_loading import write_plan_network

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/own_pipeline.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [block for language, block in BLOCKS if language == "python"]
# patches and volumes of the page, and what stands for them here
PATCH = "(96, 96, 96)"
SMALLER = {PATCH: "(16, 16, 32)", "1, 110, 100, 120": "1, 20, 18, 40", "range(3)": "range(2)", '"B"': '"S"'}


def smaller(script: str, replaced: dict[str, str]) -> str:
    for text, instead in replaced.items():
        assert text in script, text
        script = script.replace(text, instead)
    return script


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables that the blocks leave; the hub serves what the page's command published."""
    folder = tmp_path_factory.mktemp("own_pipeline")
    torch.manual_seed(1)
    network = HySparKMaskedAutoencoder(**preset_arguments("S", 4), decoder_width=16)
    about = {"strides": [[1, 1, 1]] + [[2, 2, 2]] * 3, "channel_names": {"0": "CT"}}
    write_atomically({"network_weights": network.state_dict(), "hyspark": about}, folder / "checkpoint_final.pth")
    script = smaller("".join(PYTHON_BLOCKS), SMALLER)
    variables: dict[str, Any] = {"__name__": "own_pipeline"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        (command,) = (block for language, block in BLOCKS if language == "bash")
        program, *words = shlex.split(command)
        assert program == "hyspark_nnunet" and main(words) == 0
        shutil.copytree(words[-1], folder / "hub/ORG/NAME/main")
        with served(folder / "hub", folder / "cache", monkeypatch):
            exec(compile(script, "docs/own_pipeline.md", "exec"), variables)
    return {**variables, "source": network, "folder": folder}


def test_the_pages_losses_are_finite_and_the_prediction_has_the_volumes_size(run: dict[str, Any]) -> None:
    assert torch.isfinite(run["loss"]) and tuple(run["segmentation"].shape) == (1, 20, 18, 40)
    assert tuple(run["scores"].shape) == (2, 2)


def test_the_fine_tuning_takes_a_network_of_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_plan_network("SparK's pre-training", tmp_path / "checkpoint_final.pth")
    variables: dict[str, Any] = {"__name__": "own_pipeline"}
    exec(compile(smaller("".join(PYTHON_BLOCKS[:2]), {PATCH: SMALLER[PATCH]}), "page", "exec"), variables)
    assert torch.isfinite(variables["loss"]) and variables["step"] == 2
    trained = {id(weight) for group in variables["optimizer"].param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in variables["network"].parameters()}


def test_the_encoder_of_the_hub_is_that_of_the_checkpoint(run: dict[str, Any]) -> None:
    image = torch.randn(1, 1, 16, 16, 16)
    for feature, expected in zip(run["encoder"](image), run["source"].encoder(image), strict=True):
        assert torch.equal(feature, expected)


def test_the_exported_program_computes_the_same(run: dict[str, Any]) -> None:
    program = torch.export.load(run["folder"] / "network.pt2").module()
    image = torch.randn(3, 1, 16, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(image), run["network"](image))
    assert program(image).shape == (3, 3, 16, 16, 32)


def test_every_block_is_run() -> None:
    assert PAGE.count("```") == 2 * len(BLOCKS) and {language for language, _ in BLOCKS} == {"python", "bash"}
