"""How long prepare, check and pool take for many cases, and how memory grows with their number.

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


def measured(words: tuple[str, ...], raw: Path) -> tuple[float, float, float, float]:
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
    script = raw.parent / "run.py"
    script.write_text(code, encoding="utf-8")
    others = {k: v for k, v in os.environ.items() if k not in ("nnUNet_preprocessed", "nnUNet_results")}
    environment = {**others, "nnUNet_raw": str(raw)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), "dataset", *words],
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
            raw = home / f"raw{count}"
            raw.mkdir()
            write_scans(home / f"scans{count}", count)
            several = ("-np", str(arguments.processes))
            for name, words in {
                "prepare": ("prepare", str(home / f"scans{count}"), "-d", "60", "-n", "Many", *several),
                "check": ("check", "60", *several),
                "pool": ("pool", "--from", "60", "-d", "70", "-n", "Pool", *several),
            }.items():
                seconds, used, own, worker = measured(words, raw)
                print(f"| {count:,} | {name} | {seconds:.0f} | {used:.0f} | {own:.0f} | {worker:.0f} |", flush=True)
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
