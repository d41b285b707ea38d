"""Memory of the machine and of the process: how much there is, and keeping what a step has freed for the next."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process (up to 1 GiB), for activations of like size come at every step.

    Without it glibc gives large blocks back to the system and gets them again page by page, which took 5 to 10 % of a
    step. For the rest of the process; nothing where the library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP, _KEPT)
        libc.mallopt(_TRIM, _KEPT)
    except (OSError, AttributeError):
        pass


def available_memory() -> int:
    """Bytes that could be taken now without pushing anything out, bounded by the control group of a container."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as stream:
        found.append(int(next(line for line in stream if line.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        bound = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(bound - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(found))
