"""A folder for what can be made again, kept between runs: compiled functions, tokenised data."""

import os
import tempfile
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


def keep_below(folder: Path, most: int) -> None:
    """Removes the files of a folder that were not used for longest, until it has at most so many bytes."""
    with suppress(OSError):
        files = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda pair: pair[0].st_mtime)
        n_bytes = sum(state.st_size for state, _ in files)
        for state, file in files:
            if n_bytes <= most:
                return
            file.unlink(missing_ok=True)
            n_bytes -= state.st_size
