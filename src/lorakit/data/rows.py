"""Rows: texts or pairs of texts, with labels; what every form of rows can do; and the three parts of a data set.

Values. Where they come from is `sources.py`. A task with other data (dialogues, numbers ...) brings a Part of its own.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

from lorakit.data.faults import BadRow, refuse
from lorakit.errors import DataError, listed


class Part(ABC):
    """Rows of one table, in whatever form a task takes them. `lines` are the row numbers in `source`, for messages."""

    source: str
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """What the model is given of each row, as one text."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Self:
        """The rows at these positions."""

    def without(self, bad: Collection[BadRow]) -> Self:
        """The rows that are not among these. DataError if that is none."""
        gone = {one.row for one in bad if one.source == self.source}
        kept = [i for i, line in enumerate(self.lines) if line not in gone]
        if not kept:
            raise DataError(f"'{self.source}': no row is left of {len(self)}; {listed(map(str, bad), 5)}")
        return self if len(kept) == len(self) else self.take(kept)

    @abstractmethod
    def digest(self) -> str:
        """A hash of all that is learned from, in its order."""

    @abstractmethod
    def about(self) -> str:
        """A line for people: what is in it, and the first row."""

    def classes(self) -> tuple[str, ...] | None:
        """The class of each row, where rows fall into classes that every part of a split must have; else None."""
        return None

    def faults(self, valid: Self, test: Self) -> list[str]:
        """Why it cannot be learned from and measured by these two, a `BadRow` where a row is why; empty if it can."""
        return []

    def parted(self, draw: random.Random, valid: bool, test: bool) -> tuple[list[int], list[int], list[int]] | None:
        """Places of the rows to learn from, to choose by and to report on, where rows want a split of their own."""
        return None


P = TypeVar("P", bound=Part)
T = TypeVar("T")
_FEW_INPUTS = 10  # below it a tenth of them is none


