"""classify: one label for each text. A linear head on the pooled vector of the trunk, trained fully beside the adapter.

The head is a child of the trunk called `classifier`, so the layer paths of the adapter are those of the plain
pretrained model, and the head travels with the adapter as a fully trained module (PEFT: modules_to_save).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.rows import Rows, Splits
from lorakit.data.sources import load_rows
from lorakit.errors import DataError, UsageError, listed
from lorakit.tasks.base import Base
from lorakit.tasks.heads import give_head
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.task import TASKS, Scores, Task, refuse_long
from lorakit.trunk import Segments

HEAD = "classifier"


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text, and the probabilities of all."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics over rows; `accuracy_interval` is a 95 % bootstrap interval; `per_label` has counts and F1."""

    metrics: dict[str, float]
    accuracy_interval: tuple[float, float]
    n_rows: int
    per_label: dict[str, dict[str, float]]

    def __str__(self) -> str:
        low, high = self.accuracy_interval
        width = max(len(label) for label in self.per_label)
        lines = [
            f"accuracy {self.metrics['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"macro F1 {self.metrics['macro_f1']:.3f}, loss {self.metrics['loss']:.3f}, {self.n_rows} rows",
            "",
            f"{'label':<{width}}  rows  predicted     F1",
        ]
        lines += [
            f"{label:<{width}}  {values['rows']:4d}  {values['predicted']:9d}  {values['f1']:.3f}"
            for label, values in self.per_label.items()
        ]
        return "\n".join(lines)


@TASKS.add_class
@dataclass(frozen=True)
class Classify(Task):
    """Labels in the order of the head's outputs, and how the trunk is pooled."""

    name = "classify"
    part = Rows
    metric = "accuracy"
    drawn = "accuracy"
    head = HEAD
    wishes = ("pool",)
    columns = ("text", "label")
    try_it = "my parcel never came"

    labels: tuple[str, ...]
    pool: str = "mean"
    max_length: int = 512

    @classmethod
    def read(cls, source: Any, *, answers: bool = True, **columns: str | None) -> Rows:
        """Texts and labels of one table."""
        text, label = columns.get("text"), columns.get("label")
        if text and text == label:
            raise UsageError(f"--text and --label are both '{text}'; the label needs a column of its own")
        return load_rows(source, text=text, label=label, labels=answers)

    @classmethod
    def asked(cls, given: Sequence[str]) -> Rows:
        """Texts without labels."""
        rows = Rows(tuple(given), None, "texts", tuple(range(1, len(given) + 1)))
        empty = [line for text, line in zip(rows.texts, rows.lines) if not text.strip()]
        if empty:
            raise DataError(f"'{rows.source}': row {empty[0]} is empty")
        return rows

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Classify":
        """With the labels of the training rows, pooled as the base wants."""
        return cls(data.labels, base.pool, base.max_length)

    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk its head; one of the right size is left as it is.

        It begins at zero: every label equally probable, so nothing is known before training and the first loss is
        `ln(labels)`.
        """
        give_head(model, HEAD, len(self.labels))

    def examples(self, rows: Rows, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows, one label each (-100 where it is unknown)."""
        encoded = tokenizer(list(rows.texts), truncation=truncate, max_length=self.max_length if truncate else None)
        ids = tuple(tuple(entry) for entry in encoded["input_ids"])
        refuse_long(rows, rows.lines, ids, self.max_length)
        index = {label: number for number, label in enumerate(self.labels)}
        numbers = tuple((index.get(label, IGNORED),) for label in rows.labels or ("",) * len(rows))
        reads = tuple({"cls": (0,), "last": (len(entry) - 1,), "mean": ()}[self.pool] for entry in ids)
        return Tokens(ids, numbers, reads, rows.lines, tokenizer.pad_token_id or 0)

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """The logits `(texts, labels)`, float32."""
        vectors = hidden.float() if batch.reads is not None else mean_of_segments(hidden, batch.segments)
        logits: Tensor = model.get_submodule(HEAD)(vectors)
        return logits

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
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

    def predict(self, rows: Rows, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Prediction]:
        """The most probable label of each text."""
        logits = scores(self.examples(rows, base.tokenizer, truncate=truncate))
        result: list[Prediction] = []
        for text, row in zip(rows.texts, logits.softmax(-1).tolist()):
            best = max(range(len(row)), key=row.__getitem__)
            result.append(Prediction(text, self.labels[best], row[best], dict(zip(self.labels, row))))
        return result

    def evaluate(self, rows: Rows, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on labelled rows. DataError for labels it has not learned."""
        if rows.labels is None:
            raise DataError(f"'{rows.source}' has no labels to evaluate against")
        unseen = [
            f"'{rows.source}' row {line}: label '{label}' was not in the training data"
            for label, line in zip(rows.labels, rows.lines)
            if label not in self.labels
        ]
        if unseen:
            raise DataError(listed(unseen, 5))
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        logits = scores(tokens)
        guess, labels = logits.argmax(-1), torch.tensor([label for (label,) in tokens.labels])
        per_label: dict[str, Any] = {}
        for k, label in enumerate(self.labels):
            true, said, hits = (labels == k).sum(), (guess == k).sum(), ((labels == k) & (guess == k)).sum()
            if int(true) or int(said):
                per_label[label] = {"rows": int(true), "predicted": int(said), "f1": 2 * int(hits) / int(true + said)}
        return Evaluation(self.metrics(logits, tokens), bootstrap((guess == labels).tolist()), len(rows), per_label)

    def shown(self, found: Sequence[Prediction]) -> str:
        """A line for each text: label, probability, text."""
        width = max(len(one.label) for one in found)
        return "\n".join(f"{one.label:<{width}}  {one.probability:6.1%}  {one.text}" for one in found)


def mean_of_segments(hidden: Tensor, segments: Segments) -> Tensor:
    """The mean hidden state of each text: `hidden (tokens, d)` -> `(texts, d)`, summed in float32."""
    owners = segments.owners().to(hidden.device)
    total = torch.zeros(len(segments), hidden.shape[1], device=hidden.device).index_add(0, owners, hidden.float())
    return total / segments.lengths.to(hidden.device)[:, None]


def _f1(guess: Tensor, labels: Tensor, k: int) -> float | None:
    hits = int(((guess == k) & (labels == k)).sum())
    said, true = int((guess == k).sum()), int((labels == k).sum())
    return None if true == 0 and said == 0 else 2 * hits / (said + true)
