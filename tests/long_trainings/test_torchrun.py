"""torchrun's processes over gloo, on one machine and as two machines that meet on loopback: the real command."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyspark_nnunet.checkpoints.storage import read_checkpoint
from tests.long_trainings.conftest import SPARK, Commands, Run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# 20 steps
STEPS = {"HYSPARK_NUM_EPOCHS": "2", "HYSPARK_NUM_ITERATIONS_PER_EPOCH": "10"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(
    commands: Commands, results: Path, trainer: str, nodes: int, per_node: int, *more: str, **variables: str
) -> list[tuple[int, str]]:
    """Starts one agent per node; returns their return codes and what they printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HYSPARK_")}
    environment |= commands.environment(results, results / "record", **variables) | {"OMP_NUM_THREADS": "1"}
    results.mkdir(parents=True, exist_ok=True)
    options = ["--nproc_per_node", str(per_node), "--nnodes", str(nodes)]
    if nodes > 1:
        options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "test"]
    else:
        options += ["--master_port", str(free_port())]
    arguments = ["-m", "hyspark_nnunet.train", "6", "3d_fullres", "0", "-tr", trainer, "-device", "cpu", *more]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, *options, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(nodes)
    ]
    printed = [agent.communicate(timeout=1500)[0] for agent in agents]
    return [(agent.returncode, text) for agent, text in zip(agents, printed, strict=True)]


@pytest.mark.parametrize(
    ("trainer", "nodes", "per_node", "batch", "variables"),
    # batches that do not divide evenly
    [
        ("RecordingFinetuneTrainer", 1, 2, 3, {}),
        ("RecordingPretrainTrainer", 2, 2, 5, {}),
        ("RecordingSparKPretrainTrainer", 1, 2, 3, SPARK | {"HYSPARK_NUM_ITERATIONS_PER_EPOCH": "2"}),
    ],
    ids=["fine-tuning, 2 processes", "pre-training, 2 machines of 2 processes", "SparK, 2 processes"],
)
def test_processes_train_one_network(
    commands: Commands, tmp_path: Path, trainer: str, nodes: int, per_node: int, batch: int, variables: dict[str, str]
) -> None:
    variables = {"VALIDATE": "1", "HYSPARK_BATCH_SIZE": str(batch), **STEPS, **variables}
    ended = torchrun(commands, tmp_path, trainer, nodes, per_node, **variables)
    assert [code for code, _ in ended] == [0] * nodes, "\n".join(text[-5000:] for _, text in ended)
    ranks = range(nodes * per_node)
    runs = Run(tmp_path, tmp_path / "record", Path(), 0)
    # after all steps the parameters are equal to the bit
    parameters = [torch.load(f"{runs.record}.{rank}.pt") for rank in ranks]
    assert all(torch.equal(parameters[0], other) for other in parameters[1:])
    records = [runs.steps(rank) for rank in ranks]
    n_steps = 2 * int(variables["HYSPARK_NUM_ITERATIONS_PER_EPOCH"])
    assert all(len(record) == 1 + n_steps for record in records)
    # DDP's gradients are those of one process with the joint batch
    assert records[0][0]["gradients_differ_by"] < 1e-8
    # every rank draws crops of its own
    drawn = [[step["cases"] for step in record[1:]] for record in records]
    assert all(one != other for index, one in enumerate(drawn) for other in drawn[:index])
    assert sum(len(record[1]["cases"]) for record in records) == batch
    # rank 0 alone writes, and what it logs is the mean of all
    folder = runs.folder(trainer)
    assert len(list(folder.glob("training_log_*"))) >= 1
    logged = read_checkpoint(folder / "checkpoint_final.pth")["logging"]["train_losses"]
    per_epoch = [[s["loss"] for record in records for s in record[1:] if s["epoch"] == epoch] for epoch in range(2)]
    assert logged == pytest.approx([sum(losses) / len(losses) for losses in per_epoch])
    assert (folder / "validation" / "summary.json").is_file()


def test_a_signal_to_one_process_ends_all_and_the_training_continues(commands: Commands, tmp_path: Path) -> None:
    """Rank 1 alone gets the signal; torchrun sees processes that ended well."""
    trainer, one_epoch = "RecordingPretrainTrainer", {"HYSPARK_NUM_EPOCHS": "1"}
    incident = {"INCIDENT": "SIGUSR1@0.1", "INCIDENT_RANK": "1"}
    [(code, printed)] = torchrun(commands, tmp_path, trainer, 1, 2, **one_epoch, **incident)
    assert code == 0, printed[-5000:]
    said = r"To continue: HYSPARK_.* torchrun \(options as before\) -m hyspark_nnunet\.train 6 3d_fullres 0"
    assert re.search(said, printed)
    [(code, printed)] = torchrun(commands, tmp_path, trainer, 1, 2, "--c", **one_epoch)
    assert code == 0 and "Continuing after" in printed, printed[-5000:]
    runs = Run(tmp_path, tmp_path / "record", Path(), 0)
    steps = [[s["step"] for s in runs.steps(rank) if "loss" in s] for rank in (0, 1)]
    assert steps == [[1, 2, 3]] * 2
    final = read_checkpoint(runs.folder(trainer) / "checkpoint_final.pth")
    assert final["logging"]["train_losses"] == pytest.approx(
        [sum(s["loss"] for rank in (0, 1) for s in runs.steps(rank) if "loss" in s) / 6]
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-num_gpus", "2"], "torchrun's --nproc_per_node sets the number of processes"),
        (["-tr", "nnUNetTrainer"], "only HySparK's trainers support torchrun"),
        (["-device", "cuda"], "finds 0 GPUs"),
    ],
)
def test_what_the_launcher_refuses(more: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyspark_nnunet import train

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = ["60", "3d_fullres", "all", "-tr", "HySparKPretrainTrainer", "-device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match=message):
        train.main()


def test_a_process_leaves_without_the_interpreters_finalization() -> None:
    """It may abort in the finalization; what was printed and what is registered at exit is not lost."""
    program = """
import atexit, sys
from hyspark_nnunet.train import leave

class Finalized:
    def __del__(self):
        print("finalized", flush=True)

kept = Finalized()
atexit.register(print, "registered")
print("printed", end=" ")
if sys.argv[1] == "leave":
    leave()
"""
    printed = {}
    for way in ("leave", "end"):
        ended = subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, check=True)
        printed[way] = ended.stdout.split()
    assert printed == {"leave": ["printed", "registered"], "end": ["printed", "registered", "finalized"]}
