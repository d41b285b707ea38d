"""Batches of tokens: texts of like length together, in an order that a seed and an epoch fix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.data.rows import Rows
from lorakit.errors import DataError

_WINDOW = 16  # batches whose texts are sorted by length together: little padding, still a random order


@dataclass(frozen=True)
class Tokens:
    """Token ids of every text, ragged, and the label index of each (-1 where there is none)."""

    ids: tuple[tuple[int, ...], ...]
    labels: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """`ids` and `mask` are (n, longest); `labels` (n,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    indices: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.mask.sum())


def tokenize(rows: Rows, tokenizer: object, labels: Sequence[str], max_length: int, truncate: bool) -> Tokens:
    """Token ids of all rows. A text longer than `max_length` tokens is an error unless `truncate`."""
    encoded = tokenizer(list(rows.texts), truncation=truncate, max_length=max_length if truncate else None)  # type: ignore[operator]
    ids = tuple(tuple(entry) for entry in encoded["input_ids"])
    long = [(line, len(entry)) for line, entry in zip(rows.lines, ids) if len(entry) > max_length]
    if long:
        line, n = max(long, key=lambda pair: pair[1])
        raise DataError(
            f"'{rows.source}': {len(long)} of {len(ids)} texts are longer than {max_length} tokens, the longest in row "
            f"{line} with {n}; shorten them, or pass --truncate to cut them"
        )
    index = {label: number for number, label in enumerate(labels)}
    numbers = [index.get(label, -1) for label in rows.labels or ("",) * len(rows)]
    pad = tokenizer.pad_token_id  # type: ignore[attr-defined]
    return Tokens(ids, torch.tensor(numbers), 0 if pad is None else int(pad))


def gather(tokens: Tokens, indices: Sequence[int]) -> Batch:
    """The texts at these positions, padded to the longest of them."""
    longest = max(len(tokens.ids[i]) for i in indices)
    ids = torch.full((len(indices), longest), tokens.pad, dtype=torch.long)
    mask = torch.zeros(len(indices), longest, dtype=torch.long)
    for row, index in enumerate(indices):
        entry = tokens.ids[index]
        ids[row, : len(entry)] = torch.tensor(entry)
        mask[row, : len(entry)] = 1
    return Batch(ids, mask, tokens.labels[list(indices)], tuple(indices))


def training_batches(tokens: Tokens, size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Positions of every batch of one epoch: shuffled, grouped by length within windows, batches shuffled again."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(tokens), generator=generator).tolist()
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW], key=lambda i: len(tokens.ids[i]))
        batches += [tuple(window[i : i + size]) for i in range(0, len(window), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def plain_batches(tokens: Tokens, size: int) -> Iterator[Batch]:
    """All texts once, by length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens.ids[i]))
    for start in range(0, len(order), size):
        yield gather(tokens, order[start : start + size])
