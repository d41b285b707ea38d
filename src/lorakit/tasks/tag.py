"""tag: one tag for each word (named entities, slots). A linear head on the first token of each word.

The words of a text are joined by spaces and become tokens as any text does; the first token of a word is the one that
holds its first character. A word that the tokenizer drops (a variation selector, say) is given as the unknown token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.faults import BadRow, refuse
from lorakit.data.rows import Splits
from lorakit.data.spans import completed, places, scheme_of
from lorakit.data.tagged import Tagged, load_tagged, make_tagged
from lorakit.errors import DataError
from lorakit.tasks.base import Base
from lorakit.tasks.heads import give_head
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.task import TASKS, Measured, Scores, Task, refuse_long

HEAD = "classifier"


@dataclass(frozen=True)
class Span:
    """Words `begin` to `end` (the first behind it) of a text; `probability` is that of its least sure word."""

    label: str
    text: str
    begin: int
    end: int
    probability: float


@dataclass(frozen=True)
class Tagging:
    """The words of one text, a tag for each, and the spans that they mark."""

    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    spans: tuple[Span, ...]

    def __str__(self) -> str:
        begins = {span.begin: "[" for span in self.spans}
        ends = {span.end - 1: f" : {span.label}]" for span in self.spans}
        return " ".join(f"{begins.get(k, '')}{word}{ends.get(k, '')}" for k, word in enumerate(self.words))


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over spans; `f1_interval` is a 95 % bootstrap interval over texts; `per_label` has counts and F1."""

    metrics: dict[str, float]
    f1_interval: tuple[float, float]
    n_rows: int
    per_label: dict[str, dict[str, float]]

    def __str__(self) -> str:
        low, high = self.f1_interval
        width = max([5, *(len(label) for label in self.per_label)])
        lines = [
            f"F1 {self.metrics['f1']:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"precision {self.metrics['precision']:.3f}, recall {self.metrics['recall']:.3f}, "
            f"token accuracy {self.metrics['token_accuracy']:.1%}, loss {self.metrics['loss']:.3f}, {self.n_rows} rows",
            "",
            f"{'label':<{width}}  spans  predicted  precision  recall     F1",
        ]
        lines += [
            f"{label:<{width}}  {values['spans']:5d}  {values['predicted']:9d}  {values['precision']:9.3f}  "
            f"{values['recall']:6.3f}  {values['f1']:.3f}"
            for label, values in self.per_label.items()
        ]
        return "\n".join(lines)


class Guess(NamedTuple):
    """Of one word the number of its most probable tag, the probability of that, and the loss."""

    tag: int
    probability: float
    loss: float


