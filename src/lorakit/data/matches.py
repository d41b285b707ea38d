"""Matches: texts that belong together, for embeddings; and the forms that tables have.

| form | columns |
|---|---|
| pairs | query (or anchor, question), positive (or answer, document, passage) |
| triples | the same, and `negative`: a text that is like the query and does not belong to it |
| classes | text, label: texts of one class belong together |
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.cells import text_in, text_of
from lorakit.data.faults import BadRow
from lorakit.data.rows import Part, at
from lorakit.data.sources import LABEL_NAMES, TEXT_NAMES, apart, column_of, load_rows, text_column
from lorakit.data.tables import open_table, usable_rows
from lorakit.errors import DataError

QUERIES = ("query", "anchor", "question")
POSITIVES = ("positive", "answer", "document", "passage")
NEGATIVES = ("negative", "hard_negative")
_PAIRS = ", or, where they belong together, both with --query COLUMN and --positive COLUMN"


@dataclass(frozen=True)
class Matches(Part):
    """`queries`, and the text that belongs to each, perhaps with one that does not; or the class of each query."""

    queries: tuple[str, ...]
    positives: tuple[str, ...] | None
    negatives: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Matches({len(self)} {self.form}, '{self.source}')"

    @property
    def form(self) -> str:
        """What each row is, in words."""
        if self.labels is not None:
            return "texts with labels"
        if self.positives is None:
            return "single texts"
        return "pairs" if self.negatives is None else "triples"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The queries."""
        return self.queries

    def columns(self) -> tuple[tuple[str, ...], ...]:
        """The texts of each row: queries, positives, negatives, as far as there are any."""
        return tuple(texts for texts in (self.queries, self.positives, self.negatives) if texts is not None)

    def take(self, indices: Sequence[int]) -> "Matches":
        """The rows at these positions."""
        positives, negatives, labels = (at(own, indices) for own in (self.positives, self.negatives, self.labels))
        return Matches(at(self.queries, indices), positives, negatives, labels, self.source, at(self.lines, indices))

    def digest(self) -> str:
        """A hash of all texts and labels, in their order."""
        digest = hashlib.sha256(self.form.encode())
        for row in zip(*self.columns(), self.labels or self.queries):
            for text in row:
                digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()[:16]

    def about(self) -> str:
        """What the rows are, and the first one."""
        first = f"{len(self)} {self.form}; first row: {self.queries[0][:60]!r}"
        if self.labels is not None:
            return f"{first} -> {self.labels[0][:60]}"
        return first if self.positives is None else f"{first} and {self.positives[0][:60]!r}"

    def classes(self) -> tuple[str, ...] | None:
        """The labels, where there are any."""
        return self.labels

    def faults(self, valid: "Matches", test: "Matches") -> list[str]:
        """All parts need one form; of each class in training, and of one held out, there must be two unlike texts."""
        if self.form == "single texts":
            return [f"'{self.source}' has single texts, and nothing that belongs to them"]
        faults = [
            f"'{part.source}' has {part.form}, and the training rows are {self.form}; both must be alike"
            for part in (valid, test)
            if part.form != self.form
        ]
        if self.labels is None or faults:
            return faults
        if len(set(self.labels)) < 2:
            faults.append(f"'{self.source}' has one class only ('{self.labels[0]}'); nothing in it is unlike")
        texts_of = _by_label(self)
        faults += [
            BadRow(self.source, line, f"label '{label}' has one text only; a pair needs two, so add texts or remove it")
            for line, label in zip(self.lines, self.labels)
            if len(texts_of[label]) < 2
        ]
        faults += [
            f"'{part.source}' has no label with two texts, so nothing can be found in it; add rows"
            for part in (valid, test)
            if all(len(texts) < 2 for texts in _by_label(part).values())
        ]
        return faults


def _by_label(part: Matches) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for text, label in zip(part.queries, part.labels or ()):
        found[label].add(text)
    return found


def make_texts(given: Sequence[str], source: str = "texts", lines: Sequence[int] = ()) -> Matches:
    """Single texts from Python values. DataError for one that is none."""
    rows = tuple(lines) or tuple(range(1, len(given) + 1))
    for line, text in zip(rows, given):
        text_of(text, f"'{source}': row {line}")
    return Matches(tuple(given), None, None, None, source, rows)


def load_matches(
    source: str | Path,
    *,
    query: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    text: str | None = None,
    label: str | None = None,
    answers: bool = True,
) -> Matches:
    """The matches of one file or table, in one of the forms above; the arguments name columns.

    Pairs where there is a column for the positive, unless `text` or `label` is named. `answers=False` reads single
    texts: the queries, or what `text` names. Raises DataError that names every row which cannot be used, and why.
    """
    name = str(source)
    columns, table = open_table(source)
    if (text or label) and (query or positive or negative):
        raise DataError(f"'{name}': columns are named for pairs and for classes (text, label); name those of one form")
    others = {} if text or label else {"positive": (positive, POSITIVES), "negative": (negative, NEGATIVES)}
    found = {part: column_of(name, columns, own, usual, part, needed=False) for part, (own, usual) in others.items()}
    if not answers:
        own = text or query or column_of(name, columns, None, QUERIES, "query", needed=False)
        alone = load_rows(source, text=text_column(name, columns, own or None, way=_PAIRS), labels=False)
        return make_texts(alone.texts, name, alone.lines)
    if not found.get("positive"):
        if query or negative or not column_of(name, columns, label, LABEL_NAMES, "label", needed=False):
            raise DataError(
                f"'{name}' has neither a column with positives ({', '.join(POSITIVES)}) nor one with labels "
                f"({', '.join(LABEL_NAMES[:3])} ...); its columns are {', '.join(columns) or 'none'}: name one with "
                "--positive COLUMN or --label COLUMN"
            )
        rows = load_rows(source, text=text_column(name, columns, text, way=_PAIRS), label=label)
        return Matches(rows.texts, None, None, rows.labels, name, rows.lines)
    first = column_of(name, columns, query, (*QUERIES, *TEXT_NAMES), "query", needed=False)
    if not first:
        raise DataError(
            f"'{name}' has positives ('{found['positive']}') and no other column with a usual name for the queries ("
            f"{', '.join(QUERIES[:3])} ...); its columns are {', '.join(columns)}: name one with --query COLUMN"
        )
    apart(name, ("query", first), *found.items())
    names = [column for column in (first, found["positive"], found["negative"]) if column]
    texts, lines = usable_rows(name, table, lambda row: _row(row, names), bool(columns))
    queries, positives, *more = zip(*texts)
    return Matches(queries, positives, more[0] if more else None, None, name, tuple(lines))


def _row(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    texts = tuple(text_in(row, name).strip() for name in names)
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise DataError(f"{twice[:40]!r} stands in two of its columns; nothing can be learned from that")
    return texts
