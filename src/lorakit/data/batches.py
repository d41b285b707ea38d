"""Batches of tokens: which rows each step takes, in an order that a seed and an epoch fix; laid end to end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.trunk import Segments

_WINDOW = 16  # batches whose texts are sorted by length together: little padding, still a random order
IGNORED = -100  # a label that is none


@dataclass(frozen=True)
class Tokens:
    """Token ids of every text, ragged; what is to be learned of each; and which of its tokens are read for that.

    `labels[i]` are the labels of text i and `reads[i]` as many places in it whose hidden state answers them; empty
    `reads` means that all tokens are read together (pooled by their mean). `lines` are row numbers, for messages.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    lines: tuple[int, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(entry) for entry in self.ids]

    def n_labels(self, indices: Sequence[int]) -> int:
        """Labels of these texts that count in the loss."""
        return sum(label != IGNORED for i in indices for label in self.labels[i])


@dataclass(frozen=True)
class Batch:
    """Texts end to end: `ids (tokens,)`, `segments`, all `labels (labels,)`, and the row of each read or None for all.

    `indices` are the places of the texts in the data.
    """

    ids: Tensor
    segments: Segments
    labels: Tensor
    reads: Tensor | None
    indices: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens, of which none is padding."""
        return self.ids.numel()


def gather(tokens: Tokens, indices: Sequence[int]) -> Batch:
    """The texts at these places, end to end."""
    segments = Segments.of([len(tokens.ids[i]) for i in indices])
    ids = torch.tensor([token for i in indices for token in tokens.ids[i]], dtype=torch.int64)
    labels = torch.tensor([label for i in indices for label in tokens.labels[i]], dtype=torch.int64)
    reads = None
    if any(tokens.reads[i] for i in indices):
        begins = segments.starts.tolist()
        reads = torch.tensor([begin + place for begin, i in zip(begins, indices) for place in tokens.reads[i]])
    return Batch(ids, segments, labels, reads, tuple(indices))


def training_batches(tokens: Tokens, size: int, seed: int, epoch: int, by_length: bool) -> list[tuple[int, ...]]:
    """Places of every batch of one epoch: shuffled; if they are to be padded, grouped by length within windows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(tokens), generator=generator).tolist()
    if not by_length:
        return [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW], key=lambda i: len(tokens.ids[i]))
        batches += [tuple(window[i : i + size]) for i in range(0, len(window), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def passes(tokens: Tokens, indices: Sequence[int], most: int) -> list[list[int]]:
    """One batch in parts of at most `most` tokens (a longer text goes alone), its texts sorted by length."""
    parts: list[list[int]] = []
    room = 0
    for i in sorted(indices, key=lambda i: (len(tokens.ids[i]), i)):
        length = len(tokens.ids[i])
        if not parts or length > room:
            parts.append([])
            room = most
        parts[-1].append(i)
        room -= length
    return parts


def plain_batches(tokens: Tokens, most: int, indices: Sequence[int]) -> Iterator[Batch]:
    """These texts once, by length, at most `most` tokens at a time."""
    for part in passes(tokens, indices, most):
        yield gather(tokens, part)
