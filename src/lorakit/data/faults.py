"""Rows that cannot be used: refused by file, row and reason; or left out, as many as `skip_bad` allows, and counted.

A reader goes on without bad rows (`leave_out`). What needs a whole table, or all parts of a data set, says which of its
rows are bad (`refuse`), and is done again without them (`usable`). All of it within one `skipping` has one bound;
within one `gathered` it goes on beyond that, so that one refusal names all the bad rows.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from lorakit.errors import BadRowsError, DataError, LorakitError, NoRowsError, UsageError, listed

_MEND = "mend or remove these rows"
_SHOWN = 5

P = TypeVar("P")
X = TypeVar("X")


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


class Refusal(NamedTuple):
    """Rows that cannot be used, what is said of them, and the way out, which is a part of that."""

    rows: Sequence[BadRow]
    message: str
    way: str

    @classmethod
    def of(cls, refused: Sequence["Refusal"]) -> "Refusal":
        """One of several."""
        if len(refused) == 1:
            return refused[0]
        found: dict[tuple[str, int], BadRow] = {}
        for one in chain.from_iterable(refusal.rows for refusal in refused):
            found.setdefault((one.source, one.row), one)
        places = {source: place for place, source in enumerate(dict.fromkeys(source for source, _ in found))}
        rows = sorted(found.values(), key=lambda one: (places[one.source], one.row))
        way = "; ".join(dict.fromkeys(refusal.way for refusal in refused if refusal.way))
        return cls(rows, f"{_listed(rows)}{'; ' if way else ''}{way}", way)


class Skipping:
    """At most `most` rows are left out; `bad` are those that were. While it `gathers`, more are, until `settle`."""

    def __init__(self, most: int, before: Iterable[BadRow] = ()) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise UsageError(f"skip_bad is {most!r}; it must be a whole number of rows, 0 or more")
        self.most = most
        self.gathers = False
        self._found = {(one.source, one.row): one for one in before}
        self._refused: list[Refusal] = []

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """Every row once, with the first reason."""
        return tuple(self._found.values())

    def leave_out(self, bad: Iterable[BadRow], message: str, way: str = "") -> None:
        """Counts these rows. DataError, with this message and the numbers, if they are too many; or later: `settle`."""
        found = {(one.source, one.row): one for one in reversed(list(bad))}
        new = {key: one for key, one in reversed(found.items()) if key not in self._found}
        if new and len(self._found) + len(new) > self.most:
            self._refused.append(Refusal(list(new.values()), message, way))
        self._found |= new
        if not self.gathers:
            self.settle(all_seen=False)

    def settle(self, all_seen: bool) -> None:
        """DataError with all rows beyond the bound, if there are any; unless `all_seen`, there may be more of them."""
        if not self._refused:
            return
        refused = Refusal.of(self._refused)
        n_all, n_new = len(self._found), len(refused.rows)
        way = f"leave {'it' if n_new == 1 else f'these {n_new} rows'} out with --skip-bad {n_all}"
        before = f", {n_all - n_new} were left out before" if n_all > n_new else ""
        few = f" ({self.most} are too few{before})" if self.most else ""
        self._refused = []
        for one in refused.rows:
            del self._found[one.source, one.row]
        raise DataError(f"{refused.message}; or {way}{'' if all_seen else ' or more'}{few}") from None


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


@contextmanager
def gathered(all_seen: bool = False) -> Iterator[None]:
    """Within the block rows beyond the bound are left out too; DataError at its end names them all. `all_seen`: after
    the block nobody looks for bad rows any more."""
    now = _active.get()
    if now is None or now.gathers:
        yield
        return
    now.gathers = True
    try:
        yield
        now.settle(all_seen)
    except LorakitError:
        now.settle(all_seen=False)  # what was refused before comes first
        raise
    finally:
        now.gathers = False


def tolerant() -> bool:
    """Whether a row may be left out here."""
    now = _active.get()
    return now is not None and now.most > 0


def leave_out(source: object, faults: Sequence[tuple[int, str]], way: str = _MEND, left: int = 1) -> None:
    """Counts the rows that a reader leaves out: row numbers and reasons. DataError if there may not be so many;
    NoRowsError if no row is `left`."""
    if not faults:
        return
    bad = [BadRow(source, row, reason) for row, reason in faults]
    message = f"{_listed(bad)}; {way}"
    now = _active.get()
    if now is None:
        raise DataError(message)
    if not left:
        raise NoRowsError(f"{message}; no other row is there", bad)
    now.leave_out(bad, message, way)


def _listed(bad: Collection[BadRow]) -> str:
    """The first of these rows; where all are of one source, its name stands in front."""
    source = next(iter(bad)).source
    if any(one.source != source for one in bad):
        return listed(bad, _SHOWN)
    return f"'{source}': {listed((f'row {one.row}: {one.reason}' for one in bad), _SHOWN)}"


def refuse(bad: Sequence[BadRow], message: str = "", way: str = "") -> None:
    """BadRowsError for these rows, if there are any."""
    if bad:
        raise BadRowsError("; ".join(part for part in (message or listed(bad, _SHOWN), way) if part), bad, way)


def refuse_rows(source: object, faults: Iterable[tuple[int, str]], way: str = _MEND) -> None:
    """The same, by row numbers and reasons."""
    bad = [BadRow(source, row, reason) for row, reason in faults]
    refuse(bad, _listed(bad) if bad else "", way)


def made(given: Iterable[P], make: Callable[[P], X]) -> Iterator[X]:
    """What is made of each of these, one by one; BadRowsError at the end with the bad rows of them all."""
    refused: list[Refusal] = []
    for one in given:
        try:
            yield make(one)
        except BadRowsError as error:
            refused.append(Refusal(error.rows, str(error), error.way))
    if refused:
        whole = Refusal.of(refused)
        raise BadRowsError(whole.message, whole.rows, whole.way)


class Table(Protocol):
    """What loses rows: one table, or several parts."""

    def without(self, bad: Collection[BadRow]) -> Self:
        """The rest."""


D = TypeVar("D", bound=Table)


def usable(data: D, make: Callable[[D], X]) -> tuple[D, X]:
    """The rows of which something can be made, and what is made of them. DataError if too many had to be left out;
    NoRowsError if no row of a part is usable."""
    while True:
        try:
            return data, make(data)
        except BadRowsError as error:
            found, now = error, _active.get()
        if now is None:
            raise found
        try:
            rest = data.without(found.rows)
        except NoRowsError as error:
            raise NoRowsError(f"{found}; {error}", found.rows) from None
        now.leave_out(found.rows, str(found), found.way)
        data = rest


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
