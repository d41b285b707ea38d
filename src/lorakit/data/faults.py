"""Rows that cannot be used: refused by file, row and reason; or left out, as many as `skip_bad` allows, and counted.

A reader goes on without bad rows (`leave_out`). What needs a whole table, or all parts of a data set, says which of its
rows are bad (`refuse`), and is done again without them (`usable`). All of it within one `skipping` has one bound.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, Self, TypeVar

from lorakit.errors import BadRowsError, DataError, UsageError, listed

_MEND = "mend or remove these rows"
_SHOWN = 5


class BadRow(str):
    """A row of a table and why it cannot be used; as text all of it."""

    source: str
    row: int
    reason: str

    def __new__(cls, source: object, row: int, reason: str) -> Self:
        self = super().__new__(cls, f"'{source}' row {row}: {reason}")
        self.source, self.row, self.reason = str(source), row, reason
        return self

    def __getnewargs__(self) -> tuple[str, int, str]:  # type: ignore[override]
        return self.source, self.row, self.reason


class Skipping:
    """At most `most` rows are left out; `bad` are those that were."""

    def __init__(self, most: int, before: Iterable[BadRow] = ()) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise UsageError(f"skip_bad is {most!r}; it must be a whole number of rows, 0 or more")
        self.most = most
        self._found = {(one.source, one.row): one for one in before}

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """Every row once, with the first reason."""
        return tuple(self._found.values())

    def leave_out(self, bad: Iterable[BadRow], message: str) -> None:
        """Counts these rows. DataError, with this message and the numbers, if they are too many."""
        new = {(one.source, one.row): one for one in reversed(list(bad))}
        n_new, n_all = len(new), len({**new, **self._found})
        if n_all > self.most and n_all > len(self._found):
            way = f"leave {'it' if n_new == 1 else f'these {n_new} rows'} out with --skip-bad {n_all}"
            before = f", {len(self._found)} were left out before" if self._found else ""
            raise DataError(f"{message}; or {way}{f' ({self.most} are too few{before})' if self.most else ''}")
        self._found |= {key: one for key, one in reversed(new.items()) if key not in self._found}


_active: ContextVar[Skipping | None] = ContextVar("skipping", default=None)


@contextmanager
def skipping(most: int, before: Iterable[BadRow] = ()) -> Iterator[Skipping]:
    """Within the block at most `most` bad rows are left out, with those of `before`; within another such block, as that
    one says."""
    outer, own = _active.get(), Skipping(most, before)
    token = _active.set(outer or own)
    try:
        yield outer or own
    finally:
        _active.reset(token)


def tolerant() -> bool:
    """Whether a row may be left out here."""
    now = _active.get()
    return now is not None and now.most > 0


def leave_out(source: object, faults: Sequence[tuple[int, str]], way: str = _MEND, left: int = 1) -> None:
    """Counts the rows that a reader leaves out: row numbers and reasons. DataError if there may not be so many, or if
    no row is `left`."""
    if not faults:
        return
    lines = listed((f"row {row}: {reason}" for row, reason in faults), _SHOWN)
    message = f"'{source}': {lines}; {way}"
    now = _active.get()
    if now is None:
        raise DataError(message)
    if not left:
        raise DataError(f"{message}; no other row is there")
    now.leave_out((BadRow(source, row, reason) for row, reason in faults), message)


def refuse(bad: Sequence[BadRow], message: str = "") -> None:
    """BadRowsError for these rows, if there are any."""
    if bad:
        raise BadRowsError(message or listed(bad, _SHOWN), bad)


def refuse_rows(source: object, faults: Iterable[tuple[int, str]], way: str = _MEND) -> None:
    """The same, by row numbers and reasons."""
    bad = [BadRow(source, row, reason) for row, reason in faults]
    refuse(bad, f"'{source}': {listed((f'row {one.row}: {one.reason}' for one in bad), _SHOWN)}; {way}")


class Table(Protocol):
    """What loses rows: one table, or several parts."""

    def without(self, bad: Collection[BadRow]) -> Self:
        """The rest."""


D = TypeVar("D", bound=Table)
X = TypeVar("X")


def usable(data: D, make: Callable[[D], X]) -> tuple[D, X]:
    """The rows of which something can be made, and what is made of them. DataError if too many had to be left out."""
    while True:
        try:
            return data, make(data)
        except BadRowsError as error:
            found, now = error, _active.get()
        if now is None:
            raise found
        now.leave_out(found.rows, str(found))
        data = data.without(found.rows)


def counted(bad: Sequence[BadRow]) -> dict[str, Any]:
    """How many rows were left out, and the first of them."""
    return {
        "rows": len(bad),
        "first": [{"source": one.source, "row": one.row, "reason": one.reason} for one in bad[:_SHOWN]],
    }


def told(bad: Sequence[BadRow]) -> list[str]:
    """The same as a line for people; none where there is nothing to tell."""
    if not bad:
        return []
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return [f"{len(bad)} bad row{'s were' if len(bad) > 1 else ' was'} left out: {'; '.join(bad[:_SHOWN])}{more}"]
