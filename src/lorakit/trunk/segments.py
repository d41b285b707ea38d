"""Segments: where each text begins among rows that stand one after the other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NOW: ContextVar["Segments | None"] = ContextVar("segments", default=None)


@dataclass(frozen=True)
class Segments:
    """`starts (texts + 1,)`, int64, on the CPU: the first row of each text, and the number of rows.

    For a decoder `sources` are the segments of what was encoded: those that its cross-attention looks at.
    """

    starts: Tensor
    n_calls: list[int] = field(default_factory=lambda: [0], compare=False)  # of attention, inside these
    sources: "Segments | None" = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """From the number of tokens of each text."""
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=starts[1:])
        return cls(starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text (texts,)."""
        return self.starts.diff()

    @property
    def n_tokens(self) -> int:
        """Rows in all."""
        return int(self.starts[-1])

    def owners(self) -> Tensor:
        """The text that each row belongs to (rows,)."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def positions(self) -> Tensor:
        """The place of each row in its text (rows,), from 0."""
        return torch.arange(self.n_tokens) - self.starts[self.owners()]

    def padded(self, flat: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """One row a text, filled up to the longest: `flat (rows,)` -> `(texts, longest)`, and its mask (1: real)."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest) < self.lengths[:, None]
        rows = torch.full(mask.shape, fill, dtype=flat.dtype)
        rows[mask] = flat
        return rows, mask.long()


@contextmanager
def inside(now: Segments) -> Iterator[None]:
    """Within the block, attention stays inside these segments."""
    token = _NOW.set(now)
    try:
        yield
    finally:
        _NOW.reset(token)


def current() -> Segments | None:
    """The segments of the block that is running."""
    return _NOW.get()
