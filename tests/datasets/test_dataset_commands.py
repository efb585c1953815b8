"""The commands themselves: status, messages, interruption, and the way from scans to a pre-training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.datasets.scans import ct, write
from tests.nnunet_project import Project
from tests.test_real_scans import CT, HIPPOCAMPUS

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "hyspark_nnunet.cli", "dataset")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path / "project")
    project.make_folders()
    return project


def environment(project: Project) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **project.variables(), "PYTHONPATH": path}


def dataset(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *words]
    return subprocess.run(command, env=environment(project), capture_output=True, text=True, timeout=200, check=False)


def test_errors_are_a_line_and_status_one(project: Project, tmp_path: Path) -> None:
    for words, message in {
        ("prepare", str(tmp_path / "none"), "-d", "60", "-n", "A"): "error: no folder",
        ("pool", "--from", "60"): "error: give the pool a number and a name",
        ("check", "60"): "error: no dataset 60 in",
    }.items():
        done = dataset(project, *words)
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message), done.stderr
        assert "Traceback" not in done.stderr


def test_check_ends_with_one_where_a_case_is_bad(project: Project, tmp_path: Path) -> None:
    for i in range(3):
        write(ct(i % 2), tmp_path / f"scans/s{i}.nii.gz")
    made = dataset(project, "prepare", str(tmp_path / "scans"), "-d", "60", "-n", "Scans")
    assert made.returncode == 0, made.stderr
    assert "channel 0: CT, by the intensities of 3 scans" in made.stdout and "3/3" in made.stderr
    found = dataset(project, "check", "60", "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["bad"] == {"s2": ["duplicate: the same voxels as s0"]}
    assert dataset(project, "check", "Dataset060_Scans", "--exclude-bad").returncode == 0
    assert dataset(project, "check", str(project.raw / "Dataset060_Scans")).returncode == 0


@pytest.mark.parametrize("overwriting", [False, True])
def test_a_killed_run_leaves_no_half_dataset(project: Project, tmp_path: Path, overwriting: bool) -> None:
    for i in range(400):
        write(ct(i), tmp_path / f"scans/s{i}.nii.gz")
    words = ("prepare", str(tmp_path / "scans"), "-d", "60", "-n", "Scans", "--copy", "-np", "2")
    target = project.raw / "Dataset060_Scans"
    if overwriting:
        assert dataset(project, *words, "--include", "s1.nii.gz").returncode == 0
        before = {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        words += ("--overwrite",)
    running = subprocess.Popen(
        [*COMMAND, *words], env=environment(project), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        labels: list[Path] = []
        deadline = time.monotonic() + 60
        while len(labels) < 20 and time.monotonic() < deadline and running.poll() is None:
            labels = list(project.raw.glob(".Dataset060_Scans.building-*/labelsTr/*.nii.gz"))
            time.sleep(0.02)
        assert running.poll() is None and len(labels) >= 20, "the run was to be killed in the middle"
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        children = [int(pid) for pid in workers.read_text().split()] if workers.exists() else []
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not list(project.raw.glob("Dataset060_Scans/labelsTr/s399*"))
    if overwriting:
        assert {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    else:
        assert not target.exists() and not list(project.raw.glob("Dataset*"))
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline + 20:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()], "workers outlived the run"
    done = dataset(project, *words, "--include", "s11*.nii.gz")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in project.raw.iterdir()) == ["Dataset060_Scans"]


@pytest.mark.skipif(not CT.is_dir(), reason=f"the real CT scans are not at hand: {CT}")
def test_nnunet_preprocesses_real_ct_without_labels(project: Project) -> None:
    """The pre-training on such a dataset is in tests/test_real_scans.py."""
    made = dataset(project, "prepare", str(CT), "-d", "60", "-n", "Scans")
    assert made.returncode == 0, made.stderr
    assert dataset(project, "check", "60").returncode == 0
    words = ("-d", "60", "-c", "3d_fullres", "-np", "2", "-npfp", "2", "--verify_dataset_integrity")
    project.run("nnUNetv2_plan_and_preprocess", *words, nnUNet_n_proc_DA="1")
    preprocessed = project.preprocessed / "Dataset060_Scans/nnUNetPlans_3d_fullres"
    names = ["thorax_aorta", "thorax_pulmonary", "totalseg_example"]
    assert sorted(path.name.removesuffix(".pkl") for path in preprocessed.glob("*.pkl")) == names


@pytest.mark.skipif(not (CT.is_dir() and HIPPOCAMPUS.is_dir()), reason=f"the real scans are not at hand: {CT}")
def test_real_ct_and_mr_pool(project: Project) -> None:
    (project.raw / "Dataset006_Hippocampus").symlink_to(HIPPOCAMPUS)
    assert dataset(project, "prepare", str(CT), "-d", "60", "-n", "Scans").returncode == 0
    words = ("pool", "--from", "60", "6", "-d", "70", "-n", "Pool")
    refused = dataset(project, *words)
    assert refused.returncode == 1 and "Dataset060_Scans: CT; Dataset006_Hippocampus: MRI" in refused.stderr
    holdout = f"{HIPPOCAMPUS}/splits.json:validation"
    made = dataset(project, *words, "--channels-from", "6", "--holdout", holdout)
    assert made.returncode == 0, made.stderr
    assert "173 cases (3 of Dataset060_Scans, 170 of Dataset006_Hippocampus), channels MRI; 30 held out" in made.stdout
    assert dataset(project, "check", "70").returncode == 0
