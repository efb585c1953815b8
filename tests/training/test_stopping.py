"""Signals, and the command that continues, without a training."""

import subprocess
import sys
import textwrap

import pytest

from hyspark_nnunet.training.runtime.signals import SAME_REQUEST_SECONDS, command_to_continue

PROGRAM = """
import os, signal, sys, time
from hyspark_nnunet.training.runtime import signals

signals.SAME_REQUEST_SECONDS = {same}
with signals.StopRequest() as stop:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR1)  # passed over
        os.kill(os.getpid(), signal.SIGTERM)  # ends it
        os._exit(3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    print("noted", stop.signal, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_second_signal_ends_at_once() -> None:
    ended = run(PROGRAM.format(same=-1))
    assert ended.returncode == -15 and "noted SIGUSR1" in ended.stdout and "still here" not in ended.stdout
    assert "child -15" in ended.stdout


def test_a_request_that_arrives_twice_is_one() -> None:
    """SLURM signals torchrun and its workers, and torchrun passes its own on."""
    ended = run(PROGRAM.format(same=SAME_REQUEST_SECONDS))
    assert ended.returncode == 0 and "still here" in ended.stdout
    assert ended.stdout.count("A second signal ends the process at once") == 1


def test_after_the_training_a_signal_leaves_the_validation() -> None:
    ended = run("""
        import os, signal
        from hyspark_nnunet.training.runtime.signals import leave_on_signal

        leave_on_signal("Repeat with --val")
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
    """)
    assert ended.returncode == 0 and "SIGTERM received. Repeat with --val" in ended.stdout
    assert "still here" not in ended.stdout


@pytest.mark.parametrize(
    ("argv", "torchrun", "command"),
    [
        (["/bin/nnUNetv2_train", "6", "2d", "0"], False, "nnUNetv2_train 6 2d 0 --c"),
        (
            ["/x/hyspark_nnunet/train.py", "6", "-pretrained_weights", "a b.pth", "-tr", "T", "--npz"],
            True,
            "torchrun (options as before) -m hyspark_nnunet.train 6 -tr T --npz --c",
        ),
        (["train.py", "--c", "6", "-pretrained_weights=w"], False, "python -m hyspark_nnunet.train 6 --c"),
    ],
)
def test_the_command_that_continues(argv: list[str], torchrun: bool, command: str) -> None:
    assert command_to_continue(argv, torchrun, {"PATH": "/bin"}) == command


def test_the_command_that_continues_has_the_recipe() -> None:
    """In another shell the recipe would be another."""
    environment = {"HYSPARK_SEED": "1", "HOME": "/", "HYSPARK_INPUT_CHANNEL_MAPPING": "T1=CT, T2=CT"}
    command = command_to_continue(["nnUNetv2_train", "6"], False, environment)
    assert command == "HYSPARK_INPUT_CHANNEL_MAPPING='T1=CT, T2=CT' HYSPARK_SEED=1 nnUNetv2_train 6 --c"