@TASKS.add_class
@dataclass(frozen=True)
class Tag(Task):
    """Tags in the order of the head's outputs."""

    name = "tag"
    part = Tagged
    metric = "f1"
    drawn = "f1"
    head = HEAD
    columns = ("words", "tags")
    try_it = "play some jazz in berlin"

    labels: tuple[str, ...]
    max_length: int = 512

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Tagged:
        """Words and tags of one file, table or directory of slots."""
        return load_tagged(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Tagged:
        """Texts, which white space cuts, or lists of words."""
        return make_tagged(given)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Tag":
        """With the tags of the training rows, every type with every prefix."""
        return cls(completed(data.train.core.known), base.max_length)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Tag":
        """The inverse of `note`."""
        return cls(tuple(note["labels"]), int(note["max_length"]))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        return {"name": self.name, "labels": list(self.labels), "max_length": self.max_length}

    @cached_property
    def scheme(self) -> str:
        """How the tags mark spans (data/spans.py)."""
        return scheme_of(self.labels)

    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk its head."""
        give_head(model, HEAD, len(self.labels), "tags")

    def examples(self, rows: Tagged, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all rows; of each word a label (-100 where it is unknown), and the place of its first token.

        `truncate` cuts the last words of a text that is too long.
        """
        words = [list(one) for one in rows.words]
        encoded = _encoded(tokenizer, words)
        lost = [(i, k) for i, found in enumerate(_firsts(encoded, words)) for k, at in enumerate(found) if at is None]
        if lost:
            if tokenizer.unk_token is None:
                why = "the base's tokenizer makes nothing of word"
                refuse(
                    [BadRow(rows.source, rows.lines[i], f"{why} {k + 1} ({words[i][k]!r}); remove it") for i, k in lost]
                )
            for i, k in lost:
                words[i][k] = tokenizer.unk_token
            encoded = _encoded(tokenizer, words)
        if truncate and max(map(len, encoded["input_ids"])) > self.max_length:
            encoded = _encoded(tokenizer, words, truncation=True, max_length=self.max_length)
        refuse_long(rows, rows.lines, encoded["input_ids"], self.max_length)
        reads = tuple(tuple(at for at in found if at is not None) for found in _firsts(encoded, words))
        index = {label: number for number, label in enumerate(self.labels)}
        tags = rows.tags or [("",) * len(one) for one in words]
        labels = tuple(tuple(index.get(tag, IGNORED) for tag in said[: len(at)]) for said, at in zip(tags, reads))
        return Tokens(encoded["input_ids"], labels, reads, rows.lines, tokenizer.pad_token_id or 0)

    def _logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        logits: Tensor = model.get_submodule(HEAD)(hidden.float())
        return logits

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy of the words, in nats."""
        logits = self._logits(model, hidden)
        return F.cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Of each word in turn: its most probable tag, the probability of that, and its loss: `(texts, 3 * words)`."""
        logits = self._logits(model, hidden)
        labels = batch.labels.to(logits.device)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        probability, best = logits.softmax(-1).max(-1)
        each = torch.stack([best.float(), probability, loss], -1)
        return pad_sequence(list(torch.split(each, batch.n_reads)), batch_first=True, padding_value=torch.nan).flatten(
            1
        )

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """F1 (micro), precision and recall of spans by the rules of conlleval; accuracy and mean loss of words."""
        found = self._told(scores, tokens)
        hits, said, true = map(sum, zip(*self._counts(found, tokens)))
        pairs = [pair for row, labels in zip(found, tokens.labels) for pair in zip(row, labels)]
        return {
            "f1": 2 * hits / max(1, said + true),
            "precision": hits / max(1, said),
            "recall": hits / max(1, true),
            "token_accuracy": sum(guess.tag == label for guess, label in pairs) / len(pairs),
            "loss": sum(guess.loss for guess, _ in pairs) / len(pairs),
        }

    def _told(self, scores: Tensor, tokens: Tokens) -> list[list[Guess]]:
        """Every word of each text."""
        rows = scores.view(len(scores), -1, 3).tolist()
        return [[Guess(int(tag), p, loss) for tag, p, loss in row[: len(at)]] for row, at in zip(rows, tokens.reads)]

    def _spans(self, found: Sequence[Sequence[Guess]], tokens: Tokens) -> list[tuple[set[Any], set[Any]]]:
        """The spans that were predicted in each text, and the right ones."""
        names = self.labels
        return [
            (
                set(places([names[guess.tag] for guess in row], self.scheme)),
                set(places([names[int(label)] for label in labels], self.scheme)),
            )
            for row, labels in zip(found, tokens.labels)
        ]

    def _counts(self, found: Sequence[Sequence[Guess]], tokens: Tokens) -> list[tuple[int, int, int]]:
        """Of each text: spans that were right, predicted, there."""
        return [(len(said & true), len(said), len(true)) for said, true in self._spans(found, tokens)]

    def predict(self, rows: Tagged, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Tagging]:
        """The most probable tag of each word, and the spans that these mark; of a cut text without the cut words."""
        tokens = self.examples(replace(rows, tags=None), base.tokenizer, truncate=truncate)
        result: list[Tagging] = []
        for row, all_words in zip(self._told(scores(tokens), tokens), rows.words):
            words, tags = all_words[: len(row)], tuple(self.labels[guess.tag] for guess in row)
            spans = tuple(
                Span(label, " ".join(words[begin:end]), begin, end, min(guess.probability for guess in row[begin:end]))
                for label, begin, end in places(tags, self.scheme)
            )
            result.append(Tagging(" ".join(words), words, tags, spans))
        return result

    def evaluate(self, rows: Tagged, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on tagged words. DataError for tags it has not learned."""
        if rows.tags is None:
            raise DataError(f"'{rows.source}' has no tags to evaluate against")
        refuse(rows.unseen(self.labels, "was not in the training data"))
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        found = scores(tokens)
        told = self._told(found, tokens)
        interval = bootstrap(self._counts(told, tokens), lambda s: 2 * s[:, 0] / (s[:, 1] + s[:, 2]).clip(1))
        return Evaluation(self.metrics(found, tokens), interval, len(rows), self._per_label(told, tokens))

    def _per_label(self, found: Sequence[Sequence[Guess]], tokens: Tokens) -> dict[str, dict[str, float]]:
        pairs = self._spans(found, tokens)
        result: dict[str, dict[str, float]] = {}
        for label in sorted({span.label for pair in pairs for spans in pair for span in spans}):
            own = [[{span for span in spans if span.label == label} for spans in pair] for pair in pairs]
            hits, said, true = (sum(map(len, part)) for part in zip(*((a & b, a, b) for a, b in own)))
            result[label] = {
                "spans": true,
                "predicted": said,
                "precision": hits / max(1, said),
                "recall": hits / max(1, true),
                "f1": 2 * hits / (said + true),
            }
        return result


def _encoded(tokenizer: Any, words: Sequence[Sequence[str]], **more: Any) -> Any:
    return tokenizer([" ".join(one) for one in words], **more)


def _firsts(encoded: Any, words: Sequence[Sequence[str]]) -> list[list[int | None]]:
    """The token of the first character of each word that has one; None for a word without tokens."""
    found: list[list[int | None]] = []
    for i, one in enumerate(words):
        at, row = 0, list[int | None]()
        for word in one:
            tokens = (encoded.char_to_token(i, place) for place in range(at, at + len(word)))
            row.append(next((token for token in tokens if token is not None), None))
            at += len(word) + 1
        found.append(row)
    return found
