"""The allocator of the C library: keep what a step has freed for the next step."""

import ctypes
import platform

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
