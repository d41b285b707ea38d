"""The frozen prefix of a model, computed once: what enters the first block that learns, kept for every token.

One buffer for all texts of one part of the data, in memory or in a file. It belongs to one run: what is in it depends
on the base, the tokens, the dtype and the depth, all of which a run does not change.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_PIECE = 1 << 20  # bytes


class Prefix:
    """States `(tokens, d)` of texts with these `lengths`. With `file` they lie in a mapped file of just that size.

    Raises OSError, before anything is written to it, if the disk has no room for the file.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, file: Path | None = None) -> None:
        self.starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=self.starts[1:])
        self.known = torch.zeros(len(lengths), dtype=torch.bool)
        n = int(self.starts[-1])
        self.file = file
        if file is None:
            self.states = torch.empty(n, width, dtype=dtype)
            return
        try:
            with file.open("wb") as stream:  # a mapped page that the disk has no room for would kill the process
                _take(stream, max(1, n * width * dtype.itemsize))
        except OSError:
            file.unlink(missing_ok=True)
            raise
        self.states = torch.from_file(str(file), shared=True, size=n * width, dtype=dtype).view(n, width)

    @staticmethod
    def size(lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
        """Bytes that it would take."""
        return sum(lengths) * width * dtype.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that it comes to take; none if they lie in a file, whose pages the system can take back."""
        return 0 if self.file else self.states.nbytes

    def has(self, texts: Sequence[int]) -> bool:
        """All of these texts are in it."""
        return bool(self.known[list(texts)].all())

    def get(self, texts: Sequence[int]) -> Tensor:
        """Their rows, end to end."""
        return torch.cat([self.states[self.starts[i] : self.starts[i + 1]] for i in texts])

    def put(self, texts: Sequence[int], rows: Tensor) -> None:
        """Keeps their rows, given end to end."""
        begin = 0
        for i in texts:
            first, end = int(self.starts[i]), int(self.starts[i + 1])
            self.states[first:end] = rows[begin : begin + end - first]
            begin += end - first
        self.known[list(texts)] = True

    def close(self) -> None:
        """Forgets everything, and removes the file."""
        del self.states
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _take(stream: BinaryIO, n_bytes: int) -> None:
    """Room on the disk for the whole file; OSError where there is not enough."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, n_bytes)
        return
    for begin in range(0, n_bytes, _PIECE):  # macOS has no such call
        stream.write(bytes(min(_PIECE, n_bytes - begin)))
