"""Prevents the C library from returning large blocks to the system after every operation.

By default glibc maps each large block separately and unmaps it when it is freed. The system then fills every activation
of every step with zeros, page by page. On a CPU this can take as long as the convolutions, and in preprocessing longer
than the resampling (docs/performance.md).
"""

import ctypes
import os
import platform

# parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process for the next allocation.

    Settings of the user (``MALLOC_...`` variables, ``GLIBC_TUNABLES``, a preloaded allocator) are not changed.

    Returns:
        whether it was done: False if the C library is not glibc, or if the user has such settings.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Gives freed memory back to the system, so that other processes can use it. Nothing where glibc is not there."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
