"""What the README repeats from the code is current."""

import re
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.from_plans import PRESETS
from hyspark_nnunet.training.recipe import RECIPES, recipe_table_markdown

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", RECIPES)
def test_the_recipe_table_is_current(kind: str) -> None:
    found = re.search(rf"<!-- recipe: {kind} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found and found[1] == recipe_table_markdown(RECIPES[kind])


@pytest.mark.parametrize("name", PRESETS)
def test_the_sizes_of_the_presets_are_current(name: str) -> None:
    row = next(line for line in README.splitlines() if re.match(rf"\| {name}[ ,].* M \(", line))
    preset, sizes = PRESETS[name], []
    for n in (5, 4):
        arguments = {
            "input_channels": 1,
            "n_stages": n,
            "features_per_stage": preset.features_per_stage[:n],
            "conv_op": torch.nn.Conv3d,
            "kernel_sizes": ((3, 3, 3),) * n,
            "strides": ((1, 1, 1),) + ((2, 2, 2),) * (n - 1),
            "n_blocks_per_stage": (*preset.n_blocks_per_stage[: n - 1], 1),
            "expansion_per_stage": (*preset.expansion_per_stage[: n - 1], 2),
            "vit_n_blocks": preset.vit_n_blocks,
        }
        with torch.device("meta"):
            autoencoder = HySparKMaskedAutoencoder(**arguments, decoder_width=preset.finest_width * 2 ** (n - 1))
            unet = HySparKUNet(**arguments, num_classes=3)
        sizes.append([sum(p.numel() for p in m.parameters()) / 1e6 for m in (autoencoder.encoder, autoencoder, unet)])
    printed = [float(number) for number in re.findall(r"([\d.]+) M", row)]
    assert printed == [round(size, 1) for pair in zip(*sizes, strict=True) for size in pair]


def test_the_tests_that_the_table_of_features_names_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    table = (root / "docs/nnunet_features.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if re.match(r"\| .* \| (yes|fine-tuning: yes)", line)]
    named = {name for row in rows for name in re.findall(r"`((?:\w+/)?test_\w+(?:\.py)?)`", row)}
    written = "".join(file.read_text(encoding="utf-8") for file in root.glob("tests/**/test_*.py"))
    assert len(rows) > 10 and len(named) > 5
    for name in named:
        assert (root / "tests" / name).is_file() if name.endswith(".py") else f"def {name}(" in written, name


def test_the_files_it_links_to_are_there() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert linked
    assert [name for name in linked if not (Path(__file__).resolve().parents[1] / name).exists()] == []
