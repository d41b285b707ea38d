"""Rows that stay in their file, for what does not fit in memory: read in chunks, each by the task's own reader.

Of every row only its number, a hash of it, a hash of its input and its class are in memory (36 bytes). That is enough
to split the rows as they would be split in memory, and to tell whether the file has changed since; what is in them is
read again where it is wanted, from the first row to the last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit.data.faults import leave_out
from lorakit.data.memory import Memory
from lorakit.data.rows import Coded, Ints, Part, positions
from lorakit.data.tables import Table, opened, table_bytes
from lorakit.errors import DataError, NoRowsError
from lorakit.trunk.memory import available_memory

_TAKEN = 40  # bytes for each of a file: rows, and what tokenizers make of them all at once (18 to 50, short rows most)
_SHARE = 0.5  # of what is free, for the rows of one table
_SMALL = 0.25  # of that, for a part that is taken into memory as a whole
_ROWS, _BYTES = 4096, 4 << 20  # of a chunk, at the most
_LOOK = 16  # rows that tell how large rows are

P = TypeVar("P", bound=Part)


class Source(NamedTuple):
    """A table that can be gone through again and again, and what makes a Part of some rows of it."""

    name: str
    columns: list[str]
    rows: Callable[[], Table]
    read: Callable[[Memory], Part]

    def parts(self, lines: Ints | None = None) -> Iterator[Part]:
        """All rows in chunks, without those that have none to use; or those with these numbers, which rise."""
        table = self.rows() if lines is None else _only(self.rows(), lines)
        few = list(islice(table, _LOOK))
        size = _BYTES * len(few) // max(1, sum(len(repr(row)) for _, row in few))
        table = chain(few, table)
        bad: list[tuple[int, str]] = []  # of the chunks without any other
        n_parts = 0
        while chunk := list(islice(table, max(1, min(size, _ROWS)))):
            numbers, rows = zip(*chunk)
            try:
                part = self.read(Memory(rows, self.name, self.columns, numbers))
            except NoRowsError as error:
                bad += [(one.row, one.reason) for one in error.rows]
                continue
            n_parts += 1
            yield part
        if n_parts:
            leave_out(self.name, bad)


class Index(NamedTuple):
    """What is known of each row: its number in the file, hashes of it and of its input, the number of its class."""

    lines: Ints
    hashes: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    codes: NDArray[np.int32] | None
    names: tuple[str, ...]

    def take(self, places: Ints) -> "Index":
        """Of the rows at these places."""
        codes = None if self.codes is None else self.codes[places]
        return Index(self.lines[places], self.hashes[places], self.keys[places], codes, self.names)


class Streamed(Part):
    """Rows of `source` by their `index`; `core` tells what all are like.

    `row_bytes` is what a row would take in memory; of a part that would take a quarter of `most` bytes `cut` makes a
    Part in memory.
    """

    def __init__(self, source: Source, index: Index, core: Part, row_bytes: float, most: int) -> None:
        self.source, self._source, self._index, self._core = source.name, source, index, core
        self.row_bytes, self.most = row_bytes, most
        self.lines = positions(index.lines)

    def __repr__(self) -> str:
        return f"Streamed({len(self)} rows, like {self._core!r})"

    @property
    def core(self) -> Part:
        """A few rows, in memory."""
        return self._core

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the model is given of each row: all of it, in memory."""
        return tuple(text for part in self.chunks() for text in part.inputs)

    def chunks(self) -> Iterator[Part]:
        """All rows in their order, read again. DataError if they are not what they were."""
        begin = 0
        for part in self._source.parts(self._index.lines):
            known = self._index.take(np.arange(begin, begin + len(part)).clip(max=len(self) - 1))
            if not np.array_equal(part.lines, known.lines) or not np.array_equal(part.hashes(), known.hashes):
                break
            begin += len(part)
            yield part
        if begin < len(self):
            raise DataError(f"'{self.source}' was changed while it was read, at or after row {self.lines[begin]}")

    def take(self, indices: Sequence[int]) -> Any:
        """The rows at these positions, which rise; in memory where they are few."""
        return self.cut(indices)[0]

    def cut(self, *parts: Sequence[int]) -> list[Part]:
        """The rows at the positions of each part, which rise: all in one pass over the file."""
        wanted = [np.asarray(indices, dtype=np.int64) for indices in parts]
        if any((np.diff(places) <= 0).any() for places in wanted):
            raise ValueError("rows that stay in their file are taken in their order")
        small = [len(places) * self.row_bytes <= _SMALL * self.most for places in wanted]
        found: list[Part] = [self._core.take(()) for _ in wanted]
        pieces: list[list[Part]] = [[part] for part in found]
        begin = 0
        for chunk in self.chunks():
            end = begin + len(chunk)
            for k, places in enumerate(wanted):
                low, high = np.searchsorted(places, (begin, end))
                if low < high:
                    some = chunk.take(positions(places[low:high] - begin))
                    pieces[k] = [*pieces[k], some] if small[k] else [_telling(*pieces[k], some)]
            begin = end
        return [joined(own) if few else self._part(places, own[0]) for places, few, own in zip(wanted, small, pieces)]

    def _part(self, places: Ints, core: Part) -> "Streamed":
        return Streamed(self._source, self._index.take(places), core, self.row_bytes, self.most)

    def hashes(self) -> NDArray[np.uint8]:
        """A hash of all that is learned from each row."""
        return self._index.hashes

    def keys(self) -> NDArray[np.uint64]:
        """A hash of each input."""
        return self._index.keys

    def classes(self) -> Coded | None:
        """The class of each row."""
        return None if self._index.codes is None else Coded(self._index.names, self._index.codes)

    def about(self) -> str:
        """How many rows, and what a few of them are."""
        return f"{len(self):,} rows, which stay in their file; {len(self._core)} of them: {self._core.about()}"


