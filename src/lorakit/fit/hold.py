"""One process at a time writes a run into its directory: a lock on the directory, which the system releases when that
process ends, however it ends. It leaves no file that matters. Where the system has no such lock there is none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PROCESS = "process"  # the number of the one that writes; a killed one leaves it behind


@contextmanager
def locked(place: Path) -> Iterator[bool]:
    """Within the block no other process can lock this directory. False if one has done so already."""
    handle, free = _lock(place, shared=False)
    try:
        if free:
            with suppress(OSError):
                (place / PROCESS).write_text(str(os.getpid()))
        yield free
    finally:
        if free:
            with suppress(OSError):
                (place / PROCESS).unlink()
        if handle is not None:
            os.close(handle)


def writer(place: Path) -> str:
    """Who writes into this directory now, in words; "" if nobody does, or it cannot be known."""
    try:
        number = (place / PROCESS).read_text()
    except OSError:
        return ""
    handle, free = _lock(place, shared=True)
    if handle is not None:
        os.close(handle)
    return "" if free else f"process {number}"


def _lock(place: Path, shared: bool) -> tuple[int | None, bool]:
    """What holds the lock while it is open, and whether there is nobody else who has it."""
    if fcntl is None:
        return None, True
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, False
    except OSError:  # a file system without locks
        pass
    return handle, True
