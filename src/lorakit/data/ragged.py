"""Rows of numbers, each as long as it is, end to end in one array: a tenth of the memory of tuples, quick to gather.

The array may lie in a file that is only mapped into memory.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

Row = tuple[float, ...]


class Ragged(Sequence[Row]):
    """`values (numbers,)`, int32 or float32, and `starts (rows + 1,)`, int64: where each row begins.

    >>> rows = Ragged.of([(1, 2), (), (3,)])
    >>> rows[0], len(rows), rows.lengths, rows.rows([2, 0])
    ((1, 2), 3, [2, 0, 1], tensor([3, 1, 2]))
    """

    def __init__(self, values: Tensor, starts: Tensor) -> None:
        self.values, self.starts = values, starts
        self._ends = memoryview(starts.numpy())  # type: ignore[arg-type]

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]]) -> "Ragged":
        """From rows of whole numbers, or of floats; what is one already is taken as it is."""
        if isinstance(rows, Ragged):
            return rows
        ends, numbers, parts = array("q", [0]), array("i"), array("f")
        for row in rows:
            whole = not parts and all(isinstance(number, int) for number in row)
            if not whole and numbers:
                parts, numbers = array("f", numbers), array("i")
            (numbers if whole else parts).extend(row)  # type: ignore[arg-type]
            ends.append(len(numbers) + len(parts))
        found = parts or numbers
        kind = torch.float32 if parts else torch.int32
        values = torch.frombuffer(found, dtype=kind) if found else torch.empty(0, dtype=kind)
        return cls(values, torch.frombuffer(ends, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = index % len(self)
        return tuple(self.values[self._ends[i] : self._ends[i + 1]].tolist())

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return torch.equal(self.starts, other.starts) and torch.equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> list[int]:
        """Numbers in each row."""
        lengths: list[int] = self.starts.diff().tolist()
        return lengths

    def length(self, index: int) -> int:
        """Numbers in one row."""
        return self._ends[index + 1] - self._ends[index]

    def rows(self, indices: Sequence[int]) -> Tensor:
        """These rows end to end, int64 or float32."""
        parts = [self.values[self._ends[i] : self._ends[i + 1]] for i in indices]
        found = torch.cat(parts) if parts else self.values[:0]
        return found if found.is_floating_point() else found.long()
