"""labels: any number of labels for each text, none included (multi-label classification).

A linear head on the pooled vector of the trunk (tasks/pooled.py) gives each label a probability of its own: a sigmoid,
and binary cross-entropy. A label is said where its probability reaches a threshold, which the validation rows choose.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.faults import refuse
from lorakit.data.label_sets import LabelSets, load_label_sets, unseen
from lorakit.data.rows import Splits, in_order
from lorakit.errors import DataError, UsageError
from lorakit.tasks.base import Base
from lorakit.tasks.intervals import interval
from lorakit.tasks.pooled import GIVEN, Pooled, given_texts, noted, second_texts, table_of, used, whole
from lorakit.tasks.task import TASKS, Measured, Scores

_THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))


@dataclass(frozen=True)
class Labelled:
    """The labels of one text (or of a pair), the most probable first, and the probabilities of all."""

    text: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    text2: str = ""


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over rows; `micro_f1_interval` is a 95 % bootstrap interval; `per_label` has counts and F1."""

    metrics: dict[str, float]
    micro_f1_interval: tuple[float, float]
    n_rows: int
    threshold: float
    per_label: dict[str, dict[str, float]]

    def __str__(self) -> str:
        low, high = self.micro_f1_interval
        width = max([5, *(len(label) for label in self.per_label)])
        lines = [
            f"micro F1 {self.metrics['micro_f1']:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"macro F1 {self.metrics['macro_f1']:.3f}, all labels right {self.metrics['subset_accuracy']:.1%}, "
            f"loss {self.metrics['loss']:.3f}, {self.n_rows} rows, threshold {self.threshold:g}",
            "",
            *table_of(self.per_label, width),
        ]
        return "\n".join(lines)


