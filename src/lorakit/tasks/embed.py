"""embed: a vector for each text, near those of the texts that belong to it. Nothing is added to the base.

The vector is the pooled state of the trunk, of length 1. Of each row of a step the query is to find its positive among
all positives and negatives of the step: the cross-entropy of `similarity / temperature` (InfoNCE: van den Oord et al.,
2018, arXiv 1807.03748; multiple negatives ranking: Henderson et al., 2017, arXiv 1705.00652). With `symmetric` each
positive is to find its query too, and the mean of both is taken. What a text belongs to is not held against it: texts
of the same class, a text that stands elsewhere as well, the other positives of a query that stands in several rows.

Rows of texts and labels become pairs anew in every epoch: each text with another of its class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import TextBatch, Tokens
from lorakit.data.matched import Matched
from lorakit.data.matches import Matches, load_matches, make_texts
from lorakit.data.rows import Splits
from lorakit.errors import DataError, UsageError, listed
from lorakit.tasks.base import Base
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.pooled import reads_of, vectors
from lorakit.tasks.task import TASKS, Measured, Scores, Task, refuse_long

_AT_ONCE = 1 << 22  # similarities held at once in evaluation


@dataclass(frozen=True)
class Embedding:
    """The vector of a text, of length 1. `numpy.stack` of several makes a matrix, and `m @ m.T` their similarities."""

    text: str
    vector: tuple[float, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.vector, dtype or np.float32)


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over queries; `recall_interval` is a 95 % bootstrap interval of recall at 1."""

    metrics: dict[str, float]
    recall_interval: tuple[float, float]
    n_rows: int
    n_candidates: int

    def __str__(self) -> str:
        low, high = self.recall_interval
        return (
            f"recall@1 {self.metrics['recall_at_1']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"mrr {self.metrics['mrr']:.3f}, loss {self.metrics['loss']:.3f}, {self.n_rows} rows, "
            f"{self.n_candidates} texts to find them among"
        )


