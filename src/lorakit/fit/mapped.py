"""Tokens in files that are mapped into memory, of rows that stay in their file (data/streamed.py): made chunk by chunk.

A folder of the cache for each content, with a file for each tensor; it is whole or absent. A lock beside it says that
somebody makes it or uses it: others wait for the one, and nobody removes it meanwhile.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from weakref import finalize

import torch
from torch import Tensor

from lorakit.cache import cache_folder, keep_below
from lorakit.data.batches import Tokens
from lorakit.data.faults import made
from lorakit.data.ragged import Ragged
from lorakit.data.streamed import Streamed
from lorakit.errors import DataError, FitError, LorakitError
from lorakit.files import read_json, write_json
from lorakit.tasks.task import Task

FOLDER = "streams"
_MOST = 4 << 30  # bytes of those that nobody uses
_ABOUT = "about.json"
_TRIES, _PAUSE_S = 100, 0.05
_MORE = 1.05  # than the first chunk lets expect


def mapped(task: Task, rows: Streamed, tokenizer: Any, key: str | None, *, truncate: bool) -> Tokens:
    """The examples of these rows, as `task.examples` makes them. `key` tells the same content the next time.

    FitError if the disk has no room for them, before or while they are written; nothing is left of them then.
    """
    few = task.examples(rows.core, tokenizer, truncate=truncate)
    if not isinstance(few, Tokens):
        raise DataError(
            f"'{rows.source}': {len(rows):,} rows would take about {rows.row_bytes * len(rows) / 2**20:,.0f} MiB of "
            f"memory, where {rows.most / 2**20:,.0f} MiB may be taken, and task '{task.name}' cannot leave them in "
            "their file; give it fewer rows, or load them with a larger most_in_memory"
        )
    place = cache_folder() / FOLDER
    place.mkdir(exist_ok=True)
    for _ in range(_TRIES if key else 0):
        lock = _Lock(place / f".{key}.lock")
        lock.shared()  # waits for who makes it
        found = _read(place / str(key), few, lock)
        if found is None and lock.alone():
            try:
                _make(task, rows, tokenizer, truncate, place / str(key))
            except BaseException:  # whoever keeps it keeps this frame
                lock.close()
                raise
            lock.shared()
            found = _read(place / str(key), few, lock)
        if found is not None:
            return found
        lock.close()
        time.sleep(_PAUSE_S)
    own = uuid.uuid4().hex
    lock = _Lock(place / f".{own}.lock")
    lock.shared()
    _make(task, rows, tokenizer, truncate, place / own)
    found = _read(place / own, few, lock)
    assert found is not None
    return found


class _Lock:
    """A file that processes lock, as long as this object lives; where the system has no such locks, nothing."""

    def __init__(self, file: Path) -> None:
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        self.close = finalize(self, os.close, self._handle)  # unlocks it

    def shared(self) -> None:
        """Uses what it stands for, beside others."""
        with suppress(ImportError):
            import fcntl

            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Has it for itself; False, and unlocked, if others have it."""
        try:
            import fcntl

            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return True
        except OSError:
            return False
        return True


def _unused(entry: Path) -> bool:
    if not entry.is_dir():
        return False
    lock = _Lock(entry.parent / f".{entry.name.strip('.').removesuffix('.part')}.lock")
    try:
        return lock.alone()
    finally:
        lock.close()


def _bytes(numbers: Tensor) -> bytes:
    return numbers.numpy().tobytes()


class _Rows:
    """Rows of numbers on their way into two files: values, and where each row begins."""

    def __init__(self, values: BinaryIO, starts: BinaryIO) -> None:
        self._values, self._starts = values, starts
        self.n_rows = self.n_values = 0
        self.kind = torch.int32
        self._starts.write(bytes(8))

    def add(self, rows: Ragged) -> None:
        """More of them."""
        if len(rows.values):
            if self.n_values and rows.values.dtype != self.kind:
                raise LorakitError("the task makes whole numbers of some rows, and others of the rest")
            self.kind = rows.values.dtype
        self._values.write(_bytes(rows.values))
        self._starts.write(_bytes(rows.starts[1:] + self.n_values))
        self.n_rows, self.n_values = self.n_rows + len(rows), self.n_values + len(rows.values)

    @property
    def n_bytes(self) -> int:
        """Of both files."""
        return 4 * self.n_values + 8 * (self.n_rows + 1)


