"""Memory of the machine and of the process: how much is free, how much is taken, what is kept for the next pass.

On a GPU the numbers are those of torch's allocator there, which keeps freed memory by itself.
"""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from lorakit.device import CPU

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
_KEPT = 1 << 30
_KERNELS = "32"


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process (up to 1 GiB), for activations of like size come at every step.

    Without it glibc gives large blocks back to the system and gets them again page by page, which took 5 to 10 % of a
    step. For the rest of the process; nothing where the library is another. See `Bound`.
    """
    with suppress(OSError, AttributeError):
        libc = _glibc()
        libc.mallopt(_MMAP, _KEPT)
        libc.mallopt(_TRIM, _KEPT)


def keep_few_kernels() -> None:
    """Lets torch and oneDNN keep 32 of the kernels that oneDNN builds for every size it meets, not 1,024 each.

    They ask once, so nothing changes in a process that has used oneDNN before; nor where the user has set it.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS)


def give_back(device: torch.device = CPU) -> None:
    """Gives the system all whole pages that are free; nothing where the C library is not glibc."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):
        _glibc().malloc_trim(0)


class Bound:
    """Gives free memory back where the process has more than `most` bytes: holes that blocks of other sizes left.

    `room` is what it may have in any case beyond what it has afterwards: the next pass would take that again at once.
    """

    def __init__(self, most: int, room: int) -> None:
        self.most, self.room = most, room

    def keep(self) -> None:
        """To be called where most is free: between passes."""
        if resident() > self.most:
            give_back()
            self.most = max(self.most, resident() + self.room)


def _glibc() -> ctypes.CDLL:
    if platform.libc_ver()[0] != "glibc":
        raise OSError("another C library")
    return ctypes.CDLL(None)


def resident(device: torch.device = CPU) -> int:
    """Bytes that the process has in memory; where the system does not tell, the most it has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return peak_resident()


def forget_peak(device: torch.device = CPU) -> None:
    """Begins `peak_resident` anew, where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")


def peak_resident(device: torch.device = CPU) -> int:
    """The most bytes that the process has had in memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration, ValueError), open("/proc/self/status", encoding="ascii") as stream:
        return int(next(line for line in stream if line.startswith("VmHWM")).split()[1]) * 1024
    with suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if platform.system() == "Darwin" else most * 1024
    return 0


def available_memory(device: torch.device = CPU) -> int:
    """Bytes that could be taken now without pushing anything out, bounded by the control group of a container.

    This process' share of them, where torchrun has started several on this machine; no more than its own limit leaves
    (`ulimit -v`).
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        sharing = -(-int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // torch.cuda.device_count())
        return (torch.cuda.mem_get_info(device)[0] + held) // sharing
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as stream:
        found.append(int(next(line for line in stream if line.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        bound = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(bound - int((group / "memory.current").read_text(encoding="ascii")))
    share = min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(share, _left_by_limit()))


def _left_by_limit() -> int:
    """Bytes of addresses that the process may yet take."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", encoding="ascii") as stream:
                return limit - int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 1 << 62
