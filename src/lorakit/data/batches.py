"""What is trained on, ready for the model; which examples each step takes, in an order that a seed and an epoch fix.

Texts are tokens laid end to end. A task with other data (images, pairs of source and target ...) brings Examples and a
Batch of its own; the loop knows no more of them than stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, overload

import torch
from torch import Tensor

from lorakit.data.ragged import Ragged
from lorakit.trunk import Segments

_WINDOW = 16  # batches whose texts are sorted by length together: little padding, still a random order
IGNORED = -100  # a label that is none


class Batch(ABC):
    """Some examples for one pass. `examples` are their places in the data, `labels` all that is to be learned."""

    examples: tuple[int, ...]
    labels: Tensor

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """What it costs, in tokens; padding is none."""

    @abstractmethod
    def hidden(self, trunk: Any, prefix: Any = None) -> Any:
        """What the trunk makes of it, for the task to read."""


class Examples(ABC):
    """All examples of one part of the data, in its order. `lines` are row numbers, for messages; `pad` fills rows."""

    lines: Sequence[int]
    pad: int = 0
    extra: int = 0  # rows that a prompt puts in front of each text

    def __len__(self) -> int:
        return len(self.lines)

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """What each example costs, in tokens."""

    def begin(self, seed: int, epoch: int) -> None:  # noqa: B027  # most have nothing to draw
        """Draws what is drawn anew for every epoch of training; it depends on seed and epoch only."""

    @abstractmethod
    def n_labels(self, indices: Sequence[int]) -> int:
        """Labels of these examples that count in the loss."""

    @abstractmethod
    def gather(self, indices: Sequence[int]) -> Batch:
        """The examples at these places."""

    def for_step(self, indices: Sequence[int], seed: int) -> "Examples":
        """The examples as the passes of a step on these see them: with what is drawn for the step, or shared in it."""
        return self

    @property
    def text_lengths(self) -> list[int]:
        """Rows of every text whose frozen states may be kept over the epochs; none if that is not to be."""
        return []


class Tokens(Examples):
    """Token ids of every text; what is to be learned of each; and which of its tokens are read for that.

    `labels[i]` are the labels of text i and `reads[i]` the places in it (rising) whose hidden states answer them; empty
    `reads` means that all tokens are read together (pooled by their mean). `each` texts that follow each other make one
    example (a pair, a triple), which has a line of its own. `types`, where given, are the token types of every text
    (BERT: first or second of two), `sizes` its bytes, where a metric counts them.
    """

    PARTS = ("ids", "labels", "reads", "types", "sizes")  # of which the last two may be missing
    held: object = None  # what lives as long as they do: the lock of their files

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels: Sequence[Sequence[float]],
        reads: Sequence[Sequence[int]],
        lines: Sequence[int],
        pad: int,
        types: Sequence[Sequence[int]] = (),
        each: int = 1,
        sizes: Sequence[Sequence[int]] = (),
    ) -> None:
        self.ids, self.labels, self.reads = Ragged.of(ids), Ragged.of(labels), Ragged.of(reads)
        self.types, self.sizes = (Ragged.of(given) if len(given) else None for given in (types, sizes))
        self.lines = lines if isinstance(lines, memoryview) else tuple(lines)
        self.pad, self.each = pad, each

    @classmethod
    def of(cls, parts: Mapping[str, Ragged], lines: Sequence[int], pad: int, each: int) -> Self:
        """The inverse of `parts`."""
        ids, labels, reads, types, sizes = (parts.get(name, ()) for name in cls.PARTS)
        return cls(ids, labels, reads, lines, pad, types, each, sizes)  # type: ignore[arg-type]

    @property
    def parts(self) -> dict[str, Ragged]:
        """What there is of `PARTS`, by name."""
        own = {name: getattr(self, name) for name in self.PARTS}
        return {name: part for name, part in own.items() if part is not None}

    @cached_property
    def text_lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.ids.lengths

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example, and what stands in front of them."""
        lengths = [n + self.extra for n in self.text_lengths] if self.extra else self.text_lengths
        if self.each == 1:
            return lengths
        return [sum(lengths[k * self.each : (k + 1) * self.each]) for k in range(len(self))]

    def texts(self, indices: Sequence[int]) -> list[int]:
        """Places of the texts of these examples."""
        return [i * self.each + k for i in indices for k in range(self.each)]

    def n_labels(self, indices: Sequence[int]) -> int:
        """Labels of these examples that count in the loss."""
        return int((self.labels.rows(self.texts(indices)) != IGNORED).sum())

    def gather(self, indices: Sequence[int]) -> "TextBatch":
        """The texts of these examples, end to end."""
        texts = self.texts(indices)
        segments = Segments.of([self.ids.length(i) for i in texts])
        labels, reads = self.labels.rows(texts), self.reads.rows(texts)
        if len(reads):
            n_reads = torch.tensor([self.reads.length(i) for i in texts])
            reads += torch.repeat_interleave(segments.starts[:-1], n_reads)
        types = None if self.types is None else self.types.rows(texts)
        read = reads if len(reads) else None
        return TextBatch(self.ids.rows(texts), segments, labels, read, tuple(indices), tuple(texts), types)


