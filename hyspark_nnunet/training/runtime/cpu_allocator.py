"""Keeps the C library from giving large blocks back to the system after every operation.

By default glibc maps each large block anew and unmaps it when freed, so that every activation of every step is filled
with zeros by the system, page by page. On a CPU that can take as long as the convolutions (docs/performance.md).
"""

import ctypes
import os
import platform

# parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """From now on, freed memory stays with this process for the next allocation.

    A choice of the user's own (``MALLOC_...`` variables, ``GLIBC_TUNABLES``, a preloaded allocator) stays as it is.

    Returns:
        whether it was done: False where the C library is not glibc, or where the user has chosen.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
