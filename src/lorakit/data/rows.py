"""Rows: texts with labels, and the three parts of a data set. Values; where they come from is `sources.py`."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import DataError, listed


@dataclass(frozen=True)
class Rows:
    """`texts` and, where known, one label each. `lines` are the row numbers in `source`, for messages."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        kinds = f", {len(set(self.labels))} labels" if self.labels else ", no labels"
        return f"Rows({len(self)} texts{kinds}, '{self.source}')"

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at these positions."""
        labels = tuple(self.labels[i] for i in indices) if self.labels is not None else None
        return Rows(tuple(self.texts[i] for i in indices), labels, self.source, tuple(self.lines[i] for i in indices))

    def digest(self) -> str:
        """A hash of texts and labels, in their order."""
        digest = hashlib.sha256()
        for text, label in zip(self.texts, self.labels or self.texts):
            digest.update(f"{len(text)}:{text}{len(label)}:{label}".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """Rows to learn from, to choose by, and to report on."""

    train: Rows
    valid: Rows
    test: Rows

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training rows, sorted (numbers by value)."""
        found = set(self.train.labels or ())
        return tuple(sorted(found, key=lambda label: (not label.lstrip("-").isdigit(), _number(label), label)))

    def checked(self) -> "Splits":
        """Itself, if it can be learned from: labels everywhere, more than one class, none unseen in training."""
        faults = [
            f"'{part.source}' has no labels" for part in (self.train, self.valid, self.test) if part.labels is None
        ]
        known = set(self.labels)
        if not faults and len(known) < 2:
            only = next(iter(known), "nothing")
            faults.append(f"'{self.train.source}' has one class only ('{only}'); at least two are needed to learn from")
        for part in (self.valid, self.test):
            for label, line in zip(part.labels or (), part.lines):
                if known and label not in known:
                    faults.append(
                        f"'{part.source}' row {line}: label '{label}' does not occur in the training rows; "
                        "add examples of it there, or remove the row"
                    )
        if faults:
            raise DataError(listed(faults))
        return self


def _number(label: str) -> int:
    return int(label) if label.lstrip("-").isdigit() else 0


def split(rows: Rows, seed: int = 0, valid: float = 0.1, test: float = 0.1) -> Splits:
    """Splits one table at random within each label; every part gets at least one row of a label with 3 rows or more."""
    if rows.labels is None:
        raise DataError(f"'{rows.source}' has no labels, so it cannot be split for learning")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(rows.labels):
        groups[label].append(index)
    least = 1 + (valid > 0) + (test > 0)
    few = {label: n for label, n in Counter(rows.labels).items() if n < least}
    if few:
        label, n = next(iter(few.items()))
        raise DataError(
            f"'{rows.source}': label '{label}' has {n} row{'s' if n > 1 else ''}; at least {least} are needed to split "
            "off rows to validate and test on; add rows, or give those parts as files of their own"
        )
    draw = random.Random(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in sorted(groups):
        members = groups[label]
        draw.shuffle(members)
        n_valid, n_test = (max(1, round(len(members) * share)) if share else 0 for share in (valid, test))
        parts[1].extend(members[:n_valid])
        parts[2].extend(members[n_valid : n_valid + n_test])
        parts[0].extend(members[n_valid + n_test :])
    return Splits(*(rows.take(sorted(part)) for part in parts))
