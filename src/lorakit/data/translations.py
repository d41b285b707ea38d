"""Translations: texts and what each becomes (another language, a summary, a rewriting); the forms tables hold them in.

| form | columns |
|---|---|
| pair | source, target; or another pair of `PAIRS`, or the two that the caller names |
| languages | `translation`: {"en": ..., "de": ...}, also as JSON; the caller names two as source and target |

Texts are kept as they are, white space included.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.cells import text_in, text_of
from lorakit.data.rows import Part, at
from lorakit.data.sources import apart, column_of
from lorakit.data.tables import open_table, usable_rows
from lorakit.errors import DataError, nearest

PAIRS = (
    ("source", "target"),
    ("src", "tgt"),
    ("src", "trg"),
    ("input", "output"),
    ("input", "target"),
    ("input_text", "target_text"),
    ("text", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("mr", "ref"),
)
LANGUAGES = "translation"


@dataclass(frozen=True)
class Translations(Part):
    """`texts` and, where known, what each becomes."""

    texts: tuple[str, ...]
    targets: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        kinds = "" if self.targets is not None else ", no targets"
        return f"Translations({len(self)} texts{kinds}, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The texts."""
        return self.texts

    def take(self, indices: Sequence[int]) -> "Translations":
        """The rows at these positions."""
        return Translations(at(self.texts, indices), at(self.targets, indices), self.source, at(self.lines, indices))

    def encoded(self) -> Iterator[str]:
        """Text and target of each row."""
        pairs = zip(self.texts, self.targets or self.texts)
        return (f"{len(text)}:{text}{len(target)}:{target}" for text, target in pairs)

    def about(self) -> str:
        """How many texts have several targets, and the first row."""
        n_texts = len(set(self.texts))
        several = f"{n_texts} different texts; " if n_texts < len(self) else ""
        target = self.targets[0] if self.targets else ""
        return f"{several}first row: {self.texts[0][:70]!r} -> {target[:70]!r}"

    def faults(self, valid: "Translations", test: "Translations") -> list[str]:
        """Every text needs its target."""
        return [f"'{part.source}' has no targets" for part in (self, valid, test) if part.targets is None]


def make_translations(texts: Sequence[Any], source: str = "texts") -> Translations:
    """Texts from Python, without targets. DataError names those that are none."""
    return _read(source, enumerate(texts, 1), lambda text: (text_of(text, "it"), None), header=False)


def load_translations(
    path: str | Path, *, source: str | None = None, target: str | None = None, targets: bool = True
) -> Translations:
    """The rows of one file or table. `source` and `target` name columns, or languages of a column `translation`.

    `targets=False` reads none. Raises DataError that names every row which cannot be used, and why.
    """
    name = str(path)
    columns, table = open_table(path)
    return _read(name, table, _reader(name, columns, source, target, targets), header=bool(columns))


Reader = Callable[[Mapping[str, Any]], tuple[str, str | None]]


def _read(source: str, rows: Any, read: Reader, header: bool = True) -> Translations:
    found, lines = usable_rows(source, rows, read, header)
    targets = tuple(target for _, target in found if target is not None)
    return Translations(tuple(text for text, _ in found), targets or None, source, tuple(lines))


def _reader(name: str, columns: list[str], source: str | None, target: str | None, targets: bool) -> Reader:
    """How to read a row of a table with these columns."""
    lower = {column.lower(): column for column in columns}
    named = [one for one in (source, target if targets else None) if one is not None]
    if LANGUAGES in lower and not (named and set(named) <= set(columns)):
        if source is None or (target is None and targets):
            raise DataError(
                f"'{name}' has a column '{lower[LANGUAGES]}' with several languages; say which is which: "
                "--source en --target de"
            )
        apart(name, ("source", source), ("target", target if targets else None))
        return lambda row: _languages(row, lower[LANGUAGES], source, target if targets else None)
    first = column_of(name, columns, source, (), "source", needed=False)
    second = column_of(name, columns, target if targets else None, (), "target", needed=False)
    pairs = [
        (first or lower.get(one), second or lower.get(other))
        for one, other in PAIRS
        if (first or one in lower) and (second or other in lower or not targets)
    ]
    if not pairs:
        usual = ", ".join(" and ".join(pair) for pair in PAIRS)
        raise DataError(
            f"'{name}' has no two columns with usual names ({usual}) and no '{LANGUAGES}'; its columns are "
            f"{', '.join(columns) or 'none'}: name two with --source COLUMN and --target COLUMN"
        )
    text, goal = pairs[0]
    apart(name, ("source", text), ("target", goal if targets else None))
    return lambda row: (text_in(row, text or ""), text_in(row, goal or "") if targets else None)


def _languages(row: Mapping[str, Any], column: str, source: str, target: str | None) -> tuple[str, str | None]:
    said = row.get(column)
    if isinstance(said, str):  # a table of texts holds it as JSON
        try:
            said = json.loads(said)
        except json.JSONDecodeError as error:
            raise DataError(f"column '{column}' is a text, and no object in JSON ({error.msg})") from None
    if not isinstance(said, Mapping):
        raise DataError(f"column '{column}' is {repr(said)[:40]}; it must be an object with a text for each language")
    for language in (source, target):
        if language is not None and language not in said:
            raise DataError(f"column '{column}' has no '{language}'{nearest(language, list(said))}")
    return text_of(said[source], f"'{source}'"), None if target is None else text_of(said[target], f"'{target}'")