class Texts(Part):
    """Rows of `texts`, or of pairs of them: then `others` are the second ones."""

    texts: tuple[str, ...]
    others: tuple[str, ...] | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The texts; those of a pair on two lines."""
        return self.texts if self.others is None else tuple(map("\n".join, zip(self.texts, self.others)))

    @property
    def kind(self) -> str:
        """What they are, in words."""
        return "single texts" if self.others is None else "pairs of texts"

    def hashed(self, learned: Sequence[str] | None) -> str:
        """A hash of all texts, and of what is learned of each, in their order."""
        digest = hashlib.sha256()
        for text, goal in zip(self.texts, learned or self.texts):
            digest.update(f"{len(text)}:{text}{len(goal)}:{goal}".encode())
        for text in self.others or ():
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()[:16]

    def shown(self) -> str:
        """The first row, cut."""
        first = f"{self.texts[0][:70]!r}"
        return f"first row: {first}" if self.others is None else f"first row: {first} and {self.others[0][:70]!r}"

    def unlike(self, *parts: "Texts") -> list[str]:
        """Those of the parts that hold single texts where these are pairs, or the other way round."""
        return [
            f"'{part.source}' has {part.kind}, and '{self.source}' has {self.kind}; name the columns alike in both"
            for part in parts
            if part.kind != self.kind
        ]


@dataclass(frozen=True)
class Rows(Texts):
    """`texts`, or pairs of them, and, where known, one label each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]
    others: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        kinds = f", {len(set(self.labels))} labels" if self.labels else ", no labels"
        return f"Rows({len(self)} {'texts' if self.others is None else 'pairs'}{kinds}, '{self.source}')"

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at these positions."""
        labels, others = at(self.labels, indices), at(self.others, indices)
        lines = tuple(self.lines[i] for i in indices)
        return Rows(tuple(self.texts[i] for i in indices), labels, self.source, lines, others)

    def digest(self) -> str:
        """A hash of texts and labels, in their order."""
        return self.hashed(self.labels)

    def about(self) -> str:
        """How many labels, and the first row."""
        labels = self.labels or ("",)
        return f"{len(set(labels))} labels; {self.shown()} -> {labels[0]}"

    def classes(self) -> tuple[str, ...] | None:
        """The labels."""
        return self.labels

    def faults(self, valid: "Rows", test: "Rows") -> list[str]:
        """Labels must be everywhere, of more than one class, and none unseen in training."""
        faults = [f"'{part.source}' has no labels" for part in (self, valid, test) if part.labels is None]
        known = set(self.labels or ())
        if not faults and len(known) < 2:
            only = next(iter(known), "nothing")
            faults.append(f"'{self.source}' has one class only ('{only}'); at least two are needed to learn from")
        for part in (valid, test):
            for label, line in zip(part.labels or (), part.lines):
                if known and label not in known:
                    why = f"label '{label}' does not occur in the training rows"
                    faults.append(BadRow(part.source, line, f"{why}; add examples of it there, or remove the row"))
        return faults + self.unlike(valid, test)


def at(values: tuple[T, ...] | None, indices: Sequence[int]) -> tuple[T, ...] | None:
    """The values at these positions, where there are values."""
    return None if values is None else tuple(values[i] for i in indices)


@dataclass(frozen=True)
class Splits(Generic[P]):
    """Rows to learn from, to choose by, and to report on; and those that were left out, for they were bad."""

    train: P
    valid: P
    test: P
    skipped: tuple[BadRow, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training rows, sorted (numbers by value); none where rows have none."""
        return in_order(self.train.classes() or ())

    def checked(self) -> Self:
        """Itself, if it can be learned from; DataError with every reason why not."""
        faults = self.train.faults(self.valid, self.test)
        bad = [fault for fault in faults if isinstance(fault, BadRow)]
        if len(bad) < len(faults):
            raise DataError(listed(faults))
        refuse(bad)
        return self

    def without(self, bad: Collection[BadRow]) -> Self:
        """The rest. DataError if it is not clear which part a row belongs to, or if none is left of one."""
        rows = {(one.source, one.row): one for one in bad}
        old = (self.train, self.valid, self.test)
        train, valid, test = (part.without(bad) for part in old)
        n_gone = sum(map(len, old)) - len(train) - len(valid) - len(test)
        if n_gone != len(rows):
            raise DataError(f"{listed(bad, 5)}; several parts have rows of this name, so none can be left out")
        return replace(self, train=train, valid=valid, test=test, skipped=(*self.skipped, *rows.values()))


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Different labels, sorted: numbers by value, before words."""
    return tuple(sorted(set(labels), key=lambda label: (not label.lstrip("-").isdigit(), _number(label), label)))


def _number(label: str) -> int:
    return int(label) if label.lstrip("-").isdigit() else 0


def split(rows: P, seed: int = 0, valid: float = 0.1, test: float = 0.1) -> Splits[P]:
    """Splits one table at random, within each class where there are classes; each part gets a row of every class.

    Rows of a class with the same input stay together, so that no part knows an input of another; unless the class has
    fewer than ten different inputs. DataError where there are too few rows.
    """
    own = rows.parted(random.Random(seed), valid > 0, test > 0)
    if own is not None:
        train, held, proof = (rows.take(sorted(part)) for part in own)
        return Splits(train, held, proof)
    classes = rows.classes()
    n_rows = Counter(classes or [""] * len(rows))
    least = 1 + (valid > 0) + (test > 0)
    few = {name: n for name, n in n_rows.items() if n < least}
    if few or not n_rows:
        name, n = next(iter(few.items()), ("", 0))
        raise DataError(
            f"'{rows.source}'{f': label {name!r}' if name else ''} has {n} row{'s' if n != 1 else ''}; at least "
            f"{least} are needed to split off rows to validate and test on; add rows, or give those parts as files of "
            "their own"
        )
    draw = random.Random(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for units in _units(rows, classes):
        draw.shuffle(units)
        n_valid, n_test = (max(1, round(len(units) * share)) if share else 0 for share in (valid, test))
        ends = (n_valid, n_valid + n_test, len(units))
        for part, begin, end in zip((1, 2, 0), (0, *ends), ends):
            parts[part].extend(index for unit in units[begin:end] for index in unit)
    train, held, proof = (rows.take(sorted(part)) for part in parts)
    return Splits(train, held, proof)


def _units(rows: Part, classes: Sequence[str] | None) -> list[list[list[int]]]:
    """What must not be torn apart, for each class: positions of rows."""
    same: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (name, text) in enumerate(zip(classes or [""] * len(rows), rows.inputs)):
        same[name][text].append(index)
    return [
        list(units.values()) if len(units) >= _FEW_INPUTS else [[i] for unit in units.values() for i in unit]
        for _, units in sorted(same.items())
    ]
