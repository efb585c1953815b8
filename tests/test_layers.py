"""No module of the package imports one above it: what serves commands stays out of what a training needs."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hyspark_nnunet"

# Bottom to top; parts of one layer do not import each other
LAYERS = (
    ("atomic_files", "cpu_allocator", "masking"),
    ("visualisation",),
    ("building_blocks",),
    ("architectures",),
    ("checkpoints", "recipe", "datasets"),
    ("loading", "training.loss", "training.runtime"),
    ("training.data", "training.memory"),
    ("training.probe",),
    ("training", "preprocessing"),
    ("planning",),
    ("commands",),
    ("cli", "demo", "train"),
)
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def part_of(module: str) -> str:
    """The part a module of the package belongs to: the longest name in LAYERS that it begins with."""
    words = module.split(".")[1:]
    names = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((name for name in names if name in LEVELS), "")


def module_of(file: Path) -> str:
    words = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(words).removesuffix(".__init__")


def imported_by(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            # the name may be a module itself: from hyspark_nnunet.commands import plan
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE.name)


def test_every_file_has_a_layer() -> None:
    modules = [module_of(file) for file in PACKAGE.rglob("*.py")]
    assert [module for module in modules if not part_of(module)] == [PACKAGE.name]
    # and no layer is left of a folder that was renamed
    assert set(LEVELS) == {part_of(module) for module in modules} - {""}


def test_no_folder_imports_one_above_or_beside_it() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        module = module_of(file)
        part = part_of(module)
        if not part:  # the package's top level offers functions of any layer
            continue
        for name in imported_by(file):
            imported = part_of(name)
            if imported in ("", part):
                continue
            if LEVELS[imported] >= LEVELS[part]:
                wrong.append(f"{module} imports {name}")
    assert wrong == []
