"""Rows: texts or pairs of texts, with labels; what every form of rows can do; and the three parts of a data set.

Values. Where they come from is `sources.py`. A task with other data (dialogues, numbers ...) brings a Part of its own.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.data.faults import BadRow, refuse
from lorakit.errors import DataError, NoRowsError, listed

Ints = NDArray[np.int64]
HASH = 16  # bytes
_FIRST = 32  # rows of a part that are looked at for what all are like


class Part(ABC):
    """Rows of one table, in whatever form a task takes them. `lines` are the row numbers in `source`, for messages.

    A part whose rows have a text each (`encoded`) may stay on disk where it is large: data/streamed.py.
    """

    source: str
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    @abstractmethod
    def inputs(self) -> Sequence[str]:
        """What the model is given of each row, as one text."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Self:
        """The rows at these positions."""

    def without(self, bad: Collection[BadRow]) -> Self:
        """The rows that are not among these. NoRowsError if that is none."""
        gone = {one.row for one in bad if one.source == self.source}
        kept = [i for i, line in enumerate(self.lines) if line not in gone]
        if not kept:
            raise NoRowsError(f"no other row of '{self.source}' is there")
        return self if len(kept) == len(self) else self.take(kept)

    def cut(self, *parts: Sequence[int]) -> "list[Part]":
        """The rows at the positions of each of these parts."""
        return [self.take(indices) for indices in parts]

    def encoded(self) -> Iterator[str] | None:
        """Of each row all that is learned from, as a text that no other row has; None for a part with a digest of its
        own, which is in memory as a whole."""
        return None

    def hashes(self) -> NDArray[np.uint8]:
        """A hash of all that is learned from each row: `(rows, 16)`."""
        return _hashes(self.encoded() or (), HASH)

    def keys(self) -> NDArray[np.uint64]:
        """A hash of each input: `(rows,)`."""
        return _hashes(self.inputs, 8).view(np.uint64)[:, 0]

    def digest(self) -> str:
        """A hash of all that is learned from, in its order."""
        return hashlib.sha256(np.ascontiguousarray(self.hashes()).data).hexdigest()[:16]

    @abstractmethod
    def about(self) -> str:
        """A line for people: what is in it, and the first row."""

    def chunks(self) -> "Iterator[Part]":
        """All rows in their order, as parts that are in memory."""
        yield self

    @property
    def core(self) -> Any:
        """Rows that tell what all are like (`telling`), in memory, of the form that the task takes."""
        return self

    def telling(self) -> list[int]:
        """Positions of a few rows of which `faults` says what it says of all: the first, and the first of a class."""
        first: dict[str, int] = {}
        for place, name in enumerate(self.classes() or ()):
            first.setdefault(name, place)
        return sorted({*range(min(_FIRST, len(self))), *first.values()})

    def classes(self) -> Sequence[str] | None:
        """The class of each row, where rows fall into classes that every part of a split must have; else None."""
        return None

    def faults(self, valid: Self, test: Self) -> list[str]:
        """Why it cannot be learned from and measured by these two, a `BadRow` where a row is why; empty if it can."""
        return []

    def divided(self) -> Self:
        """Itself; or its rows cut finer, where they are too few to split."""
        return self

    def parted(self, draw: random.Random, valid: bool, test: bool) -> tuple[list[int], list[int], list[int]] | None:
        """Places of the rows to learn from, to choose by and to report on, where rows want a split of their own."""
        return None


def _hashes(texts: Iterable[str], size: int) -> NDArray[np.uint8]:
    found = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest() for text in texts]
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, size)