def _make(task: Task, rows: Streamed, tokenizer: Any, truncate: bool, folder: Path) -> None:
    """Writes the folder: under another name, which then changes."""
    keep_below(folder.parent, _MOST, _unused)
    with _whole(folder, rows) as work, ExitStack() as opened:

        def file(name: str) -> BinaryIO:
            return opened.enter_context((work / f"{name}.bin").open("wb"))

        lines, found, done = file("lines"), dict[str, _Rows](), 0
        for part, tokens in made(rows.chunks(), lambda part: (part, task.examples(part, tokenizer, truncate=truncate))):
            assert isinstance(tokens, Tokens)
            lines.write(_bytes(torch.tensor(tokens.lines, dtype=torch.int64)))
            for name, own in tokens.parts.items():
                if name not in found:
                    found[name] = _Rows(file(name), file(f"{name}_starts"))
                found[name].add(own)
            if not done:
                each = sum(field.n_bytes for field in found.values()) / len(part) + 8
                _refuse_full(rows, int(_MORE * each * len(rows)), folder.parent)
            done += len(part)
        opened.close()
        kinds = {name: [str(own.kind).removeprefix("torch."), own.n_values, own.n_rows] for name, own in found.items()}
        write_json(work / _ABOUT, kinds)


@contextmanager
def _whole(folder: Path, rows: Streamed) -> Iterator[Path]:
    work = folder.parent / f".{folder.name}.part"
    try:
        for old in (work, folder):  # of a process that was killed; damaged
            shutil.rmtree(old, ignore_errors=True)
        work.mkdir()
        yield work
        work.rename(folder)
    except OSError as error:
        raise FitError(_told(rows, folder.parent, f"cannot be written: {error.strerror or error}")) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_full(rows: Streamed, needed: int, place: Path) -> None:
    if needed > shutil.disk_usage(place).free:
        keep_below(place, 0, _unused)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise FitError(_told(rows, place, f"need {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free"))


def _told(rows: Streamed, place: Path, what: str) -> str:
    return (
        f"the tokens of {len(rows):,} rows of '{rows.source}' go into '{place}', where they {what}; free some space, "
        "or let XDG_CACHE_HOME name a folder on a larger disk"
    )


def _read(folder: Path, like: Tokens, lock: _Lock) -> Tokens | None:
    """The tokens in this folder, of the form of a few; None if it is not there or damaged."""
    try:
        kinds = read_json(folder / _ABOUT)
        parts = {
            name: Ragged(
                _tensor(folder / f"{name}.bin", getattr(torch, kind), n_values),
                _tensor(folder / f"{name}_starts.bin", torch.int64, n_rows + 1),
            )
            for name, (kind, n_values, n_rows) in kinds.items()
        }
        lines = _tensor(folder / "lines.bin", torch.int64, len(parts["ids"]) // like.each)
        os.utime(folder)
    except (LorakitError, OSError, KeyError, ValueError):
        return None
    found = type(like).of(parts, memoryview(lines.numpy()), like.pad, like.each)  # type: ignore[arg-type]
    found.held = lock
    return found


def _tensor(file: Path, kind: torch.dtype, n: int) -> Tensor:
    """A file as a tensor `(n,)`, of which what is read is in memory as long as there is room."""
    if file.stat().st_size != n * kind.itemsize:
        raise ValueError(f"'{file}' is cut short")
    if not n:
        return torch.empty(0, dtype=kind)
    return torch.from_file(str(file), shared=True, size=n, dtype=kind)  # a private map must fit in memory
