"""What README and docs repeat from the code is current."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.architectures import HySparKMaskedAutoencoder, HySparKUNet
from hyspark_nnunet.architectures.presets import PRESETS, decoder_width
from hyspark_nnunet.recipe.recipe import RECIPES, recipe_table_markdown
from tests.small_networks import preset_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPE_PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
MESSAGES = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
OWN_MESSAGES, FOREIGN_MESSAGES = MESSAGES.split("## Of nnU-Net and torch")


@pytest.mark.parametrize("kind", RECIPES)
def test_the_recipe_table_is_current(kind: str) -> None:
    found = re.search(rf"<!-- recipe: {kind} -->\n(.*?)<!-- end -->", RECIPE_PAGE, re.DOTALL)
    assert found and found[1] == recipe_table_markdown(RECIPES[kind])


@pytest.mark.parametrize("name", PRESETS)
def test_the_sizes_of_the_presets_are_current(name: str) -> None:
    row = next(line for line in RECIPE_PAGE.splitlines() if re.match(rf"\| {name}[ ,].* M \(", line))
    sizes = []
    for n in (5, 4):
        arguments = preset_arguments(name, n)
        with torch.device("meta"):
            autoencoder = HySparKMaskedAutoencoder(**arguments, decoder_width=decoder_width(n, name, None))
            unet = HySparKUNet(**arguments, num_classes=3)
        sizes.append([sum(p.numel() for p in m.parameters()) / 1e6 for m in (autoencoder.encoder, autoencoder, unet)])
    printed = [float(number) for number in re.findall(r"([\d.]+) M", row)]
    assert printed == [round(size, 1) for pair in zip(*sizes, strict=True) for size in pair]


def test_the_tests_that_the_table_of_features_names_are_there() -> None:
    table = (ROOT / "docs/nnunet_features.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if re.match(r"\| .* \| (yes|fine-tuning: yes)", line)]
    named = {name for row in rows for name in re.findall(r"`((?:\w+/)?test_\w+(?:\.py)?)`", row)}
    written = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/test_*.py"))
    assert len(rows) > 10 and len(named) > 5
    for name in named:
        assert (ROOT / "tests" / name).is_file() if name.endswith(".py") else f"def {name}(" in written, name


def test_the_files_the_readme_links_to_are_there() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert linked
    assert [name for name in linked if not (ROOT / name).exists()] == []


def message_templates() -> list[str]:
    """Every text of the package but its docstrings, "..." where a value is put in."""

    def template(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "..."
        parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        return "".join(template(part) if is_text(part) else "..." for part in parts)

    def is_text(node: ast.AST) -> bool:
        joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        return isinstance(node, ast.Constant | ast.JoinedStr) or joined

    files = (ROOT / "hyspark_nnunet").rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [template(node) for node in nodes if is_text(node) and node not in docstrings]


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    templates = message_templates()
    quoted = re.findall(r"^\| `([^`]+)` \|", OWN_MESSAGES, re.MULTILINE)
    rows = [line for line in OWN_MESSAGES.splitlines() if line.startswith("| `")]
    assert len(quoted) == len(rows) > 30
    assert [message for message in quoted if not any(message in text for text in templates)] == []


def test_the_messages_of_others_are_in_their_code() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", FOREIGN_MESSAGES, re.MULTILINE)
    assert len(rows) == sum(line.startswith("| `") for line in FOREIGN_MESSAGES.splitlines()) > 2
    for message, module in rows:
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None, module
        assert message in Path(found.origin).read_text(encoding="utf-8"), (message, module)


def test_the_drawing_of_the_method_is_current() -> None:
    found = importlib.util.spec_from_file_location("draw_method", ROOT / "docs/images/draw_method.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert (ROOT / "docs/images/method.svg").read_text(encoding="utf-8") == module.draw()
