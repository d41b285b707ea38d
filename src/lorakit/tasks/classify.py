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

from lorakit.data.batches import Batch
from lorakit.errors import UsageError
from lorakit.tasks.base import pooled

HEAD = "classifier"


@dataclass(frozen=True)
class Classify:
    """Labels in the order of the head's outputs, and how the trunk is pooled."""

    labels: tuple[str, ...]
    pool: str = "mean"
    max_length: int = 512
    name: str = "classify"

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

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`(n, labels)`, float32."""
        hidden = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        return model.get_submodule(HEAD)(pooled(hidden, batch.mask, self.pool)).float()  # type: ignore[no-any-return]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(logits, labels)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, macro F1 (labels that occur), mean loss."""
        guess = logits.argmax(-1)
        scores = [f1 for f1 in (_f1(guess, labels, k) for k in range(len(self.labels))) if f1 is not None]
        return {
            "accuracy": float((guess == labels).double().mean()),
            "macro_f1": sum(scores) / len(scores),
            "loss": float(F.cross_entropy(logits, labels)),
        }

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """Higher accuracy; the lower loss decides between equals."""
        return old is None or (new["accuracy"], -new["loss"]) > (old["accuracy"], -old["loss"])

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {"name": self.name, "labels": list(self.labels), "pool": self.pool, "max_length": self.max_length}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Classify":
        """The inverse of `note`."""
        return cls(tuple(note["labels"]), note["pool"], int(note["max_length"]))


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
