"""A folder for what can be made again, kept between runs: compiled functions, tokenised data."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """A folder that nobody but this user can write to, for some of what is in it runs as code.

    `$XDG_CACHE_HOME/lorakit` or `~/.cache/lorakit`; a temporary one where that cannot be had.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "lorakit"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        mine = not hasattr(os, "getuid") or (state.st_uid == os.getuid() and not state.st_mode & 0o022)
        if mine and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lorakit-"))


def keep_below(folder: Path, most: int, unused: Callable[[Path], bool] = Path.exists) -> None:
    """Removes the files and folders in a folder that are `unused` and were not used for longest, until these have at
    most so many bytes."""
    with suppress(OSError):
        entries = [entry for entry in folder.iterdir() if unused(entry)]
        sizes = {entry: sum(file.stat().st_size for file in (entry, *entry.glob("**/*"))) for entry in entries}
        n_bytes = sum(sizes.values())
        for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
            if n_bytes <= most:
                return
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
            n_bytes -= sizes[entry]
