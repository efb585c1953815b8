"""Build step in addition to pyproject.toml: the start-up file through which nnU-Net finds the trainers.

nnU-Net searches the folders of the environment variable ``nnUNet_extTrainer``. A ``.pth`` file in site-packages appends
the folder of ``nnunetv2_plugins`` to it whenever Python starts: in the commands of nnU-Net, in DDP workers, in spawned
processes. pip records the file as part of the distribution, so uninstalling removes it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH_NAME = "hyspark_nnunet.pth"
PLUGINS = "nnunetv2_plugins"
SHIM = "hyspark_trainers.py"

# Runs at every start of Python, so it imports only os and sys and never raises. The folder is searched in sys.path,
# because the local variable 'sitedir' of Python's site module is not a documented interface.
STARTUP_CODE = """\
try:
    import os, sys
    found = (os.path.abspath(os.path.join(entry, {plugins!r})) for entry in {entries})
    folder = next((path for path in found if os.path.isfile(os.path.join(path, {shim!r}))), None)
    value = os.environ.get('nnUNet_extTrainer', '')
    known = [os.path.normpath(path) for path in value.split(os.pathsep) if path]
    if folder and folder not in known:
        os.environ['nnUNet_extTrainer'] = value + os.pathsep + folder if known else folder
except Exception:
    pass
"""


def startup_line(entries: str) -> str:
    """The one line of the ``.pth`` file.

    Args:
        entries: Python expression for the folders to search for ``nnunetv2_plugins``.
    """
    code = STARTUP_CODE.format(plugins=PLUGINS, shim=SHIM, entries=entries)
    return f"import sys; exec({code!r}, {{}})\n"


class BuildWithStartupFile(build_py):
    """Adds the start-up file to the root of the wheel, which pip unpacks into site-packages."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            # an editable wheel uses the modules of this folder, and all other files as 'install' would install them
            repository = str(Path(__file__).resolve().parent)
            self._write(Path(self.get_finalized_command("install").install_lib), startup_line(repr([repository])))
        else:
            self._write(Path(self.build_lib), startup_line("sys.path"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, PTH_NAME))]

    def _write(self, folder: Path, line: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, PTH_NAME).write_text(line, encoding="utf-8")


setup(cmdclass={"build_py": BuildWithStartupFile})