@TASKS.add_class
@dataclass(frozen=True)
class Labels(Pooled):
    """Labels in the order of the head's outputs, the probability from which one is said, and how the trunk is used."""

    name = "labels"
    part = LabelSets
    metric = "micro_f1"
    drawn = "micro_f1"
    columns = ("text", "text2", "label", "labels", "delimiter")
    options = ("threshold",)
    try_it = "your text"

    labels: tuple[str, ...]
    pool: str = "mean"
    max_length: int = 512
    pairs: bool = False
    types: bool = False
    threshold: float = 0.5
    odds: tuple[float, ...] = field(default=(), compare=False)  # of each label in the training rows, their logarithm

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> LabelSets:
        """Texts, or pairs of them, and labels of one table."""
        return load_label_sets(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> LabelSets:
        """Texts, or pairs of them, without labels."""
        texts, others, lines = given_texts(given)
        return LabelSets(texts, None, GIVEN, lines, others)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Labels":
        """With the labels of the training rows, pooled as the base wants."""
        labels, n = in_order(data.train.known), len(data.train)
        n_rows = Counter(label for own in data.train.labels for label in own)
        odds = tuple(math.log((n_rows[label] + 0.5) / (n - n_rows[label] + 0.5)) for label in labels)
        return cls(labels, **used(base, data.train), odds=odds)

    @property
    def n_outputs(self) -> int:
        """A logit for each label."""
        return len(self.labels)

    def first_bias(self) -> Tensor:
        """Every label begins as probable as it is frequent (Lin et al., 2017, "Focal loss", arXiv 1708.02002).

        From one half each, all labels of a large set first pull the trunk the same way, towards "no", and on snips (39
        labels) 200 steps left it there.
        """
        return torch.tensor(self.odds) if self.odds else super().first_bias()

    def examples(self, rows: LabelSets, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows; for each row and label 1.0 or 0.0 (-100 where it is unknown)."""
        unknown = (float(IGNORED),) * len(self.labels)
        if rows.labels is None:
            return self.tokens(rows, [unknown] * len(rows), tokenizer, truncate)
        truth = [tuple(float(label in own) for label in self.labels) for own in map(set, rows.labels)]
        return self.tokens(rows, truth, tokenizer, truncate)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Binary cross-entropy, summed over texts and labels, in nats."""
        logits = self.scores(model, hidden, batch)
        return F.binary_cross_entropy_with_logits(
            logits, batch.labels.to(logits.device).view_as(logits), reduction="sum"
        )

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """F1 over all decisions (micro), its mean over labels that occur or are said (macro), the share of rows with
        all labels right, and the mean loss of a decision."""
        truth, said = _truth(tokens), self._said(scores)
        hits, n_said, n_true = ((truth & said).sum(0), said.sum(0), truth.sum(0))
        each = _f1(hits, n_said, n_true)[n_said + n_true > 0]
        return {
            "micro_f1": float(_f1(hits.sum(), n_said.sum(), n_true.sum())),
            "macro_f1": float(each.mean()) if len(each) else 0.0,
            "subset_accuracy": float((truth == said).all(-1).double().mean()),
            "loss": float(F.binary_cross_entropy_with_logits(scores, truth.float())),
        }

    def calibrated(self, valid: Tokens, scores: Scores) -> "Labels":
        """With the threshold of the best micro F1 on the validation rows; of equal ones the nearest to 1/2."""
        found, truth = scores(valid), _truth(valid)

        def worth(threshold: float) -> tuple[float, float]:
            said = replace(self, threshold=threshold)._said(found)
            return float(_f1((truth & said).sum(), said.sum(), truth.sum())), -abs(threshold - 0.5)

        return replace(self, threshold=max(_THRESHOLDS, key=worth))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {**super().note(), "labels": list(self.labels), "threshold": self.threshold}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Labels":
        """The inverse of `note`."""
        return cls(tuple(note["labels"]), **noted(note), threshold=float(note["threshold"]))

    def predict(
        self,
        rows: LabelSets,
        base: Base,
        scores: Scores,
        *,
        truncate: bool,
        threshold: float | None = None,
        **options: Any,
    ) -> list[Labelled]:
        """The labels of each text whose probability is at least `threshold` (default: as chosen in training)."""
        least = self.threshold if threshold is None else threshold
        if not 0 <= least <= 1:
            raise UsageError(f"threshold is {threshold}; it must be a probability from 0 to 1")
        found = scores(self.examples(rows, base.tokenizer, truncate=truncate)).sigmoid().tolist()
        result: list[Labelled] = []
        for text, text2, row in zip(rows.texts, second_texts(rows), found):
            ranked = sorted((-value, label) for label, value in zip(self.labels, row) if value >= least)
            result.append(Labelled(text, tuple(label for _, label in ranked), dict(zip(self.labels, row)), text2))
        return result

    def evaluate(self, rows: LabelSets, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on rows with labels. DataError for labels it has not learned."""
        if rows.labels is None:
            raise DataError(f"'{rows.source}' has no labels to evaluate against")
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        refuse(unseen(rows, set(self.labels)))
        logits = scores(tokens)
        truth, said = _truth(tokens), self._said(logits)
        hits, n_said, n_true = (truth & said).sum(0), said.sum(0), truth.sum(0)
        counted = zip(self.labels, n_true.tolist(), n_said.tolist(), _f1(hits, n_said, n_true).tolist())
        per_label: dict[str, Any] = {
            label: {"rows": true, "predicted": own, "f1": f1} for label, true, own, f1 in counted if true or own
        }
        sums = torch.stack([(truth & said).sum(-1), (truth.int() + said.int()).sum(-1)], -1).double().numpy()

        def micro(draws: Any) -> Any:
            totals = sums[draws].sum(1)
            return 2 * totals[:, 0] / np.maximum(totals[:, 1], 1)

        return Evaluation(
            self.metrics(logits, tokens), interval(len(rows), micro), len(rows), self.threshold, per_label
        )

    def shown(self, found: Sequence[Labelled]) -> str:
        """A line for each text: its labels with their probabilities, and the text."""
        said = [", ".join(f"{name} {one.probabilities[name]:.0%}" for name in one.labels) or "(none)" for one in found]
        width = min(50, max(map(len, said)))
        return "\n".join(f"{own:<{width}}  {whole(one.text, one.text2)}" for own, one in zip(said, found))

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """From which probability a label is said."""
        return [("threshold", f"{summary['threshold']:g}, the best on the validation rows")]

    def _said(self, scores: Tensor) -> Tensor:
        """Which labels are said of each text: `(texts, labels)`."""
        return scores.sigmoid() >= self.threshold


def _truth(tokens: Tokens) -> Tensor:
    return torch.tensor(tokens.labels) > 0.5


def _f1(hits: Tensor, said: Tensor, true: Tensor) -> Tensor:
    """2 hits / (said + true); 0 where nothing is said nor true."""
    return 2 * hits.double() / (said + true).clamp_min(1)
