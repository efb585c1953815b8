"""Installing makes nnU-Net find the trainers, and uninstalling leaves nothing: real installations in fresh venvs."""

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.distributions import missing_in_sdist, missing_in_wheel, surplus_in_wheel
from tests.installations import VARIABLE, Installation, build_wheel, copy_sources, needs_build_tools, run

KINDS = ("wheel", "sdist", "editable")
SHOW = f"import os; print(os.environ.get({VARIABLE!r}))"  # what nnU-Net would search
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

pytestmark = needs_build_tools


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("build") / "sources")


@pytest.fixture(scope="module")
def sdist(sources: Path) -> Path:
    """A source distribution."""
    hook = "import os, sys, setuptools.build_meta as b; os.chdir(sys.argv[1]); print(b.build_sdist(sys.argv[2]))"
    run(sys.executable, "-c", hook, sources, sources.parent)
    (archive,) = sources.parent.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheels(sources: Path, sdist: Path) -> dict[str, Path]:
    """A wheel from the sources, and one from the source distribution."""
    folder = sources.parent
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


def test_the_source_distribution_and_its_wheel_are_complete(sdist: Path, wheels: dict[str, Path]) -> None:
    assert missing_in_sdist(sdist) == set()
    assert missing_in_wheel(wheels["sdist"]) == surplus_in_wheel(wheels["sdist"]) == set()


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
