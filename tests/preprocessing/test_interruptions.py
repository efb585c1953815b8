"""Real processes: killed at random moments, two parts at once, workers; the result is that of nnU-Net's command.

KILLS says how many kills; "make kills" does 20.
"""

import contextlib
import io
import multiprocessing
import os
import random
import re
import signal
import time

from hyspark_nnunet.preprocessing.records import RECORDS
from tests.nnunet_project import Project
from tests.preprocessing.conftest import DATA, NAME, files_of
from tests.preprocessing.test_preprocess import run

FORK = multiprocessing.get_context("fork")  # without the seconds in which a command imports nnU-Net


def quiet_run(project: Project, part: tuple[int, int]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = run(project, part=part)
    os._exit(status)


def start(project: Project, part: tuple[int, int] = (1, 1)) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=quiet_run, args=(project, part))
    process.start()
    return process


def test_kills(project: Project, by_nnunet: Project) -> None:
    folder, rng = project.preprocessed / NAME / DATA, random.Random(3)
    began = time.monotonic()
    process = start(project)
    process.join()
    duration = time.monotonic() - began
    expected = files_of(by_nnunet)
    assert process.exitcode == 0 and files_of(project) == expected
    half_written, kills = 0, int(os.environ.get("KILLS", "5"))
    for number in range(kills):
        # every kill meets another number of finished cases
        for file in list(folder.glob("ball*")) if number % 4 == 0 else []:
            file.unlink()
        process = start(project)
        time.sleep(rng.uniform(0, 0.4 * duration))
        if number % 2:
            deadline = time.monotonic() + duration
            while not any((folder / RECORDS / "writing").glob("*/*")) and time.monotonic() < deadline:
                time.sleep(0.0005)
        process.kill()
        process.join()
        half_written += any((folder / RECORDS / "writing").glob("*/*"))
        assert process.exitcode in (-signal.SIGKILL, 0)
        # whatever has its name now is complete
        for name, content in files_of(project).items():
            assert content == expected[name], name
    process = start(project)
    process.join()
    assert process.exitcode == 0 and files_of(project) == expected
    assert not any((folder / RECORDS / "writing").iterdir())
    print(f"\n{kills} kills, {half_written} of them with a case half written")
    assert half_written > 0


def test_parts_at_once_and_one_of_them_twice(project: Project, by_nnunet: Project) -> None:
    processes = [start(project, part) for part in ((1, 3), (2, 3), (3, 3), (2, 3))]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert files_of(project) == files_of(by_nnunet)


def test_the_command_with_workers(project: Project, by_nnunet: Project) -> None:
    printed = project.run("hyspark_nnunet", "preprocess", "-d", "21", "-np", "2", "--part", "1/1")
    assert re.search(r"14/14 cases, +[0-9.]+(case/s|s/case), 0.00 GB written, 0:00:00 left", printed)
    assert files_of(project) == files_of(by_nnunet)
    (project.raw / NAME / "imagesTr" / "ball_2_0000.nii.gz").write_bytes(b"no image")
    printed = project.run("hyspark_nnunet", "preprocess", "-d", NAME, "-np", "1", ok=False)
    assert "13 already done, 1 failed" in printed and "ball_2" in printed.splitlines()[-1]
