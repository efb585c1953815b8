"""glibc keeps freed memory, unless the user has chosen otherwise."""

import os
import platform
import resource
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
CHOICES = ("GLIBC_TUNABLES", "LD_PRELOAD")
PROGRAM = """
import resource, torch
from hyspark_nnunet.cpu_allocator import keep_freed_memory
kept = keep_freed_memory()
def touch():
    torch.ones(16 * 2**20)  # 64 MiB: above what glibc takes from its heap by default
for _ in range(24):  # aligned blocks find each other's places after some rounds
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
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
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in CHOICES}


@glibc
def test_freed_memory_is_used_again() -> None:
    kept, faults = page_faults()
    assert kept == "True"
    left, more = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert left == "False"
    assert more > 1000 and faults < more / 10


RELEASING = """
import torch
from hyspark_nnunet.cpu_allocator import keep_freed_memory, release_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
keep_freed_memory()
torch.ones(64 * 2**20)
kept = resident()
release_freed_memory()
print(kept - resident())
"""


@glibc
def test_kept_memory_is_released() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RELEASING], env=_environment(), capture_output=True, text=True, check=True
    )
    pages = 256 * 2**20 / resource.getpagesize()
    assert int(done.stdout) > 0.9 * pages
