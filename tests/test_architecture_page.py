"""docs/architecture.md leads through files, names and shapes that are there."""

import ast
import re
from functools import cache
from pathlib import Path

import nnunetv2
import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
from hyspark_nnunet.architectures.presets import decoder_width
from hyspark_nnunet.masking import mask_grid, num_visible_units, sample_visible
from tests.small_networks import preset_arguments

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
# words in code type that are no names of this code
OTHERS = {"nnUNetv2_train", "nnUNet_extTrainer", "inspect", "convert", "hyspark_nnunet"}


def place(path: str) -> Path:
    """A path of the page on this machine."""
    if path.startswith("nnunetv2/"):
        return Path(nnunetv2.__file__).parent / path.removeprefix("nnunetv2/")
    return next((base / path for base in (ROOT / "hyspark_nnunet", ROOT) if (base / path).exists()), ROOT / path)


def paths_of(text: str) -> list[str]:
    return re.findall(r"`([\w/]+(?:\.py|/))`", text)


def names_of(text: str) -> list[str]:
    """Words in code type that could be names: identifiers, maybe of a method behind its class."""
    words = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", text)
    return [word for word in words if word not in OTHERS and not word.endswith(".py")]


@cache
def defined_in(file: Path) -> set[str]:
    """Functions, classes, and methods with and without their class."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_path_exists() -> None:
    paths = paths_of(TEXT)
    assert len(paths) > 40
    assert [path for path in paths if not place(path).exists()] == []


@pytest.mark.parametrize("title", SECTIONS)
def test_every_name_is_defined_in_a_file_that_its_section_names(title: str) -> None:
    section = SECTIONS[title]
    # the table of shapes names no files: what it names has been met before
    files = [place(path) for path in paths_of(section) or paths_of(TEXT) if path.endswith(".py")]
    defined = set().union(*(defined_in(file) for file in files))
    assert [name for name in names_of(section) if name not in defined] == []


def test_the_names_are_many() -> None:
    assert len(set(names_of(TEXT))) > 50


def test_the_shapes_are_those_of_a_forward_pass() -> None:
    rows = re.findall(r"^\| (.+?) \| `.+?` \| ([\dx ]+) \|$", SECTIONS["Shapes"], re.MULTILINE)
    n, patch = 4, (40, 56, 40)
    network = HySparKMaskedAutoencoder(**preset_arguments("S", n), decoder_width=decoder_width(n, "S", None))
    grid = mask_grid(patch, network.encoder.unit)
    image, visible = torch.zeros(2, 1, *patch), sample_visible(2, grid, 0.75)
    with torch.no_grad():
        features = network.encoder.features(image, visible)
        skips = network.densify(features[:0:-1])
        rebuilt = network.decoder(skips)
        layout = features[0].layout
        computed = {"batch": image, "mask": visible, "visible blocks": layout.enter(image)}
    computed |= {f"feature {index}": feature.field for index, feature in enumerate(features)}
    computed |= {f"skip of feature {n - 1 - index}": skip for index, skip in enumerate(skips)}
    computed["reconstruction"] = rebuilt
    assert dict(rows) == {what: " x ".join(map(str, tensor.shape)) for what, tensor in computed.items()}
    assert f"has {torch.tensor(grid).prod()} of them, and {num_visible_units(grid, 0.75)} of these stay" in TEXT
