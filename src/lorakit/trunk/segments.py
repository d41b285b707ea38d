"""Segments: where each text begins among rows that stand one after the other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NOW: ContextVar["Segments | None"] = ContextVar("segments", default=None)


@dataclass(frozen=True)
class Before:
    """Keys and values in front of every text: `states (p, layers, 2, heads, head)`.

    `order (rows,)`: of the p for every text, and then all rows of the texts, those of each text behind its own p;
    `starts`: where each begins among these; `places`: where each row of the texts stands in its own.
    """

    states: Tensor
    order: Tensor
    starts: Tensor
    places: Tensor

    @classmethod
    def of(cls, states: Tensor, segments: "Segments") -> "Before":
        """In front of these segments."""
        p, t = len(states), len(segments)
        order = in_front(torch.arange(p * t, p * t + segments.n_tokens), segments, torch.arange(p * t))
        starts = segments.starts + p * torch.arange(t + 1)
        return cls(states, order.to(states.device), starts, segments.positions() + p)

    def joined(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`k` and `v (h, n, d)` with those of a layer in front of each text."""
        states, t = self.states[:, layer].permute(1, 2, 0, 3).to(k.dtype), len(self.starts) - 1
        copies = states.unsqueeze(2).expand(-1, -1, t, -1, -1).flatten(2, 3)  # whose gradients are summed in float32
        keys, values = (torch.cat([x, y], 1).index_select(1, self.order) for x, y in zip(copies, (k, v)))
        return keys, values


@dataclass(frozen=True)
class Segments:
    """`starts (texts + 1,)`, int64, on the CPU: the first row of each text, and the number of rows.

    For a decoder `sources` are the segments of what was encoded: those that its cross-attention looks at. `before` are
    keys and values in front of each text.
    """

    starts: Tensor
    n_calls: list[int] = field(default_factory=lambda: [0], compare=False)  # of attention, inside these
    sources: "Segments | None" = None
    before: Before | None = None

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

    def wider(self, v: int) -> "Segments":
        """With `v` more rows in front of each text."""
        return Segments(self.starts + v * torch.arange(len(self.starts)), self.n_calls)

    def firsts(self, v: int) -> Tensor:
        """The first `v` rows of each text: `(texts * v,)`."""
        return (self.starts[:-1, None] + torch.arange(v)).flatten()

    def padded(self, flat: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """One row a text, filled up to the longest: `flat (rows,)` -> `(texts, longest)`, and its mask (1: real)."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest) < self.lengths[:, None]
        rows = torch.full(mask.shape, fill, dtype=flat.dtype)
        rows[mask] = flat
        return rows, mask.long()


def in_front(flat: Tensor, segments: Segments, front: Tensor) -> Tensor:
    """Rows of texts `(n,)` with those of `front (texts * v,)` before each text: `(n + texts * v,)`."""
    v = len(front) // len(segments)
    wide = segments.wider(v)
    found = flat.new_empty(wide.n_tokens)
    found[own_rows(segments, v)] = flat
    found[wide.firsts(v)] = front.to(flat.dtype)
    return found


def own_rows(segments: Segments, v: int) -> Tensor:
    """Where the rows of the texts are, once `v` more stand in front of each: `(n,)`."""
    return torch.arange(segments.n_tokens) + v * (segments.owners() + 1)


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
