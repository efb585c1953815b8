"""Checks of an installation, a function each.

A check returns a ``Finding`` with the fault, its value and how to fix it.
"""

import contextlib
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

OLDEST_PYTHON = (3, 10)
OLDEST_NNUNET = (2, 8)
OLDEST_TORCH = (2, 5)
TRAINERS = ("HySparKPretrainTrainer", "HySparKFinetuneTrainer", "SparKPretrainTrainer", "SparKFinetuneTrainer")
FOLDERS = {
    "nnUNet_raw": "raw datasets",
    "nnUNet_preprocessed": "preprocessed datasets; use a fast disk",
    "nnUNet_results": "trained networks",
}
PLUGINS = Path(__file__).resolve().parents[2] / "nnunetv2_plugins"
# the last torchvision that imports without its compiled operators; timm and nnU-Net use none of them
TORCHVISION_WITHOUT_OPERATORS = "torchvision==0.16.2"
TOO_NEW_FOR_IT = (3, 12)  # Python: it was released for 3.8 to 3.11
IMPORT_LIMIT = 300  # seconds; a cold file system may take a minute
MEND_OPTION = "--mend"


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Args:
        name: of the check.
        status: "ok", "FAIL", or "note" for something that works but is unusual.
        message: result, with its value.
        mend: how to fix it.
    """

    name: str
    status: str
    message: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.status:4}  {self.name}: {self.message}"
        return line + (f"\n      fix: {self.mend}" if self.mend else "")


def check_python() -> Finding:
    """Is this Python new enough?"""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", "FAIL", f"{found} is older than 3.10", "create the environment with a newer Python")
    return Finding("python", "ok", f"{found}, {sys.executable}")


def check_nnunet() -> Finding:
    """Does this nnU-Net know ``nnUNet_extTrainer``?"""
    mend = 'pip install "nnunetv2>=2.8,<3"'
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return Finding("nnunetv2", "FAIL", f"not installed in {sys.prefix}", mend)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_NNUNET:
        reason = "before 2.8, nnU-Net has no nnUNet_extTrainer and finds only its own trainers"
        return Finding("nnunetv2", "FAIL", f"{version} is too old: {reason}", mend)
    if numbers >= (3,):
        return Finding("nnunetv2", "FAIL", f"{version} is newer than the versions that the trainers support", mend)
    return Finding("nnunetv2", "ok", version)


def check_torch() -> Finding:
    """Which torch, and can it use a GPU?"""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
        return Finding("torch", "FAIL", error_text(error), "pip install --force-reinstall torch")

    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        reason = "SparK's networks need hooks that torch has since 2.5"
        return Finding("torch", "FAIL", f"{torch.__version__} is too old: {reason}", 'pip install "torch>=2.5"')
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name()}")
    if torch.backends.mps.is_available():
        return Finding("torch", "ok", f"{torch.__version__}, Apple GPU (mps)")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
    message = f"{torch.__version__}, {built}, finds no GPU: nnU-Net's commands need -device cpu, and training is slow"
    return Finding("torch", "note", message)


def check_torchvision() -> Finding:
    """Do torchvision and timm import? In a separate process, because a failed import stays half done."""
    command = [sys.executable, "-c", "import torchvision, timm; print(torchvision.__version__, timm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Finding("torchvision", "FAIL", f"importing torchvision and timm took more than {IMPORT_LIMIT} s")
    if done.returncode == 0:
        message = "{}, with timm {}".format(*done.stdout.split()[-2:])
        if "Failed to load image" in done.stderr:
            message += (
                "; the warning 'Failed to load image Python extension' is harmless, because nnU-Net does not use it"
            )
        return Finding("torchvision", "ok", message)
    error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if "No module named 'timm'" in error:
        return Finding("torchvision", "FAIL", f"timm does not import: {error}", "pip install timm")
    if "torchvision" not in done.stderr:
        return Finding("torchvision", "FAIL", f"torchvision and timm do not import: {error}")
    message = (
        f"{_version('torchvision')} does not import ({error}), so timm and nnU-Net's trainers do not import either"
    )
    if "torchvision::nms does not exist" in error:
        message += f": it was built for another torch than {_version('torch')}"
    mend = f"hyspark_nnunet doctor {MEND_OPTION}, which runs: pip {' '.join(_torchvision_mend())}"
    return Finding("torchvision", "FAIL", message, mend)


def mend_torchvision() -> Finding:
    """Installs a torchvision that matches torch, leaves torch as it is, and checks again."""
    words = _torchvision_mend()
    print(f"fix   torchvision: pip {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], stdin=subprocess.DEVNULL)
    by_hand = f"install {_matching_torchvision()} from the index of torch {_version('torch')} (pip's --index-url)"
    if done.returncode:
        message = f"'{sys.executable} -m pip {' '.join(words)}' failed with exit status {done.returncode}, see above"
        return Finding("torchvision", "FAIL", message, by_hand)
    finding = check_torchvision()
    return finding if finding.status == "ok" else replace(finding, mend=by_hand)


def _torchvision_mend() -> list[str]:
    """Arguments of ``pip`` that install a torchvision for this torch."""
    import torch

    # for a torch of the CPU only, the matching torchvision of the default index would again be built for CUDA
    fits = bool(torch.version.cuda) or sys.version_info >= TOO_NEW_FOR_IT
    requirement = _matching_torchvision() if fits else TORCHVISION_WITHOUT_OPERATORS
    return ["install", "--no-deps", "--force-reinstall", requirement]


def _matching_torchvision() -> str:
    """The torchvision of the same release: torch 2.x and torchvision 0.(x + 15)."""
    import torch

    major, minor = (int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    return f"torchvision==0.{minor + 15}.*" if major == 2 else "torchvision"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def check_folder(variable: str) -> Finding:
    """Is one of nnU-Net's folders set, existing and writable?"""
    value = os.environ.get(variable)
    if not value:
        mend = f"export {variable}=/a/folder/{variable}   # {FOLDERS[variable]}"
        return Finding(variable, "FAIL", "not set: nnU-Net cannot find its data", mend)
    if not os.path.isdir(value):
        return Finding(variable, "FAIL", f"{value} is not a folder", f'mkdir -p "{value}"')
    try:
        with tempfile.TemporaryFile(dir=value):
            pass
    except OSError as error:
        mend = f'chmod u+w "{value}"   # or: export {variable}=/a/folder/of/yours'
        return Finding(variable, "FAIL", f"{value} cannot be written ({error.strerror})", mend)
    return Finding(variable, "ok", value)


