"""Texts with any number of labels each, none included; and the forms in which tables hold them.

| form | example |
|---|---|
| one column, labels joined by a delimiter: `;`, `|` or `,`, found if only one of them occurs in it, or told | `a;b` |
| one column of lists: JSON Lines and Parquet have them; in CSV as JSON or as Python writes a list | `["a", "b"]` |
| a column of 0 and 1 for each label, all named | `toxic,threat` with 1 and 0 below |

An empty text or an empty list is a row without labels; null is an error, for it may mean that nobody looked. A
delimiter that is told cuts every text, also one in brackets.
"""

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.cells import SET_NAMES, is_list, text_of
from lorakit.data.faults import BadRow
from lorakit.data.memory import Memory
from lorakit.data.rows import Texts, at
from lorakit.data.sources import LABEL_NAMES, apart, column_of, named, read_texts, text_columns
from lorakit.data.tables import open_table
from lorakit.errors import DataError, listed, nearest

LABELS_NAMES = (*SET_NAMES, *LABEL_NAMES)
DELIMITERS = (";", "|", ",")
_TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
_FEWEST = 3  # rows of a class, to be in training, validation and test rows

Labels = tuple[str, ...]


@dataclass(frozen=True)
class LabelSets(Texts):
    """`texts`, or pairs of them, and, where known, the labels of each. `columns` are those of 0 and 1, if there are."""

    texts: tuple[str, ...]
    labels: tuple[Labels, ...] | None
    source: str
    lines: tuple[int, ...]
    others: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kinds = f"{len(self.known)} labels" if self.labels else "no labels"
        return f"LabelSets({len(self)} {'texts' if self.others is None else 'pairs'}, {kinds}, '{self.source}')"

    @property
    def known(self) -> set[str]:
        """All labels that occur."""
        return {label for own in self.labels or () for label in own}

    def take(self, indices: Sequence[int]) -> "LabelSets":
        """The rows at these positions."""
        labels, others = at(self.labels, indices), at(self.others, indices)
        return LabelSets(at(self.texts, indices), labels, self.source, at(self.lines, indices), others, self.columns)

    def digest(self) -> str:
        """A hash of texts and labels, in their order."""
        own = self.written([json.dumps(sorted(own)) for own in self.labels] if self.labels else None)
        return hashlib.sha256("".join(own).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def about(self) -> str:
        """How many labels, how many on a text, and the first row."""
        labels = self.labels or ((),)
        mean = sum(map(len, labels)) / len(labels)
        first = ", ".join(labels[0]) or "no label"
        return f"{len(self.known)} labels, {mean:.1f} on each text; {self.shown()} -> {first}"

    def classes(self) -> tuple[str, ...] | None:
        """The rarest label of each row, so that every part of a split gets rows of every label, if it can."""
        if self.labels is None:
            return None
        n_rows = Counter(label for own in self.labels for label in own)
        rarest = [min(own, key=lambda label: (n_rows[label], label), default="") for own in self.labels]
        size = Counter(rarest)
        largest = size.most_common(1)[0][0]
        return tuple(name if size[name] >= _FEWEST or 0 < n_rows[name] < _FEWEST else largest for name in rarest)

    def faults(self, valid: "LabelSets", test: "LabelSets") -> list[str]:
        """Labels must be known everywhere, some on a training row, and none unseen there."""
        if unlike := self.unlike(valid, test):
            return unlike
        faults = [f"'{part.source}' has no labels" for part in (self, valid, test) if part.labels is None]
        known = self.known
        if not faults and not known:
            faults.append(f"'{self.source}': no training row has any label, so there is nothing to learn")
        for column in self.columns:
            if known and column not in known:
                faults.append(f"'{self.source}': column '{column}' is 0 in every training row; leave it out of labels")
        for part in (valid, test):
            faults += unseen(part, known) if known else []
        return faults


def unseen(part: LabelSets, known: set[str]) -> list[BadRow]:
    """Labels of the part that are not known, row by row."""
    way = "add examples of it there, or remove it here; or is it two labels, with another delimiter between them"
    return [
        BadRow(part.source, line, f"label '{label}' does not occur in the training rows; {way} (--delimiter)?")
        for own, line in zip(part.labels or (), part.lines)
        for label in own
        if label not in known
    ]


def load_label_sets(
    source: str | Path | Memory,
    *,
    text: str | None = None,
    text2: str | None = None,
    label: str | None = None,
    labels: str | Sequence[str] | None = None,
    delimiter: str | None = None,
    answers: bool = True,
) -> LabelSets:
    """The rows of one file or table, in any of the forms above.

    `label` names the column that holds all labels; or `labels` the columns of 0 and 1 (a list, or one text with
    commas). `delimiter` stands between labels in one text. `answers=False` reads no labels. Raises DataError that names
    every row which cannot be used, and why.
    """
    name = str(source)
    columns, table = open_table(source)
    places = text_columns(name, columns, text, text2)
    if not answers:
        texts, others, _, lines = read_texts(name, columns, table, places, None)
        return LabelSets(texts, None, name, lines, others)
    if labels is not None:
        flags = _flags(name, columns, labels, label, delimiter)
        apart(name, *named(places), *(("labels", flag) for flag in flags))
        texts, others, found, lines = read_texts(name, columns, table, places, lambda row: _marked(row, flags))
        return LabelSets(texts, found, name, lines, others, flags)
    if label is None and not any(usual in (column.lower() for column in columns) for usual in LABELS_NAMES):
        raise DataError(
            f"'{name}' has no column with a usual name for labels ({', '.join(LABELS_NAMES[:3])} ...); its columns are "
            f"{', '.join(columns) or 'none'}: name one with --label COLUMN, or those of 0 and 1 with --labels A,B,C"
        )
    column = column_of(name, columns, label, LABELS_NAMES, "label")
    apart(name, *named(places), ("label", column))
    rows = list(table)
    split = _splitter(name, column, rows, delimiter)
    texts, others, found, lines = read_texts(name, columns, iter(rows), places, lambda row: _held(row, column, split))
    return LabelSets(texts, found, name, lines, others)


def _flags(
    source: str, columns: list[str], labels: str | Sequence[str], label: str | None, delimiter: str | None
) -> tuple[str, ...]:
    """The columns of 0 and 1."""
    names = tuple(one.strip() for one in (labels.split(",") if isinstance(labels, str) else labels))
    if label is not None or delimiter is not None:
        other = "label" if label is not None else "delimiter"
        raise DataError(
            f"'{source}': labels names columns of 0 and 1, {other} is for one column of all; give one of them"
        )
    faults = [f"it has no column '{one}'{nearest(one, columns)}" for one in names if one not in columns]
    faults += [f"labels names '{one}' twice" for one, n in Counter(names).items() if n > 1]
    if faults:
        raise DataError(f"'{source}': {listed(faults)}")
    return names


def _marked(row: Mapping[str, Any], flags: Sequence[str]) -> Labels:
    found: list[str] = []
    for column in flags:
        truth = _TRUTH.get(str(row.get(column)).strip().lower())
        if truth is None:
            raise DataError(f"column '{column}' is {row.get(column)!r:.40}; it must be 0 or 1")
        if truth:
            found.append(column)
    return tuple(found)


def _splitter(source: str, column: str, rows: Sequence[tuple[int, Any]], delimiter: str | None) -> Callable[[str], Any]:
    """What makes labels of one text: a list of them, where it holds what it should."""
    if delimiter is not None:
        if not delimiter:
            raise DataError(f"'{source}': the delimiter is empty; give what stands between two labels")
        return lambda value: value.split(delimiter)
    values = [row.get(column) for _, row in rows]
    texts = [value for value in values if isinstance(value, str) and not is_list(value)]
    counts = {mark: n for mark in DELIMITERS if (n := sum(mark in value for value in texts))}
    if len(counts) > 1:
        told = " and ".join(f"'{mark}' in {n}" for mark, n in counts.items())
        raise DataError(
            f"'{source}': column '{column}' has {told} of {len(texts)} rows; say what stands between labels with "
            "--delimiter"
        )
    mark = next(iter(counts), None)

    def split(value: str) -> Any:
        return _listed(value, column) if is_list(value) else value.split(mark) if mark else [value]

    return split


def _held(row: Mapping[str, Any], column: str, split: Callable[[str], Any]) -> Labels:
    value = row.get(column)
    if isinstance(value, str):
        value = split(value)
    if not isinstance(value, list | tuple) or not all(type(one) in (str, int) for one in value):
        wish = "labels joined by a delimiter, or a list of them; empty where there is none"
        raise DataError(f"column '{column}' is {'null' if value is None else repr(value)[:40]}; it must be {wish}")
    found = (str(one).strip() for one in value)
    return tuple(dict.fromkeys(text_of(one, f"a label in column '{column}'") for one in found if one))


def _listed(value: str, column: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # of JSON first: only it knows what two surrogates are
        try:
            return read(value.strip())
        except (ValueError, SyntaxError):
            pass
    raise DataError(f"column '{column}' is {value!r:.40}, which is no list of labels")
