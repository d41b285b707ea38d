"""regress: one number for each text or pair of texts: a rating, a similarity.

A linear head on the pooled vector of the trunk (tasks/pooled.py). Inside, numbers are standardised by the mean and the
standard deviation of the training rows, which the note tells, so that predictions come back in the data's units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.rated import Rated, load_rated
from lorakit.data.rows import Splits
from lorakit.errors import DataError
from lorakit.tasks.base import Base
from lorakit.tasks.intervals import interval
from lorakit.tasks.pooled import GIVEN, Pooled, given_texts, noted, second_texts, used, whole
from lorakit.tasks.task import TASKS, Measured, Scores

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """The number of one text, or of a pair."""

    text: str
    number: float
    text2: str = ""


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over rows, `mae` in the data's units; `pearson_interval` is a 95 % bootstrap interval."""

    metrics: dict[str, float]
    pearson_interval: tuple[float, float]
    n_rows: int

    def __str__(self) -> str:
        low, high = self.pearson_interval
        return (
            f"Pearson {self.metrics['pearson']:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"Spearman {self.metrics['spearman']:.3f}, mean absolute error {self.metrics['mae']:.4g}, "
            f"R2 {self.metrics['r2']:.3f}, {self.n_rows} rows"
        )


@TASKS.add_class
@dataclass(frozen=True)
class Regress(Pooled):
    """Mean and standard deviation of the numbers that were learned, and how the trunk is used."""

    name = "regress"
    part = Rated
    metric = "pearson"
    drawn = "pearson"
    columns = ("text", "text2", "number")
    try_it = "your text"
    n_outputs = 1

    mean: float
    deviation: float
    pool: str = "mean"
    max_length: int = 512
    pairs: bool = False
    types: bool = False

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Rated:
        """Texts, or pairs of them, and numbers of one table."""
        return load_rated(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Rated:
        """Texts, or pairs of them, without numbers."""
        texts, others, lines = given_texts(given)
        return Rated(texts, None, GIVEN, lines, others)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Regress":
        """With mean and deviation of the training rows, pooled as the base wants."""
        numbers = np.concatenate([np.asarray(part.numbers, dtype=float) for part in data.train.chunks()])
        return cls(float(numbers.mean()), float(numbers.std()), **used(base, data.train))

    def examples(self, rows: Rated, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows, a standardised number each (-100 where it is unknown)."""
        if rows.numbers is None:
            return self.tokens(rows, [(float(IGNORED),)] * len(rows), tokenizer, truncate)
        numbers = [((number - self.mean) / self.deviation,) for number in rows.numbers]
        return self.tokens(rows, numbers, tokenizer, truncate)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed squared error of the standardised numbers (1 for each text where the mean is always said)."""
        found = self.scores(model, hidden, batch)
        return F.mse_loss(found[:, 0], batch.labels.to(found.device), reduction="sum")

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """Correlation of values (Pearson) and of ranks (Spearman), mean absolute error in the data's units, R2: the
        share of the variance that is explained. 0 where they have no value: all numbers the same."""
        found, true = scores[:, 0].double().numpy(), np.asarray(tokens.labels, dtype=float)[:, 0]
        spread = float(((true - true.mean()) ** 2).sum())
        squared = float(((found - true) ** 2).sum())
        return {
            "pearson": float(correlation(found, true)),
            "spearman": float(correlation(ranks(found), ranks(true))),
            "mae": float(np.abs(found - true).mean()) * self.deviation,
            "r2": 1 - squared / spread if np.ptp(true) else 0.0,
            "loss": squared / len(true),
        }

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {**super().note(), "mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Regress":
        """The inverse of `note`."""
        return cls(float(note["mean"]), float(note["deviation"]), **noted(note))

    def predict(self, rows: Rated, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Estimate]:
        """The number of each text, in the units of the training rows."""
        found = scores(self.examples(rows, base.tokenizer, truncate=truncate))[:, 0].double()
        numbers = (found * self.deviation + self.mean).tolist()
        return [Estimate(*row) for row in zip(rows.texts, numbers, second_texts(rows))]

    def evaluate(self, rows: Rated, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on rows with numbers."""
        if rows.numbers is None:
            raise DataError(f"'{rows.source}' has no numbers to evaluate against")
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        found = scores(tokens)
        said, true = found[:, 0].double().numpy(), np.asarray(rows.numbers, dtype=float)
        bounds = interval(len(rows), lambda draws: correlation(said[draws], true[draws]))
        return Evaluation(self.metrics(found, tokens), bounds, len(rows))

    def shown(self, found: Sequence[Estimate]) -> str:
        """A line for each text: number, text."""
        numbers = [f"{one.number:.4g}" for one in found]
        width = max(map(len, numbers))
        return "\n".join(f"{number:>{width}}  {whole(one.text, one.text2)}" for number, one in zip(numbers, found))

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The units."""
        return [("numbers", f"mean {summary['mean']:.4g}, standard deviation {summary['deviation']:.4g} in training")]


def correlation(x: Floats, y: Floats) -> Floats:
    """Pearson's, along the last axis: `(..., n)` -> `(...)`; 0 where one side is all the same."""
    flat = (np.ptp(x, -1) == 0) | (np.ptp(y, -1) == 0)
    x, y = (z - z.mean(-1, keepdims=True) for z in (x, y))
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(flat, 0.0, (x * y).sum(-1) / np.where(flat, 1.0, size))


def ranks(x: Floats) -> Floats:
    """The rank of each value `(n,)`, from 1; equal ones get the mean of theirs."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    found: Floats = (last - (count - 1) / 2)[place]
    return found