def read_or_streamed(source: Any, read: Callable[[Any], Part], most: int | None) -> Part:
    """What `read` makes of a table, in memory where that takes less than `most` bytes (default: half of what is free).

    Else Streamed, where the table has its rows one by one and its Part can be told row by row.
    """
    n_bytes = table_bytes(source) if isinstance(source, str | Path) else 0
    room = int(_SHARE * available_memory()) if most is None else most
    if not n_bytes or _TAKEN * n_bytes <= room:
        return read(source)
    columns, rows = opened(source)
    whole = Source(str(source), columns, rows, read)
    known: dict[str, int] = {}
    found: list[Index] = []
    core: Part | None = None
    for part in whole.parts():
        if part.encoded() is None:
            return read(source)
        classes = part.classes()
        codes = None if classes is None else Coded.of(classes, known).codes
        lines = np.asarray(part.lines, dtype=np.int64)
        found.append(Index(lines, part.hashes(), part.keys(), codes, ()))
        core = _telling(*([] if core is None else [core]), part)
    if core is None:
        return read(source)
    lines, hashes, keys = (np.concatenate([part[k] for part in found]) for k in range(3))
    coded = [part.codes for part in found if part.codes is not None]
    index = Index(lines, hashes, keys, np.concatenate(coded) if coded else None, tuple(known))
    return Streamed(whole, index, core, _TAKEN * n_bytes / len(lines), room)


def joined(parts: Sequence[P]) -> P:
    """The rows of parts of one form, one after the other."""
    values = {
        field.name: tuple(chain.from_iterable(getattr(part, field.name) for part in parts))
        for field in fields(parts[-1])  # type: ignore[arg-type]
        if isinstance(getattr(parts[-1], field.name), tuple)
    }
    return replace(parts[-1], **values)  # type: ignore[type-var]


def _telling(*parts: P) -> P:
    """A few rows that tell what all of these are like."""
    few = [part.take(part.telling()) for part in parts]
    found = joined(few)
    return found.take(found.telling())


def _only(table: Table, lines: Ints) -> Table:
    """The rows with these numbers."""
    wanted = iter(positions(lines))
    number = next(wanted, None)
    for line, row in table:
        if line == number:
            yield line, row
            number = next(wanted, None)
            if number is None:
                return
