"""Installing makes nnU-Net find the trainers, and uninstalling leaves nothing: real installations in fresh venvs."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "hyspark_nnunet", "nnunetv2_plugins")
KINDS = ("wheel", "sdist", "editable")
VARIABLE = "nnUNet_extTrainer"
SHOW = f"import os; print(os.environ.get({VARIABLE!r}))"
SPAWNING = f"""
import multiprocessing, subprocess, sys

def show():
    import os
    print(os.environ.get({VARIABLE!r}), flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=show)
    process.start()
    process.join()
    subprocess.run([sys.executable, "-c", {SHOW!r}], check=True)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="building the package needs setuptools and pip in the interpreter that runs the tests",
)


def run(*words: str | Path, **environment: str) -> str:
    """Output of a command, run away from the repository and without what this process inherited."""
    clean = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "PYTHONPATH")}
    done = subprocess.run(
        [str(word) for word in words], env=clean | environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error processing line" not in done.stderr  # what Python says of a broken start-up line
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

    def pip(self, *words: str | Path, **environment: str) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.python, *words, **environment)

    def files(self) -> list[str]:
        return sorted(str(path) for path in self.python.parents[1].rglob("*"))

    def folders(self, **environment: str) -> list[str]:
        """What nnU-Net would search."""
        value = run(self.python, "-c", SHOW, **environment)
        return [] if value == "None" else value.split(os.pathsep)


def copy_sources(folder: Path) -> Path:
    """A copy of what is packaged: building leaves files behind."""
    folder.mkdir()
    for name in SOURCES:
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


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel from the sources, and one from the source distribution."""
    folder = tmp_path_factory.mktemp("build")
    sources = copy_sources(folder / "sources")
    hook = "import os, sys, setuptools.build_meta as b; os.chdir(sys.argv[1]); print(b.build_sdist(sys.argv[2]))"
    run(sys.executable, "-c", hook, sources, folder)
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": build_wheel(sources, folder / "wheel"), "sdist": build_wheel(sdist, folder / "from_sdist")}


def install_editable(made: Installation, folder: Path) -> None:
    """``pip install --editable``; the fresh venv is shown the setuptools of this one, and nothing else of it."""
    sources = copy_sources(folder / "sources")
    (folder / "backend").mkdir()
    installed = importlib.metadata.distribution("setuptools")
    site_packages = Path(str(installed.locate_file("")))
    for name in ("setuptools", "_distutils_hack", f"setuptools-{installed.version}.dist-info"):
        (folder / "backend" / name).symlink_to(site_packages / name)
    options = ("--no-deps", "--no-index", "--no-build-isolation")
    made.pip("install", *options, "--editable", sources, PYTHONPATH=str(folder / "backend"))
    made.plugins = sources / "nnunetv2_plugins"


def install(kind: str, wheels: dict[str, Path], folder: Path) -> Installation:
    made = Installation(folder / "venv")
    if kind == "editable":
        install_editable(made, folder)
    else:
        made.pip("install", "--no-deps", "--no-index", wheels[kind])
    return made


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """An installation to look at."""
    return install(request.param, wheels, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=KINDS)
def expendable(request: pytest.FixtureRequest, wheels: dict[str, Path], tmp_path: Path) -> Installation:
    """An installation to break."""
    return install(request.param, wheels, tmp_path)


def test_installing_names_the_folder_of_the_trainers(made: Installation) -> None:
    assert made.folders() == [str(made.plugins)]
    # nnU-Net imports every module it finds there
    assert {path.name for path in made.plugins.glob("*.py")} == {"__init__.py", "hyspark_trainers.py"}


def test_a_users_own_folders_stay_and_stay_first(made: Installation) -> None:
    assert made.folders(nnUNet_extTrainer="/one") == ["/one", str(made.plugins)]
    assert made.folders(nnUNet_extTrainer=f"/one{os.pathsep}/two") == ["/one", "/two", str(made.plugins)]


@pytest.mark.parametrize("own", ["{plugins}", "{plugins}/", "/one{separator}{plugins}", "{plugins}{separator}/one"])
def test_a_folder_that_is_named_already_is_not_added(made: Installation, own: str) -> None:
    own = own.format(plugins=made.plugins, separator=os.pathsep)
    assert made.folders(nnUNet_extTrainer=own) == own.split(os.pathsep)


def test_child_processes_inherit_it_once(made: Installation, tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    once = os.pathsep.join(["/one", str(made.plugins)])
    assert run(made.python, tmp_path / "spawning.py", nnUNet_extTrainer="/one").splitlines() == [once, once]


def test_starting_python_imports_none_of_the_package(made: Installation) -> None:
    loaded = run(made.python, "-c", "import sys; print(*sys.modules)").split()
    assert not [name for name in loaded if name.split(".")[0] in ("hyspark_nnunet", "nnunetv2_plugins", "torch")]


def test_python_starts_in_silence_when_the_folder_is_gone(expendable: Installation) -> None:
    shutil.rmtree(expendable.plugins)
    assert expendable.folders() == []


def test_uninstalling_leaves_nothing(expendable: Installation) -> None:
    assert expendable.files() != expendable.files_before
    expendable.pip("uninstall", "--yes", "hyspark_nnunet")
    assert expendable.files() == expendable.files_before
    assert expendable.folders() == []
