"""What a wheel and a source distribution hold, and whether they work: ``python -m tests.distributions dist``.

``make dist`` runs it. Each distribution is installed into a fresh environment that also sees the packages of the
running one, so that nothing is downloaded again.
"""

import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from hyspark_nnunet import __version__
from tests.installations import AROUND, PACKAGES, ROOT, Installation, run

STARTUP_FILE = "hyspark_nnunet.pth"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TRAINERS = ("HySparKPretrainTrainer", "HySparKFinetuneTrainer")
# where nnU-Net's own search finds a trainer
FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
found = recursive_find_trainer_class_by_name(sys.argv[1])
print(found.__name__, sys.modules[found.__module__].__file__)
"""
VERSION = "import hyspark_nnunet; print(hyspark_nnunet.__version__, hyspark_nnunet.__file__)"


def sources(names: tuple[str, ...]) -> set[str]:
    """The files of the repository below these names, as paths from its root; without compiled files."""
    found = {file for name in names for file in (ROOT / name, *(ROOT / name).rglob("*")) if file.is_file()}
    return {str(file.relative_to(ROOT)) for file in found if "__pycache__" not in file.parts}


def missing_in_wheel(wheel: Path) -> set[str]:
    """Files of the packages, and the start-up file, that a wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    licences = {name.rsplit("/", 1)[1] for name in held if ".dist-info/" in name}
    return ({*sources(PACKAGES), STARTUP_FILE} - held) | ({"LICENSE", "entry_points.txt"} - licences)


def surplus_in_wheel(wheel: Path) -> set[str]:
    """Files of a wheel outside this project's packages."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    return tops - {*PACKAGES, STARTUP_FILE, f"hyspark_nnunet-{__version__}.dist-info"}


def missing_in_sdist(sdist: Path) -> set[str]:
    """Files of the repository that a source distribution lacks."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    return sources((*PACKAGES, *AROUND)) - held


def try_out(distribution: Path, folder: Path) -> None:
    """Installs a distribution, then runs its command and nnU-Net's search for trainers.

    Raises:
        AssertionError: the version, a file, a trainer or ``doctor`` is wrong; says which.
    """
    made = Installation(folder / "venv")
    made.show_dependencies()
    # a source distribution is built by the setuptools of the running environment
    made.pip("install", "--no-deps", "--no-index", "--no-build-isolation", distribution)
    home = made.site_packages.resolve()
    version, module = made.python_runs(VERSION).split(" ", 1)
    assert version == __version__ and Path(module).resolve().is_relative_to(home), (version, module)
    assert (home / STARTUP_FILE).is_file(), f"{STARTUP_FILE} is not in {home}"
    for trainer in TRAINERS:
        name, module = made.python_runs(FIND, trainer).splitlines()[-1].split(" ", 1)
        assert name == trainer and Path(module).resolve().is_relative_to(home), (name, module)
    variables = {name: str(folder / name) for name in FOLDERS}
    for path in variables.values():
        Path(path).mkdir()
    doctor = run(made.python.with_name("hyspark_nnunet"), "doctor", "--device", "cpu", **variables)
    assert "ok    trainers: " in doctor and "FAIL" not in doctor, doctor
    print(f"{distribution.name}: {version}, found by nnU-Net, doctor passes\n{doctor}")


def main(folder: Path) -> None:
    """Checks the content of the wheel and the source distribution in a folder, and installs them."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    wrong = {
        "missing in the wheel": missing_in_wheel(wheel),
        "too much in the wheel": surplus_in_wheel(wheel),
        "missing in the source distribution": missing_in_sdist(sdist),
    }
    if any(wrong.values()):
        sys.exit("\n".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names))
    for distribution in (wheel, sdist):
        with tempfile.TemporaryDirectory() as fresh:
            try_out(distribution.resolve(), Path(fresh).resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