def check_variables() -> Finding:
    """Does every HYSPARK_ variable have the name of a recipe field and an allowed value?"""
    from hyspark_nnunet.recipe.fields import PREFIX
    from hyspark_nnunet.recipe.recipe import PretrainRecipe
    from hyspark_nnunet.recipe.sources import resolve_recipe

    try:
        resolve_recipe(PretrainRecipe, None)  # checks the variables of both trainers
    except ValueError as error:
        return Finding("variables", "FAIL", str(error), "correct or unset it")
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        message = "nnUNet_n_proc_DA=0 is only for training: nnU-Net's planning fails with it"
        return Finding("variables", "note", message, "unset nnUNet_n_proc_DA   # to plan")
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)]
    return Finding("variables", "ok", " ".join(found) or f"no {PREFIX} variable is set")


def check_trainers() -> Finding:
    """Does nnU-Net find the trainers, and not others with the same names?"""
    value = os.environ.get("nnUNet_extTrainer")
    if str(PLUGINS) not in [os.path.realpath(path) for path in (value or "").split(os.pathsep) if path]:
        joined = f"${{nnUNet_extTrainer:+$nnUNet_extTrainer{os.pathsep}}}{PLUGINS}"
        mend = (
            "install again, which adds a start-up file that sets it (in the folder of the code: pip install --no-deps "
            f'--force-reinstall .), or: export nnUNet_extTrainer="{joined}"'
        )
        return Finding("trainers", "FAIL", f"nnUNet_extTrainer={value!r} does not name {PLUGINS}", mend)
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

        modules = {name: recursive_find_trainer_class_by_name(name).__module__ for name in TRAINERS}
    for name, module in modules.items():
        if not module.startswith("hyspark_nnunet."):
            message = f"nnU-Net takes {name} from another module, {module}; nnUNet_extTrainer={value!r}"
            return Finding("trainers", "FAIL", message, "rename that class or remove its folder from the variable")
    return Finding("trainers", "ok", f"nnU-Net finds {', '.join(TRAINERS)}")


def _tiny_network_arguments() -> dict[str, Any]:
    """Arguments of a network of three stages, which takes a second on a CPU."""
    import torch

    return {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": (8, 16, 32),
        "conv_op": torch.nn.Conv3d,
        "kernel_sizes": ((3, 3, 3),) * 3,
        "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        "n_blocks_per_stage": (1, 1, 1),
        "expansion_per_stage": (2, 4, 2),
        "vit_n_blocks": 1,
    }


def check_pretraining(device: str) -> Finding:
    """Does a forward and backward pass of the masked autoencoder work?"""
    import torch

    from hyspark_nnunet.architectures import HySparKMaskedAutoencoder
    from hyspark_nnunet.masking import sample_visible
    from hyspark_nnunet.training.loss import reconstruction_loss

    def step() -> Any:
        network = HySparKMaskedAutoencoder(**_tiny_network_arguments()).to(device)
        image = torch.randn(2, 1, 16, 16, 16, device=device)
        visible = sample_visible(2, (4, 4, 4), 0.75, device=device)
        return network, reconstruction_loss(network(image, visible), image, visible)

    return _gradients("pretraining", device, step)


def check_segmentation(device: str) -> Finding:
    """Does a forward and backward pass of the segmentation network work?"""
    import torch

    from hyspark_nnunet.architectures import HySparKUNet

    def step() -> Any:
        network = HySparKUNet(**_tiny_network_arguments(), num_classes=2, deep_supervision=True).to(device)
        image = torch.randn(2, 1, 16, 16, 16, device=device)
        return network, sum(logits.square().mean() for logits in network(image))

    return _gradients("segmentation", device, step)


def _gradients(name: str, device: str, step: Callable[[], Any]) -> Finding:
    """Does every parameter get a finite gradient? ``step`` returns a network and its loss."""
    start = time.perf_counter()
    try:
        network, loss = step()
        loss.backward()
        bad = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    except Exception as error:
        mend = "" if device == "cpu" else "hyspark_nnunet doctor --device cpu   # shows whether the device is the cause"
        return Finding(name, "FAIL", f"on {device}, {error_text(error)}", mend)
    if bad:
        return Finding(name, "FAIL", f"on {device}, {len(bad)} parameters without a finite gradient: {bad[0]}, ...")
    seconds = time.perf_counter() - start
    return Finding(name, "ok", f"{type(network).__name__}, forward and backward on {device}, {seconds:.1f} s")


def error_text(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
