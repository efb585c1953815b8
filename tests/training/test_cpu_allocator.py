"""glibc keeps freed memory, unless the user has chosen otherwise."""

import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
PROGRAM = """
import resource, torch
from hyspark_nnunet.training.cpu_allocator import keep_freed_memory
kept = keep_freed_memory()
def touch():
    torch.ones(64 * 2**20)  # 256 MiB: far above every threshold of glibc
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=_environment() | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def _environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in ("GLIBC_TUNABLES",)}


@glibc
def test_freed_memory_is_used_again() -> None:
    kept, faults = page_faults()
    assert kept == "True"
    left, more = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert left == "False"
    assert faults < more / 2
