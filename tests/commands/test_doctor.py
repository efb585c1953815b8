"""The doctor finds what is wrong, says so, and says what to do."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.cli import main
from hyspark_nnunet.commands import doctor, installation_checks
from hyspark_nnunet.commands.doctor import examine
from hyspark_nnunet.commands.installation_checks import (
    FOLDERS,
    PLUGINS,
    Finding,
    check_folder,
    check_nnunet,
    check_pretraining,
    check_python,
    check_segmentation,
    check_torch,
    check_torchvision,
    check_trainers,
    check_variables,
)

ROOT = Path(__file__).resolve().parents[2]
NMS_ERROR = "operator torchvision::nms does not exist"


@pytest.fixture
def broken_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torchvision that fails the way one fails that was built for another torch; found before the real one."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise RuntimeError({NMS_ERROR!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return package


def test_a_sound_installation_passes_every_check(tmp_path: Path) -> None:
    environment = os.environ | {variable: str(tmp_path) for variable in FOLDERS} | {"nnUNet_extTrainer": str(PLUGINS)}
    command = [sys.executable, "-m", "hyspark_nnunet.cli", "doctor", "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == list(doctor.checks())
    assert {line.split()[0] for line in lines} <= {"ok", "note"}


def test_a_fault_fails_the_command_and_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["doctor", "--only", "nnUNet_raw", "python"]) == 1
    first, mend, last = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  nnUNet_raw: not set")
    assert mend.startswith("      fix: export nnUNet_raw=")
    assert last.startswith("ok    python: ")


def test_a_check_that_breaks_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.find_objects", None)  # importing it raises
    monkeypatch.setenv("nnUNet_extTrainer", str(PLUGINS))
    assert examine(only=["trainers", "python"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  trainers: ModuleNotFoundError: " in out and "ok    python: " in out


def test_an_unknown_check_is_refused_with_the_names_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--only", "torchvison"]) == 2
    message = capsys.readouterr().err
    assert "torchvison" in message and "torchvision" in message


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    finding = check_python()
    assert finding.status == "FAIL" and "3.9.18" in finding.message and finding.mend


@pytest.mark.parametrize("version", ["2.6.2", "2.7", "1.7.1", "3.0.0"])
def test_an_nnunet_of_another_time(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    finding = check_nnunet()
    assert finding.status == "FAIL" and version in finding.message
    assert finding.mend == 'pip install "nnunetv2>=2.8,<3"'
    assert ("nnUNet_extTrainer" in finding.message) == (version < "3")


@pytest.mark.parametrize("version", ["2.8", "2.8.0", "2.8.1", "2.10.3"])
def test_an_nnunet_that_will_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert check_nnunet() == Finding("nnunetv2", "ok", version)


def test_no_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    finding = check_nnunet()
    assert finding.status == "FAIL" and sys.prefix in finding.message and "pip install" in finding.mend


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    finding = check_torch()
    assert finding.status == "FAIL" and "torch" in finding.message and "pip install" in finding.mend


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    finding = check_torch()
    assert finding.status == "FAIL" and "2.4.1+cpu is too old" in finding.message and "torch>=2.5" in finding.mend


def test_a_torch_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    finding = check_torch()
    assert finding.status == "note" and torch.__version__ in finding.message and "-device cpu" in finding.message


def test_a_torchvision_of_another_torch(broken_torchvision: Path) -> None:
    finding = check_torchvision()
    assert finding.status == "FAIL"
    assert NMS_ERROR in finding.message and "built for another torch" in finding.message
    assert torch.__version__.split("+")[0] in finding.message
    assert "doctor --mend" in finding.mend and "pip install --no-deps" in finding.mend


def test_a_torchvision_that_fails_in_another_way(broken_torchvision: Path) -> None:
    (broken_torchvision / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    finding = check_torchvision()
    assert finding.status == "FAIL" and "libcudart.so.12" in finding.message
    assert "another torch" not in finding.message and "pip install --no-deps" in finding.mend


def test_a_broken_timm_is_not_blamed_on_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("__version__ = '0'\n")
    (tmp_path / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_torchvision()
    assert finding.status == "FAIL" and "timm does not import" in finding.message
    assert finding.mend == "pip install timm"


@pytest.mark.parametrize(
    ("torch_version", "cuda", "python", "requirement"),
    [
        ("2.13.0+cpu", None, (3, 11), "torchvision==0.16.2"),
        ("2.13.0+cpu", None, (3, 12), "torchvision==0.28.*"),  # there is no 0.16.2 for it
        ("2.13.0+cu130", "13.0", (3, 11), "torchvision==0.28.*"),
        ("2.1.2", "12.1", (3, 10), "torchvision==0.16.*"),
    ],
)
def test_the_torchvision_that_fits(
    torch_version: str, cuda: str | None, python: tuple[int, int], requirement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert installation_checks._torchvision_mend() == ["install", "--no-deps", "--force-reinstall", requirement]


def test_mending_runs_pip_and_checks_again(
    broken_torchvision: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip finds nothing: the mend fails, and says so
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["doctor", "--only", "torchvision", "--mend"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("fix   torchvision: pip install --no-deps") for line in lines)
    assert any(line.startswith("FAIL  torchvision: ") and "failed with exit status 1" in line for line in lines)
    assert lines[-1].startswith("      fix: install torchvision==0.")


def test_nothing_is_mended_unless_asked(broken_torchvision: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--only", "torchvision"]) == 1
    assert not [line for line in capfd.readouterr().out.splitlines() if line.startswith("fix")]


@pytest.mark.parametrize("variable", FOLDERS)
def test_folders(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    unset = check_folder(variable)
    assert unset.status == "FAIL" and unset.mend.startswith(f"export {variable}=")

    missing = tmp_path / "missing"
    monkeypatch.setenv(variable, str(missing))
    finding = check_folder(variable)
    assert finding.status == "FAIL" and str(missing) in finding.message and finding.mend == f'mkdir -p "{missing}"'

    missing.mkdir()
    assert check_folder(variable) == Finding(variable, "ok", str(missing))
    assert not list(missing.iterdir())  # trying to write leaves nothing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder that nobody can write to: /proc")
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", "/proc")
    finding = check_folder("nnUNet_results")
    assert finding.status == "FAIL" and "/proc cannot be written" in finding.message
    assert "export nnUNet_results=" in finding.mend


@pytest.mark.parametrize("value", [None, "/elsewhere"])
def test_trainers_that_nnunet_is_not_told_of(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    if value is not None:
        monkeypatch.setenv("nnUNet_extTrainer", value)
    finding = check_trainers()
    assert finding.status == "FAIL"
    assert f"nnUNet_extTrainer={value!r}" in finding.message and str(PLUGINS) in finding.message
    assert "install again" in finding.mend and "export nnUNet_extTrainer=" in finding.mend


def test_the_mend_for_trainers_keeps_a_users_own_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    export = check_trainers().mend.split("or: ")[1]
    for own, expected in (("", str(PLUGINS)), ("/one", f"/one{os.pathsep}{PLUGINS}")):
        shell = f'nnUNet_extTrainer={own}; {export}; printf %s "$nnUNet_extTrainer"'
        assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == expected


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HYSPARK_")] + ["nnUNet_n_proc_DA"]:
        monkeypatch.delenv(name, raising=False)
    assert check_variables() == Finding("variables", "ok", "no HYSPARK_ variable is set")
    monkeypatch.setenv("HYSPARK_NUM_EPOCHS", "50")
    assert check_variables() == Finding("variables", "ok", "HYSPARK_NUM_EPOCHS=50")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert check_variables().status == "note" and "planning fails with it" in check_variables().message
    monkeypatch.setenv("HYSPARK_FINETUNE_NUM_EPOCH", "3")
    finding = check_variables()
    assert finding.status == "FAIL" and "did you mean HYSPARK_FINETUNE_NUM_EPOCHS?" in finding.message
    monkeypatch.delenv("HYSPARK_FINETUNE_NUM_EPOCH")
    monkeypatch.setenv("HYSPARK_FINETUNE_INITIAL_LR", "-1")
    assert check_variables().status == "FAIL" and "initial_lr is -1.0" in check_variables().message


def test_trainers_of_the_same_names_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
    (tmp_path / "mine.py").write_text(code + "class HySparKFinetuneTrainer(nnUNetTrainer): ...\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(PLUGINS)]))
    finding = check_trainers()
    assert finding.status == "FAIL" and "HySparKFinetuneTrainer from another module, mine" in finding.message


@pytest.mark.parametrize("check", [check_pretraining, check_segmentation])
def test_networks_on_a_device_that_is_not_there(check: Callable[[str], Finding]) -> None:
    device = "cuda:99"
    finding = check(device)
    assert finding.status == "FAIL" and f"on {device}, " in finding.message and "--device cpu" in finding.mend


def test_gradients_that_are_not_finite() -> None:
    network = torch.nn.Linear(2, 2)

    def step() -> tuple[torch.nn.Module, torch.Tensor]:
        return network, network(torch.ones(1, 2)).sum() * float("nan")

    finding = installation_checks._gradients("tiny", "cpu", step)
    assert finding.status == "FAIL" and "2 parameters without a finite gradient: weight" in finding.message
