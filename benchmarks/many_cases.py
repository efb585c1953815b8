"""How long prepare, check, pool and preprocess take for many cases, and how memory grows with their number.

Tiny files (16 x 16 x 12 voxels, int16), so that what is measured is the cost per case and not that of the voxels.

    python benchmarks/many_cases.py --cases 1000 10000
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

KINDS = ("raw", "preprocessed", "results")  # folders of nnU-Net
PARTS = 4


def write_scans(folder: Path, count: int) -> None:
    """Blocks of tissue in air with noise of their own; uncompressed size 6 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    body = np.full((12, 16, 16), -1000, dtype=np.int16)
    body[1:-1, 3:-3, 3:-3] = 40
    for i in range(count):
        image = sitk.GetImageFromArray(body + rng.integers(-20, 20, body.shape, dtype=np.int16))
        image.SetSpacing((2.0, 2.0, 2.5))
        sitk.WriteImage(image, str(folder / f"scan{i:05d}.nii.gz"), True)


def measured(words: tuple[str, ...], home: Path) -> tuple[float, float, float, float]:
    """What a command takes.

    Returns:
        seconds, seconds of CPU time over all processes, and the peak resident memory in MiB of the command's own
        process and of its largest worker.
    """
    # the command runs below a small process of its own, so that RUSAGE_CHILDREN tells its workers from it
    code = (
        "import resource, sys; from hyspark_nnunet.cli import main\n"
        "if __name__ == '__main__':\n"
        "    status = main(sys.argv[1:])\n"
        "    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    print('peaks', status, *peaks, sum(use.ru_utime + use.ru_stime for use in used))\n"
    )
    script = home / "run.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, **{f"nnUNet_{kind}": str(home / kind) for kind in KINDS}}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    last = done.stdout.splitlines()[-1].split() if done.stdout else []
    if done.returncode or last[:2] != ["peaks", "0"]:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return seconds, float(last[4]), int(last[2]) / 1024, int(last[3]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    machine = f"{platform.platform()}, {os.cpu_count()} CPUs"
    print(f"{machine}, Python {platform.python_version()}, -np {arguments.processes}")
    print("| cases | command | seconds | CPU seconds | peak memory of the command, MiB | of its largest worker, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    home = Path(tempfile.mkdtemp(prefix="many_cases_"))
    try:
        for count in arguments.cases:
            project = home / str(count)
            for kind in KINDS:
                (project / kind).mkdir(parents=True)
            write_scans(project / "scans", count)
            several = ("-np", str(arguments.processes))
            commands = {
                "prepare": ("dataset", "prepare", str(project / "scans"), "-d", "60", "-n", "Many", *several),
                "check": ("dataset", "check", "60", *several),
                "pool": ("dataset", "pool", "--from", "60", "-d", "70", "-n", "Pool", *several),
                "plan": ("plan", "-d", "60", "-preset", "S", "--fingerprint-cases", "100", "-npfp", several[1]),
            }
            for part in (f"{number}/{PARTS}" for number in range(1, PARTS + 1)):
                commands[f"preprocess, part {part}"] = (
                    *("preprocess", "-d", "60", "-p", "nnUNetHySparKSPlans", "--part", part),
                    *several,
                )
            for name, words in commands.items():
                seconds, used, own, worker = measured(words, project)
                print(f"| {count:,} | {name} | {seconds:.0f} | {used:.0f} | {own:.0f} | {worker:.0f} |", flush=True)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