@dataclass(frozen=True)
class TextBatch(Batch):
    """Texts end to end: `ids (tokens,)`, `segments`, all `labels (labels,)`, and the row of each read or None for all.

    `texts` are the places of the texts in the data, `types (tokens,)` their token types.
    """

    ids: Tensor
    segments: Segments
    labels: Tensor
    reads: Tensor | None
    examples: tuple[int, ...]
    texts: tuple[int, ...]
    types: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens, of which none is padding."""
        return self.ids.numel()

    @property
    def n_reads(self) -> list[int]:
        """How many rows of each text are read."""
        if self.reads is None:
            return [int(n) for n in self.segments.lengths]
        counts: list[int] = torch.bincount(self.segments.owners()[self.reads], minlength=len(self.segments)).tolist()
        return counts

    def hidden(self, trunk: Any, prefix: Any = None) -> Tensor:
        """States of all tokens, or only of those that are read: `(tokens or reads, d)`."""
        states: Tensor = trunk.hidden(self.ids, self.segments, self.reads, prefix, self.texts, self.types)
        return states


class Batches(Sequence[tuple[int, ...]]):
    """Places of the examples of every batch: those from each of `begins` on in `order (n,)`, `size` of them or what is
    left. In arrays, for tuples of all would take more memory than tokens on disk."""

    def __init__(self, order: Tensor, size: int, begins: Sequence[int]) -> None:
        self._order, self._size, self._begins = order, size, begins

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> "Batches": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, ...] | Batches":
        if isinstance(index, slice):
            return Batches(self._order, self._size, self._begins[index])
        begin = self._begins[index]
        return tuple(self._order[begin : begin + self._size].tolist())


def training_batches(examples: Examples, size: int, seed: int, epoch: int, by_length: bool) -> Batches:
    """Places of every batch of one epoch: shuffled; if they are to be padded, grouped by length within windows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator)
    begins = range(0, len(order), size)
    if not by_length:
        return Batches(order, size, begins)
    for begin in range(0, len(order), size * _WINDOW):
        window = order[begin : begin + size * _WINDOW]
        window.copy_(torch.tensor(sorted(window.tolist(), key=examples.lengths.__getitem__)))
    shuffled = torch.randperm(len(begins), generator=generator).tolist()
    return Batches(order, size, [begins[i] for i in shuffled])


def passes(examples: Examples, indices: Sequence[int], most: int) -> list[list[int]]:
    """One batch in parts of at most `most` tokens (a longer example goes alone), its examples sorted by length."""
    lengths = examples.lengths
    parts: list[list[int]] = []
    room = 0
    for i in sorted(sorted(indices), key=lengths.__getitem__):
        if not parts or lengths[i] > room:
            parts.append([])
            room = most
        parts[-1].append(i)
        room -= lengths[i]
    return parts
