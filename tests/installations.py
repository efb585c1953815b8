"""Real installations in fresh venvs, for tests that must not see the packages of the running environment."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hyspark_nnunet", "nnunetv2_plugins")
# what a source distribution holds beside the packages
AROUND = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "Makefile",
    "mkdocs.yml",
    ".ci",
    ".github",
    "benchmarks",
    "docs",
    "tests",
)
VARIABLE = "nnUNet_extTrainer"

# By their metadata: importlib.util.find_spec("pip") makes setuptools refuse to be imported later in this process, and
# torch.compile imports it (setuptools' _distutils_hack takes the search for pip as the start of pip).
installed = {distribution.name for distribution in importlib.metadata.distributions()}
needs_build_tools = pytest.mark.skipif(
    not {"pip", "setuptools"} <= installed,
    reason="building the package needs setuptools and pip in the interpreter that runs the tests",
)


def run(*words: str | Path, **environment: str) -> str:
    """Output of a command, run outside the repository and without this process's variables for Python and nnU-Net."""
    clean = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "PYTHONPATH")}
    done = subprocess.run(
        [str(word) for word in words], env=clean | environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error processing line" not in done.stderr  # Python's message about a broken start-up file
    return done.stdout.strip()


class Installation:
    """A fresh venv, filled by the pip and the setuptools of the interpreter that runs the tests: without a network."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site_packages = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
        self.plugins = self.site_packages / "nnunetv2_plugins"
        (self.site_packages / "other.txt").touch()  # pip removes the folder when it becomes empty
        self.files_before = self.files()

    def show_dependencies(self) -> None:
        """Makes the packages of the running environment visible, except this package if it is installed editable there.

        Python searches a path that a ``.pth`` file names, but does not read the ``.pth`` files in it.
        """
        (self.site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def pip(self, *words: str | Path, **environment: str) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.python, *words, **environment)

    def python_runs(self, code: str, *words: str | Path, **environment: str) -> str:
        """Output of Python code."""
        return run(self.python, "-c", code, *words, **environment)

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.python.parents[1].rglob("*"))

    def folders(self, **environment: str) -> list[str]:
        """Folders that nnU-Net would search for trainers."""
        value = run(self.python, "-c", f"import os; print(os.environ.get({VARIABLE!r}, ''))", **environment)
        return value.split(os.pathsep) if value else []


def copy_sources(folder: Path) -> Path:
    """A copy of the packaged files, because building leaves files behind."""
    folder.mkdir()
    for name in (*PACKAGES, *AROUND):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source)
    (wheel,) = folder.glob("*.whl")
    return wheel