class Coded(Sequence[str]):
    """Names of which many are alike, by their numbers: `names`, each once, and `codes (n,)`.

    >>> list(Coded.of(["b", "a", "b"])), Coded.of(["b", "a", "b"]).codes.tolist()
    (['b', 'a', 'b'], [0, 1, 0])
    """

    def __init__(self, names: Sequence[str], codes: NDArray[np.int32]) -> None:
        self.names, self.codes = tuple(names), codes

    @classmethod
    def of(cls, names: Sequence[str], known: dict[str, int] | None = None) -> "Coded":
        """From the names themselves; `known` has numbers already, and learns the new ones."""
        if isinstance(names, Coded):
            return names
        numbers = {} if known is None else known
        codes = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int32, len(names))
        return cls(tuple(numbers), codes)

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Coded": ...
    def __getitem__(self, index: int | slice) -> "str | Coded":
        if isinstance(index, slice):
            return Coded(self.names, self.codes[index])
        return self.names[int(self.codes[index])]


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

    def written(self, learned: Sequence[str] | None) -> Iterator[str]:
        """Of each row its texts, and what is learned of it."""
        for text, goal, other in zip(self.texts, learned or self.texts, self.others or ("",) * len(self)):
            yield f"{len(text)}:{text}{len(goal)}:{goal}{len(other)}:{other}"

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
        return Rows(at(self.texts, indices), labels, self.source, at(self.lines, indices), others)

    def encoded(self) -> Iterator[str]:
        """Texts and label of each row."""
        return self.written(self.labels)

    def about(self) -> str:
        """How many labels, and the first row."""
        labels = self.labels or ("",)
        return f"{len(set(labels))} labels; {self.shown()} -> {labels[0]}"

    def classes(self) -> tuple[str, ...] | None:
        """The labels."""
        return self.labels

    def faults(self, valid: "Rows", test: "Rows") -> list[str]:
        """Labels must be everywhere, of more than one class, and none unseen in training."""
        if unlike := self.unlike(valid, test):
            return unlike
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
        return faults


@overload
def at(values: tuple[T, ...], indices: Sequence[int]) -> tuple[T, ...]: ...
@overload
def at(values: None, indices: Sequence[int]) -> None: ...
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
        return in_order(self.train.core.classes() or ())

    @property
    def n_leaks(self) -> int:
        """Inputs of training rows that held-out rows have too."""
        held = np.concatenate([self.valid.keys(), self.test.keys()])
        return len(np.intersect1d(self.train.keys(), held))

    def checked(self) -> Self:
        """Itself, if it can be learned from; DataError with every reason why not."""
        faults = self.train.core.faults(self.valid.core, self.test.core)
        bad = [fault for fault in faults if isinstance(fault, BadRow)]
        whole = [fault for fault in faults if not isinstance(fault, BadRow)]
        if whole:
            raise DataError(listed([*whole, *bad], len(whole) + 5))
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
    rows = rows.divided()
    own = rows.parted(random.Random(seed), valid > 0, test > 0)
    if own is not None:
        return Splits(*rows.cut(*map(sorted, own)))  # type: ignore[arg-type]
    classes = Coded.of(rows.classes() or ("",) * len(rows))
    n_rows = np.bincount(classes.codes, minlength=len(classes.names))
    least = 1 + (valid > 0) + (test > 0)
    few = {name: n for name, n in zip(classes.names, n_rows.tolist()) if n < least}
    if few or not len(rows):
        name, n = next(iter(few.items()), ("", 0))
        raise DataError(
            f"'{rows.source}'{f': label {name!r}' if name else ''} has {n} row{'s' if n != 1 else ''}; at least "
            f"{least} are needed to split off rows to validate and test on; add rows, or give those parts as files of "
            "their own"
        )
    draw = random.Random(seed)
    goes = np.zeros(len(rows), dtype=np.int8)  # of each row the part: train, valid, test
    for places, units in _units(rows, classes):
        order = array("q", range(int(units[-1]) + 1))
        draw.shuffle(order)
        shuffled = np.asarray(order)
        n_valid, n_test = (max(1, round(len(order) * share)) if share else 0 for share in (valid, test))
        part = np.zeros(len(order), dtype=np.int8)
        part[shuffled[:n_valid]], part[shuffled[n_valid : n_valid + n_test]] = 1, 2
        goes[places] = part[units]
    return Splits(*rows.cut(*(positions(np.flatnonzero(goes == k)) for k in range(3))))  # type: ignore[arg-type]


def positions(found: Ints) -> Sequence[int]:
    """Whole numbers in an array, as a sequence of Python's."""
    return memoryview(found)  # type: ignore[arg-type]


def _units(rows: Part, classes: Coded) -> Iterator[tuple[Ints, Ints]]:
    """For each class its rows `(n,)`, and which of them must not be torn apart: the number of a unit each, rising."""
    keys, order = rows.keys(), np.argsort(classes.codes, kind="stable")
    ends = np.cumsum(np.bincount(classes.codes, minlength=len(classes.names)))
    for _, code in sorted(zip(classes.names, range(len(classes.names)))):
        places = order[ends[code - 1] if code else 0 : ends[code]]
        _, first, same = np.unique(keys[places], return_index=True, return_inverse=True)
        units = np.argsort(np.argsort(first))[same]  # by where they first stand
        by_unit = np.argsort(units, kind="stable")
        yield places[by_unit], units[by_unit] if len(first) >= _FEW_INPUTS else np.arange(len(places))
