"""Real processes: killed at random moments, two parts at once, workers; the result is that of nnU-Net's command.

KILLS says how many kills; "make kills" does 20.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from hyspark_nnunet.preprocessing.records import RECORDS
from tests.forked_commands import Order, server
from tests.nnunet_project import Project
from tests.preprocessing.conftest import DATA, NAME, files_of

PREPROCESS = (str(Path(sys.executable).with_name("hyspark_nnunet")), "preprocess", "-d", "21", "-np", "1")


def start(project: Project) -> int:
    """Starts the command; returns the id of its process."""
    environment = os.environ | project.variables()
    return server().start(Order([*PREPROCESS], environment, str(project.root / "printed.txt")))


def test_kills(project: Project, by_nnunet: Project) -> None:
    folder, rng = project.preprocessed / NAME / DATA, random.Random(3)
    began = time.monotonic()
    start(project)
    status = server().wait()
    duration = time.monotonic() - began
    expected = files_of(by_nnunet)
    assert status == 0 and files_of(project) == expected
    half_written, kills = 0, int(os.environ.get("KILLS", "5"))
    for number in range(kills):
        # every other kill waits until a case is being written; the rest come at any time, with any number of cases done
        for file in list(folder.glob("ball*")) if number % 4 < 2 else []:
            file.unlink()
        process = start(project)
        if number % 2 == 0:
            deadline = time.monotonic() + 2 * duration
            while not any((folder / RECORDS / "writing").glob("*/*")) and time.monotonic() < deadline:
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, duration))
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(process, signal.SIGKILL)
        status = server().wait()
        half_written += any((folder / RECORDS / "writing").glob("*/*"))
        assert status in (-signal.SIGKILL, 0)
        # whatever has its name now is complete
        for name, content in files_of(project).items():
            assert content == expected[name], name
    start(project)
    assert server().wait() == 0 and files_of(project) == expected
    assert not any((folder / RECORDS / "writing").iterdir())
    print(f"\n{kills} kills, {half_written} of them with a case half written")
    assert half_written > 0


def test_parts_at_once_and_one_of_them_twice(project: Project, by_nnunet: Project) -> None:
    environment = os.environ | project.variables()
    processes = [
        subprocess.Popen([*PREPROCESS, "--part", part], env=environment, stdout=subprocess.DEVNULL)
        for part in ("1/2", "2/2", "2/2")
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert files_of(project) == files_of(by_nnunet)


def test_the_command_with_workers(project: Project, by_nnunet: Project) -> None:
    printed = project.run("hyspark_nnunet", "preprocess", "-d", "21", "-np", "2", "--part", "1/1")
    assert re.search(r"14/14 cases, +[0-9.]+(case/s|s/case), 0.00 GB written, 0:00:00 left", printed)
    assert files_of(project) == files_of(by_nnunet)
    (project.raw / NAME / "imagesTr" / "ball_2_0000.nii.gz").write_bytes(b"no image")
    printed = project.run("hyspark_nnunet", "preprocess", "-d", NAME, "-np", "1", ok=False)
    assert "13 already done, 1 failed" in printed and "ball_2" in printed.splitlines()[-1]
