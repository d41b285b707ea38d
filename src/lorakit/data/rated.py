"""Texts, or pairs of them, with a number each: a rating, a similarity. From a column of a table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.memory import Memory
from lorakit.data.rows import Texts, at
from lorakit.data.sources import apart, column_of, named, read_texts, text_columns
from lorakit.data.tables import open_table
from lorakit.errors import DataError

NUMBER_NAMES = (
    *("score", "similarity", "similarity_score", "relatedness_score", "rating", "stars", "number", "value", "target"),
    "label",
)


@dataclass(frozen=True)
class Rated(Texts):
    """`texts`, or pairs of them, and, where known, one number each."""

    texts: tuple[str, ...]
    numbers: tuple[float, ...] | None
    source: str
    lines: tuple[int, ...]
    others: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        known = f"{min(self.numbers):g} to {max(self.numbers):g}" if self.numbers else "no numbers"
        return f"Rated({len(self)} {'texts' if self.others is None else 'pairs'}, {known}, '{self.source}')"

    def take(self, indices: Sequence[int]) -> "Rated":
        """The rows at these positions."""
        numbers, others = at(self.numbers, indices), at(self.others, indices)
        return Rated(at(self.texts, indices), numbers, self.source, at(self.lines, indices), others)

    def encoded(self) -> Iterator[str]:
        """Texts and number of each row."""
        return self.written(list(map(repr, self.numbers)) if self.numbers else None)

    def telling(self) -> list[int]:
        """The first rows, and those with the lowest and the highest number."""
        ends = [self.numbers.index(end(self.numbers)) for end in (min, max)] if self.numbers else []
        return sorted({*super().telling(), *ends})

    def about(self) -> str:
        """What the numbers are, and the first row."""
        numbers = self.numbers or (0.0,)
        mean = math.fsum(numbers) / len(numbers)
        return f"numbers {min(numbers):g} to {max(numbers):g}, mean {mean:g}; {self.shown()} -> {numbers[0]:g}"

    def faults(self, valid: "Rated", test: "Rated") -> list[str]:
        """Numbers must be known everywhere, and not all the same."""
        if unlike := self.unlike(valid, test):
            return unlike
        faults = [f"'{part.source}' has no numbers" for part in (self, valid, test) if part.numbers is None]
        if self.numbers is not None and len(set(self.numbers)) < 2:
            faults.append(
                f"'{self.source}': every training row has the number {self.numbers[0]:g}; nothing can be learned"
            )
        return faults


def load_rated(
    source: str | Path | Memory,
    *,
    text: str | None = None,
    text2: str | None = None,
    number: str | None = None,
    answers: bool = True,
) -> Rated:
    """The rows of one file or table; `answers=False` reads no numbers. DataError names rows that cannot be used."""
    name = str(source)
    columns, table = open_table(source)
    places = text_columns(name, columns, text, text2)
    if not answers:
        texts, others, _, lines = read_texts(name, columns, table, places, None)
        return Rated(texts, None, name, lines, others)
    column = column_of(name, columns, number, NUMBER_NAMES, "number")
    apart(name, *named(places), ("number", column))
    texts, others, found, lines = read_texts(name, columns, table, places, lambda row: _number(row, column))
    return Rated(texts, found, name, lines, others)


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        told = "empty" if value is None or value == "" else repr(value)[:40]
        raise DataError(f"column '{column}' is {told}; it must be a number (with a point, not a comma)")
    return found
