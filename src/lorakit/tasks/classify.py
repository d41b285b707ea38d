"""classify: one label for each text, or for each pair of texts (does one follow from the other? do they say the same?).

A linear head on the pooled vector of the trunk (tasks/pooled.py), trained fully beside the adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.faults import BadRow, refuse
from lorakit.data.rows import Part, Rows, Splits
from lorakit.data.sources import load_rows
from lorakit.errors import DataError
from lorakit.tasks.base import Base
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.pooled import GIVEN, Pooled, given_texts, noted, second_texts, table_of, used, whole
from lorakit.tasks.task import TASKS, Measured, Scores


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text (or of a pair), and the probabilities of all."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]
    text2: str = ""


@dataclass(frozen=True)
class Evaluation(Measured):
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
            *table_of(self.per_label, width),
        ]
        return "\n".join(lines)


@TASKS.add_class
@dataclass(frozen=True)
class Classify(Pooled):
    """Labels in the order of the head's outputs, and how the trunk is used."""

    name = "classify"
    part = Rows
    metric = "accuracy"
    drawn = "accuracy"
    columns = ("text", "text2", "label")
    try_it = "my parcel never came"

    labels: tuple[str, ...]
    pool: str = "mean"
    max_length: int = 512
    pairs: bool = False
    types: bool = False

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Rows:
        """Texts, or pairs of them, and labels of one table."""
        return load_rows(source, labels=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Rows:
        """Texts, or pairs of them, without labels."""
        texts, others, lines = given_texts(given)
        return Rows(texts, None, GIVEN, lines, others)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Classify":
        """With the labels of the training rows, pooled as the base wants."""
        return cls(data.labels, **used(base, data.train))

    @property
    def n_outputs(self) -> int:
        """A logit for each label: at first all are equally probable, and the loss is `ln(labels)`."""
        return len(self.labels)

    def examples(self, rows: Rows, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows, one label each (-100 where it is unknown)."""
        numbers = [(number,) for number in numbered(rows.labels or ("",) * len(rows), self.labels)]
        return self.tokens(rows, numbers, tokenizer, truncate)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        logits = self.scores(model, hidden, batch)
        return F.cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """Accuracy, macro F1 (labels that occur), mean loss."""
        return label_metrics(scores, [int(label) for (label,) in tokens.labels])

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {**super().note(), "labels": list(self.labels)}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Classify":
        """The inverse of `note`."""
        return cls(tuple(note["labels"]), **noted(note))

    def predict(self, rows: Rows, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Prediction]:
        """The most probable label of each text."""
        logits = scores(self.examples(rows, base.tokenizer, truncate=truncate))
        found = most_probable(logits, rows.texts, self.labels)
        return [replace(one, text2=text2) for one, text2 in zip(found, second_texts(rows))]

    def evaluate(self, rows: Rows, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on labelled rows. DataError for labels it has not learned."""
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        labels = known_labels(rows, rows.labels, self.labels)
        return evaluation(scores(tokens), labels, self.labels)

    def shown(self, found: Sequence[Prediction]) -> str:
        """A line for each text: label, probability, text."""
        return shown(found)


def numbered(labels: Sequence[str], known: Sequence[str]) -> list[int]:
    """The number of each label; IGNORED for one that is not known."""
    index = {label: number for number, label in enumerate(known)}
    return [index.get(label, IGNORED) for label in labels]


def known_labels(rows: Part, labels: Sequence[str] | None, known: Sequence[str]) -> list[int]:
    """The number of each row's label. DataError for rows without one, and labels that were not learned."""
    if labels is None:
        raise DataError(f"'{rows.source}' has no labels to evaluate against")
    refuse(
        [
            BadRow(rows.source, line, f"label '{label}' was not in the training data")
            for label, line in zip(labels, rows.lines)
            if label not in known
        ]
    )
    return numbered(labels, known)


def label_metrics(logits: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro F1 (labels that occur), mean loss, of `logits (examples, labels)`."""
    guess, wanted = logits.argmax(-1), torch.tensor(labels)
    found = [f1 for f1 in (_f1(guess, wanted, k) for k in range(logits.shape[1])) if f1 is not None]
    return {
        "accuracy": float((guess == wanted).double().mean()),
        "macro_f1": sum(found) / len(found),
        "loss": float(F.cross_entropy(logits, wanted)),
    }


def evaluation(logits: Tensor, labels: Sequence[int], known: Sequence[str]) -> Evaluation:
    """The metrics with their interval, and counts and F1 of each label."""
    guess, wanted = logits.argmax(-1), torch.tensor(labels)
    per_label: dict[str, Any] = {}
    for k, label in enumerate(known):
        true, said, hits = (wanted == k).sum(), (guess == k).sum(), ((wanted == k) & (guess == k)).sum()
        if int(true) or int(said):
            per_label[label] = {"rows": int(true), "predicted": int(said), "f1": 2 * int(hits) / int(true + said)}
    return Evaluation(label_metrics(logits, labels), bootstrap((guess == wanted).tolist()), len(labels), per_label)


def most_probable(logits: Tensor, names: Sequence[str], labels: Sequence[str]) -> list[Prediction]:
    """The most probable label of each example."""
    result: list[Prediction] = []
    for name, row in zip(names, logits.softmax(-1).tolist()):
        best = max(range(len(row)), key=row.__getitem__)
        result.append(Prediction(name, labels[best], row[best], dict(zip(labels, row))))
    return result


def shown(found: Sequence[Prediction]) -> str:
    """A line for each example: label, probability, text or name."""
    width = max(len(one.label) for one in found)
    return "\n".join(f"{one.label:<{width}}  {one.probability:6.1%}  {whole(one.text, one.text2)}" for one in found)


def _f1(guess: Tensor, labels: Tensor, k: int) -> float | None:
    hits = int(((guess == k) & (labels == k)).sum())
    said, true = int((guess == k).sum()), int((labels == k).sum())
    return None if true == 0 and said == 0 else 2 * hits / (said + true)
