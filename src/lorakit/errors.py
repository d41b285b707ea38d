"""Everything lorakit raises on purpose.

LorakitError
├── UsageError            a call that cannot mean anything: unknown name, conflicting arguments (exit code 2)
├── PlanError             a plan that does not fit its model, or a plan file that cannot be read
├── AdapterError          adapter values or files that are broken or do not fit the model
│   └── BaseMismatchError the adapter was made for other base weights
├── AttachError           the model is not in a state in which this can be done
│   └── NoEffectError     an attached update never ran
├── DataError             training or prediction data that cannot be used
│   ├── BadRowsError      some rows of it, which can be left out
│   └── NoRowsError       a table of which no row can be used
├── FitError              training that cannot go on (diverged, nothing to train, not resumable)
│   ├── NotFiniteError    the loss or its gradient is infinite or none at all
│   └── StoppedError      stopped by the user (exit code 130)
└── MissingExtraError     an optional library is not installed (also an ImportError)

A message states the fact, the place, the numbers and the way out, in one sentence where it fits in one.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


class LorakitError(Exception):
    """Base of all errors that lorakit raises on purpose."""


class UsageError(LorakitError, ValueError):
    """A call that cannot mean anything."""


class PlanError(LorakitError, ValueError):
    """A plan that does not fit its model, or a plan file that cannot be read."""


class AdapterError(LorakitError, ValueError):
    """Adapter values or files that are broken or do not fit the model."""


class BaseMismatchError(AdapterError):
    """The adapter was made for other base weights."""


class AttachError(LorakitError, RuntimeError):
    """The model is not in a state in which this can be done."""


class NoEffectError(AttachError):
    """An attached update never ran."""


class DataError(LorakitError, ValueError):
    """Training or prediction data that cannot be used."""


class BadRowsError(DataError):
    """Some rows of the data that cannot be used: `rows` (data/faults.py says what they are); `way` is the way out."""

    def __init__(self, message: str, rows: Sequence[Any], way: str = "") -> None:
        super().__init__(message)
        self.rows, self.way = rows, way


class NoRowsError(DataError):
    """A table of which no row can be used; `rows` are those that are bad, where that is why."""

    def __init__(self, message: str, rows: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class FitError(LorakitError, RuntimeError):
    """Training that cannot go on."""


class NotFiniteError(FitError):
    """A loss or a gradient that is infinite or no number."""


class StoppedError(FitError):
    """Training that the user stopped."""


class MissingExtraError(LorakitError, ImportError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'lorakit[{extra}]'")


def listed(faults: Iterable[str], limit: int = 12) -> str:
    """The faults of one input as one text: a line each, the rest counted."""
    lines = list(faults)
    if len(lines) == 1:
        return lines[0]
    shown = "".join(f"\n  - {line}" for line in lines[:limit])
    more = f"\n  - and {len(lines) - limit} more" if len(lines) > limit else ""
    return f"{len(lines)} faults:{shown}{more}"


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' or, where nothing is near, the list of what is known."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names) or 'none'}"
