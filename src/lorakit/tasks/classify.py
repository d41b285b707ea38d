"""classify: one label for each text. A linear head on the pooled vector of the trunk, trained fully beside the adapter.

The head is a child of the trunk called `classifier`, so the layer paths of the adapter are those of the plain
pretrained model, and the head travels with the adapter as a fully trained module (PEFT: modules_to_save).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED, Batch, Tokens
from lorakit.data.rows import Rows
from lorakit.errors import UsageError
from lorakit.tasks.task import Task, refuse_long
from lorakit.trunk import Segments

HEAD = "classifier"


@dataclass(frozen=True)
class Classify(Task):
    """Labels in the order of the head's outputs, and how the trunk is pooled."""

    name = "classify"
    head = HEAD
    metric = "accuracy"

    labels: tuple[str, ...]
    pool: str = "mean"
    max_length: int = 512

    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk its head; one of the right size is left as it is.

        It begins at zero: every label equally probable, so nothing is known before training and the first loss is
        `ln(labels)`.
        """
        head = getattr(model, HEAD, None)
        if isinstance(head, nn.Linear) and head.out_features == len(self.labels):
            return
        if head is not None:
            raise UsageError(
                f"this {type(model).__name__} has a '{HEAD}' of its own that does not give {len(self.labels)} labels; "
                "pass the bare trunk (AutoModel)"
            )
        width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        fresh = nn.Linear(width, len(self.labels))
        with torch.no_grad():
            fresh.weight.zero_()
            fresh.bias.zero_()
        parameter = next(model.parameters())
        model.add_module(HEAD, fresh.to(parameter.device, parameter.dtype))

    def tokens(self, rows: Rows, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows, one label each (-100 where it is unknown)."""
        encoded = tokenizer(list(rows.texts), truncation=truncate, max_length=self.max_length if truncate else None)
        ids = tuple(tuple(entry) for entry in encoded["input_ids"])
        refuse_long(rows, ids, self.max_length)
        index = {label: number for number, label in enumerate(self.labels)}
        numbers = tuple((index.get(label, IGNORED),) for label in rows.labels or ("",) * len(rows))
        reads = tuple({"cls": (0,), "last": (len(entry) - 1,), "mean": ()}[self.pool] for entry in ids)
        return Tokens(ids, numbers, reads, rows.lines, tokenizer.pad_token_id or 0)

    def scores(self, model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """The logits `(texts, labels)`, float32."""
        vectors = hidden.float() if batch.reads is not None else mean_of_segments(hidden, batch.segments)
        logits: Tensor = model.get_submodule(HEAD)(vectors)
        return logits

    def loss(self, model: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
        """Summed cross-entropy in nats."""
        logits = self.scores(model, hidden, batch)
        return F.cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """Accuracy, macro F1 (labels that occur), mean loss."""
        guess, labels = scores.argmax(-1), torch.tensor([label for (label,) in tokens.labels])
        found = [f1 for f1 in (_f1(guess, labels, k) for k in range(len(self.labels))) if f1 is not None]
        return {
            "accuracy": float((guess == labels).double().mean()),
            "macro_f1": sum(found) / len(found),
            "loss": float(F.cross_entropy(scores, labels)),
        }

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {"name": self.name, "labels": list(self.labels), "pool": self.pool, "max_length": self.max_length}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Classify":
        """The inverse of `note`."""
        return cls(tuple(note["labels"]), note["pool"], int(note["max_length"]))


def mean_of_segments(hidden: Tensor, segments: Segments) -> Tensor:
    """The mean hidden state of each text: `hidden (tokens, d)` -> `(texts, d)`, summed in float32."""
    owners = segments.owners().to(hidden.device)
    total = torch.zeros(len(segments), hidden.shape[1], device=hidden.device).index_add(0, owners, hidden.float())
    return total / segments.lengths.to(hidden.device)[:, None]


def _f1(guess: Tensor, labels: Tensor, k: int) -> float | None:
    hits = int(((guess == k) & (labels == k)).sum())
    said, true = int((guess == k).sum()), int((labels == k).sum())
    return None if true == 0 and said == 0 else 2 * hits / (said + true)


def bootstrap(correct: Sequence[bool], n_draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over examples (Efron, 1979)."""
    values = np.asarray(correct, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (n_draws, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
