"""What a task is: from rows to tokens with labels, from hidden states to a loss, from scores to metrics.

The engine (trunk/, fit/) knows no task; a task knows no batch size, no dtype, no optimizer. A new one is one file.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lorakit.data.batches import Batch, Tokens
from lorakit.data.rows import Rows
from lorakit.errors import DataError


class Task(ABC):
    """One kind of job. Class attributes: `name`, and `head`, the module that is trained fully beside the adapter."""

    name: ClassVar[str]
    head: ClassVar[str] = ""
    metric: ClassVar[str]

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk what it needs beside it (a head); what is there already is left as it is."""

    @abstractmethod
    def tokens(self, rows: Rows, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids and labels of all rows. DataError names every row that cannot be used."""

    @abstractmethod
    def loss(self, model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """The sum of the losses of all labels of the batch, in nats. `hidden (tokens, d)`, or `(reads, d)` of reads."""

    @abstractmethod
    def scores(self, model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """What the metrics need of each text: `(texts, k)`, float32."""

    @abstractmethod
    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """Metrics over all rows from `scores (rows, k)`; `loss` is among them."""

    @abstractmethod
    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""

    @classmethod
    @abstractmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Task":
        """The inverse of `note`."""

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """A higher metric; the lower loss decides between equals."""
        return old is None or (new[self.metric], -new["loss"]) > (old[self.metric], -old["loss"])


def refuse_long(rows: Rows, ids: Sequence[Sequence[int]], max_length: int) -> None:
    """DataError if a text has more tokens than the model has positions."""
    long = [(line, len(entry)) for line, entry in zip(rows.lines, ids) if len(entry) > max_length]
    if long:
        line, n = max(long, key=lambda pair: pair[1])
        raise DataError(
            f"'{rows.source}': {len(long)} of {len(ids)} texts are longer than {max_length} tokens, the longest in row "
            f"{line} with {n}; shorten them, or pass --truncate to cut them"
        )
