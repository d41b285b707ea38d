"""Pairs of user and item, ready for a model that scores them: what a step is shown, and what a user had already.

The negatives of a step are the items of all its pairs (so popular ones come as often as they are had) and `UNIFORM`
uniform draws, each item once. They are drawn by the seed and the places of the step's pairs, which seed and epoch fix:
a step taken again, in other passes or by several processes, has the very same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.data.batches import Batch, Examples

UNIFORM = 512
_USUAL = 1024  # pairs in a step
_GRAIN = 64  # few sizes: oneDNN keeps a kernel for each, the process memory for each
_COST = 4  # of a pair, in tokens: passes of at most 1,024 pairs


class Seen:
    """What every user had: `pairs (n, 2)`, sorted by user."""

    def __init__(self, pairs: np.ndarray[Any, Any], n_users: int) -> None:
        users, self.items = pairs.T
        self._starts = np.searchsorted(users, np.arange(n_users + 1))

    def of(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Places of what these users had: positions in `users`, and items."""
        numbers = users.numpy()
        starts, counts = self._starts[numbers], self._starts[numbers + 1] - self._starts[numbers]
        rows = np.repeat(np.arange(len(numbers)), counts)
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return torch.from_numpy(rows), torch.from_numpy(self.items[np.repeat(starts, counts) + inside])


@dataclass(frozen=True)
class PairBatch(Batch):
    """`users (b,)` and `items (b,)`; the step's `candidates (c,)`, sorted; the items' places among them, `labels (b,)`.

    `log_odds (c,)` is the log of the probability that a candidate is one; infinite for those that only fill up.
    """

    users: Tensor
    items: Tensor
    candidates: Tensor
    log_odds: Tensor
    labels: Tensor
    examples: tuple[int, ...]
    pairs: "Pairs"

    @property
    def n_tokens(self) -> int:
        """What it costs."""
        return len(self.examples) * _COST

    def hidden(self, trunk: Any, prefix: Any = None) -> Any:
        """The model itself: what of it is called is the task's to say."""
        return trunk.model


@dataclass(frozen=True)
class Pairs(Examples):
    """Pairs `users (n,)`, `items (n,)`; what is not ranked, for it was `seen`; how often training has every item,
    `counts`.

    With `k` above 0 they are users who ask for so many items; `items` is empty then.
    """

    users: Tensor
    items: Tensor
    seen: Seen
    counts: Tensor
    lines: tuple[int, ...]
    k: int = 0

    @cached_property
    def lengths(self) -> list[int]:
        """What each costs."""
        return [_COST] * len(self)

    def n_labels(self, indices: Sequence[int]) -> int:
        """One each."""
        return len(indices)

    def for_step(self, indices: Sequence[int], seed: int) -> "Step":
        """The pairs with the negatives of this step."""
        return Step(self, *self._drawn(indices, seed, UNIFORM))

    def gather(self, indices: Sequence[int]) -> PairBatch:
        """These pairs against more uniform draws: a pass outside of steps costs what one in a step will."""
        if self.k:
            none = self.items
            return PairBatch(self.users[list(indices)], none, none, none, none, tuple(indices), self)
        return Step(self, *self._drawn(indices, 0, UNIFORM + _USUAL)).gather(indices)

    def _drawn(self, indices: Sequence[int], seed: int, n_uniform: int) -> tuple[Tensor, Tensor]:
        places = np.asarray(indices, dtype="<i8")
        digest = hashlib.blake2b(seed.to_bytes(8, "big") + places.tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        n_items = len(self.counts)
        uniform = torch.randint(n_items, (n_uniform,), generator=generator)
        candidates = torch.unique(torch.cat([self.items[torch.from_numpy(places)], uniform]))
        share = self.counts[candidates].double() / max(1.0, float(self.counts.sum()))
        missed = len(places) * torch.log1p(-share) + n_uniform * torch.log1p(torch.tensor(-1 / n_items).double())
        log_odds = torch.log(-torch.expm1(missed)).float()
        short = -len(candidates) % _GRAIN
        return torch.cat([candidates, candidates[-1:].expand(short)]), F.pad(log_odds, (0, short), value=torch.inf)


class Step(Examples):
    """The pairs as all passes of one step see them."""

    def __init__(self, pairs: Pairs, candidates: Tensor, log_odds: Tensor) -> None:
        self.pairs, self.candidates, self.log_odds = pairs, candidates, log_odds
        self.lines = pairs.lines

    @property
    def lengths(self) -> list[int]:
        """What each costs."""
        return self.pairs.lengths

    def n_labels(self, indices: Sequence[int]) -> int:
        """One each."""
        return len(indices)

    def gather(self, indices: Sequence[int]) -> PairBatch:
        """These pairs, against the step's candidates."""
        places = torch.from_numpy(np.asarray(indices, dtype=np.int64))  # torch is slow with sequences
        users, items = self.pairs.users[places], self.pairs.items[places]
        labels = torch.searchsorted(self.candidates, items)
        return PairBatch(users, items, self.candidates, self.log_odds, labels, tuple(indices), self.pairs)