@TASKS.add_class
@dataclass(frozen=True)
class Embed(Task):
    """How the trunk is pooled, the longest text, and how the loss compares."""

    name = "embed"
    part = Matches
    metric = "recall_at_1"
    drawn = "recall_at_1"
    wishes = ("pool",)
    columns = ("query", "positive", "negative", "text", "label")
    choices = ("temperature", "symmetric")
    peft_task = "FEATURE_EXTRACTION"
    try_it = "my parcel never came"
    coupled = True

    pool: str = "mean"
    max_length: int = 512
    temperature: float = 0.05
    symmetric: bool = False

    def __post_init__(self) -> None:
        faults = []
        if isinstance(self.temperature, bool | str) or not self.temperature > 0:
            faults.append(f"temperature is {self.temperature!r}; it must be a number above 0")
        if not isinstance(self.symmetric, bool):
            faults.append(f"symmetric is {self.symmetric!r}; it must be true or false")
        if faults:
            raise UsageError(listed(faults))

    @classmethod
    def read(cls, source: str | Path, /, *, answers: bool = True, **columns: str | None) -> Matches:
        """Matches of one table."""
        return load_matches(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[str]) -> Matches:
        """Texts."""
        return make_texts(given)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Embed":
        """Pooled as the base wants."""
        return cls(base.pool, base.max_length)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Embed":
        """The inverse of `note`."""
        return cls(note["pool"], int(note["max_length"]), float(note["temperature"]), bool(note["symmetric"]))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"pool": self.pool, "max_length": self.max_length}
        return {"name": self.name, **known, "temperature": self.temperature, "symmetric": self.symmetric}

    def prepare(self, model: nn.Module) -> None:
        """Nothing is added."""

    def examples(self, rows: Matches, tokenizer: Any, *, truncate: bool) -> Matched:
        """Token ids of all different texts, and what each row is made of. DataError where one is too long."""
        places: dict[tuple[str, str], int] = {}
        lines: list[int] = []
        members: list[tuple[int, ...]] = []
        for line, label, own in zip(rows.lines, rows.labels or ("",) * len(rows), zip(*rows.columns())):
            members.append(tuple(places.setdefault((label, text), len(places)) for text in own))
            lines += [line] * (len(places) - len(lines))
        texts = [text for _, text in places]
        encoded = tokenizer(texts, truncation=truncate, max_length=self.max_length if truncate else None)
        ids = tuple(tuple(entry) for entry in encoded["input_ids"])
        owners = [line for line, own in zip(rows.lines, members) for _ in own]
        refuse_long(rows, owners, [ids[place] for own in members for place in own], self.max_length)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(rows.labels or ()))}
        keys = tuple((numbers.get(label, place),) for (label, _), place in places.items())
        found = Tokens(ids, keys, reads_of(ids, self.pool), tuple(lines), tokenizer.pad_token_id or 0)
        return Matched(found, members, rows.lines, classes=rows.labels is not None)

    def preview(self, examples: Matched, number: int, tokenizer: Any) -> str:
        """The texts of one example as the model sees them."""
        return "  |  ".join(str(tokenizer.decode(examples.texts.ids[place])) for place in examples.members[number])

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """The vectors of each example's texts, side by side: `(examples, texts * d)`, float32."""
        return F.normalize(vectors(hidden, batch), dim=-1).view(len(batch.examples), -1)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed over examples."""
        return self.coupled_loss(self.scores(model, hidden, batch), batch.labels)

    def coupled_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The summed loss of examples `(examples, texts * d)`, whose texts have these keys `(examples * texts,)`."""
        keys = labels.view(len(scores), -1).to(scores.device)
        query, *others = scores.view(*keys.shape, -1).unbind(1)
        found = torch.cat(others)  # all positives, then all negatives
        owner, kind = keys[:, 0], keys[:, 1:].T.flatten()
        belongs = (owner[:, None] == owner).float() @ (keys[:, 1:2] == kind).float() > 0
        belongs |= owner[:, None] == kind
        loss = self._ranked(query @ found.T, belongs)
        if self.symmetric:
            loss = (loss + self._ranked(others[0] @ query.T, belongs[:, : len(query)].T)) / 2
        return loss

    def _ranked(self, similarities: Tensor, belongs: Tensor) -> Tensor:
        """Summed cross-entropy of the diagonal, without what belongs to a row beside it."""
        target = torch.arange(len(similarities), device=similarities.device)
        beside = belongs.scatter(1, target[:, None], False)
        logits = (similarities / self.temperature).masked_fill(beside, -torch.inf)
        return F.cross_entropy(logits, target, reduction="sum")

    def metrics(self, scores: Tensor, examples: Matched) -> dict[str, float]:
        """Of all queries that have something to find: recall at 1, mean reciprocal rank, mean loss."""
        ranks, losses, _ = self._found(scores, examples)
        recall = float((ranks == 1).double().mean())
        return {"recall_at_1": recall, "mrr": float((1 / ranks).double().mean()), "loss": float(losses.mean())}

    def _found(self, scores: Tensor, examples: Matched) -> tuple[Tensor, Tensor, int]:
        """For each query with something to find the rank of the nearest text that belongs to it, and its loss; and how
        many texts there are to find them among.

        Those are the different positives, or all texts where there are classes; the query itself is not one of them.
        The loss is that of each text that belongs to it, in mean, against all that do not.
        """
        wanted = examples.candidates()
        first = {place: i for i, place in reversed(list(enumerate(wanted)))}
        column = {place: k for k, place in enumerate(first)}
        texts = scores.view(len(examples), len(examples.members[0]), -1)
        pool = texts[[first[place] for place in column], 0 if examples.classes else 1]
        belonging, queries = examples.belonging(), [own[0] for own in examples.members]
        asking = [i for i, places in enumerate(belonging) if places - {queries[i]}]
        ranks, losses = [torch.zeros(0)], [torch.zeros(0)]
        for part in torch.split(torch.tensor(asking, dtype=torch.int64), max(1, _AT_ONCE // len(pool))):
            right = torch.zeros(len(part), len(pool), dtype=torch.bool)
            similar = texts[part, 0] @ pool.T
            for row, i in enumerate(part.tolist()):
                right[row, [column[place] for place in belonging[i]]] = True
                if queries[i] in column:
                    similar[row, column[queries[i]]] = -torch.inf
            right &= similar > -torch.inf
            logits = similar / self.temperature
            best = similar.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            wrong = logits.masked_fill(right, -torch.inf)
            ranks.append(1 + ((similar >= best) & ~right).sum(1))
            each = F.softplus(wrong.logsumexp(1, keepdim=True) - logits).masked_fill(~right, 0)
            losses.append(each.sum(1) / right.sum(1))
        return torch.cat(ranks), torch.cat(losses), len(pool)

    def predict(self, rows: Matches, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Embedding]:
        """The vector of each query."""
        alone = make_texts(rows.queries, rows.source, rows.lines)
        examples = self.examples(alone, base.tokenizer, truncate=truncate)
        return [Embedding(text, tuple(vector)) for text, vector in zip(rows.queries, scores(examples).tolist())]

    def evaluate(self, rows: Matches, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on pairs, triples or labelled texts."""
        if rows.form == "single texts":
            raise DataError(f"'{rows.source}' has single texts, and nothing that belongs to them")
        examples = self.examples(rows, base.tokenizer, truncate=truncate)
        found = scores(examples)
        ranks, _, n_candidates = self._found(found, examples)
        if not len(ranks):
            raise DataError(f"'{rows.source}' has no label with two texts, so nothing can be found in it; add rows")
        interval = bootstrap((ranks == 1).tolist())
        return Evaluation(self.metrics(found, examples), interval, len(rows), n_candidates)

    def shown(self, found: Sequence[Embedding]) -> str:
        """A line for each text: how many numbers, the first of them, the text."""
        return "\n".join(
            f"{len(one.vector)} numbers ({', '.join(f'{x:.3f}' for x in one.vector[:3])} ...)  {one.text}"
            for one in found
        )
