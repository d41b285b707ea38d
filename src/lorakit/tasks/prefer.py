"""prefer: which of two answers is the better one. Preference tuning of a causal language model, without a reward model.

With `p` the probability of an answer y to x by the model, `q` that by the plain base, and w, l the chosen and the
rejected answer, the margin is

    m = beta * (ln p(w|x) - ln q(w|x) - ln p(l|x) + ln q(l|x))

and the loss of a pair `-(1 - s) ln sigmoid(m) - s ln sigmoid(-m)`, s the label smoothing (Rafailov et al., 2023,
"Direct preference optimization", arXiv 2305.18290; Mitchell, 2023, "A note on DPO with noisy preferences"). The variant
ipo takes means over tokens in place of sums, and `(m / beta - 1 / (2 beta))^2` (Azar et al., 2023, arXiv 2310.12036).

The base is its own reference: its probabilities are taken once, before the first step, with the adapter off. Answers
are written as `generate` writes them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.attach import disabled
from lorakit.data.batches import TextBatch, Tokens
from lorakit.data.dialogues import make_dialogues
from lorakit.data.faults import refuse_rows
from lorakit.data.preferences import Preferences, load_preferences
from lorakit.data.rows import Splits
from lorakit.errors import DataError, UsageError, listed
from lorakit.tasks.base import Base
from lorakit.tasks.causal import has_plain_logits, head_of, losses
from lorakit.tasks.generate import Generate, Generation
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.task import TASKS, Measured, Scores, Task, refuse_long
from lorakit.tasks.template import Template, Text, cut


class Pairs(Tokens):
    """Two texts each: with the chosen and with the rejected answer. `reference (pairs, 2)` is what the base says.

    It says the log-probability of each answer, in nats; None until it was asked.
    """

    reference: Tensor | None = None

    def n_labels(self, indices: Sequence[int]) -> int:
        """Every pair is one."""
        return len(indices)

    def gather(self, indices: Sequence[int]) -> "PairBatch":
        """The texts of these pairs, end to end, with what the base says of them."""
        told = None if self.reference is None else self.reference[list(indices)]
        return PairBatch(**vars(super().gather(indices)), reference=told)


@dataclass(frozen=True)
class PairBatch(TextBatch):
    """Texts of pairs, and the base's log-probabilities of their answers `(pairs, 2)`."""

    reference: Tensor | None = None


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over pairs; `reward_accuracy_interval` is a 95 % bootstrap interval."""

    metrics: dict[str, float]
    reward_accuracy_interval: tuple[float, float]
    n_rows: int

    def __str__(self) -> str:
        low, high = self.reward_accuracy_interval
        return (
            f"reward accuracy {self.metrics['reward_accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"margin {self.metrics['margin']:.3f} nats, loss {self.metrics['loss']:.3f}, {self.n_rows} pairs"
        )


def _sigmoid(gaps: Tensor, counts: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    margin = beta * (gaps[:, 0] - gaps[:, 1])
    return margin, -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _ipo(gaps: Tensor, counts: Tensor, beta: float, smoothing: float) -> tuple[Tensor, Tensor]:
    each = gaps / counts
    difference = each[:, 0] - each[:, 1]
    return beta * difference, (difference - 0.5 / beta) ** 2


Variant = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
VARIANTS: dict[str, Variant] = {"sigmoid": _sigmoid, "ipo": _ipo}  # gaps, counts (pairs, 2) -> margins, losses (pairs,)


@TASKS.add_class
@dataclass(frozen=True)
class Prefer(Task):
    """How dialogues are written, as for Generate; `beta` holds the model to its base, the more the larger it is.

    `label_smoothing` is the share of pairs that are thought to be the wrong way round, `variant` one of `VARIANTS`.
    """

    name = "prefer"
    part = Preferences
    metric = "reward_accuracy"
    drawn = "reward_accuracy"
    output = "causal"
    wishes = ("template",)
    columns = ("prompt", "chosen", "rejected")
    options = Generate.options
    choices = ("beta", "label_smoothing", "variant")
    peft_task = "CAUSAL_LM"
    try_it = "your question"

    template: str = ""
    max_length: int = 1024
    plain_logits: bool = True
    beta: float = 0.1
    label_smoothing: float = 0.0
    variant: str = "sigmoid"

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}; it must be {wish}"
            for name, good, wish in (
                ("beta", _number(self.beta) and self.beta > 0, "a number above 0"),
                (
                    "label_smoothing",
                    _number(self.label_smoothing) and 0 <= self.label_smoothing < 0.5,
                    "a share from 0 to below 0.5",
                ),
                ("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            )
            if not good
        ]
        if not faults and self.label_smoothing and self.variant == "ipo":
            faults.append("the variant ipo knows no label_smoothing; leave it out")
        if faults:
            raise UsageError(listed(faults))

    @property
    def writer(self) -> Generate:
        """The task that writes answers."""
        return Generate(self.template, self.max_length, self.plain_logits)

    @classmethod
    def read(cls, source: str | Path, /, *, answers: bool = True, **columns: str | None) -> Preferences:
        """Preferences of one table."""
        return load_preferences(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Preferences:
        """Prompts, or lists of messages, that end with what is asked."""
        found = make_dialogues(given).asked()
        return Preferences(found.turns, None, None, found.source, found.lines)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Prefer":
        """Written as the base wants it."""
        return cls(base.template, base.max_length, has_plain_logits(base.model))

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Prefer":
        """The inverse of `note`."""
        own = {name: note[name] for name in cls.choices}
        return cls(note["template"], int(note["max_length"]), bool(note["plain_logits"]), **own)

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"template": self.template, "max_length": self.max_length, "plain_logits": self.plain_logits}
        return {"name": self.name, **known, **{name: getattr(self, name) for name in self.choices}}

    def prepare(self, model: nn.Module) -> None:
        """The base brings its head; UsageError where it does not."""
        head_of(model)

    def examples(self, rows: Preferences, tokenizer: Any, *, truncate: bool) -> Pairs:
        """Token ids of both texts of each row; of the last answer's tokens the id, and the place before it.

        `truncate` cuts the beginning of what was asked, alike in both texts, and the end of an answer that alone fills
        more than three quarters of the longest text. DataError where an answer is not known, a text is too long, or
        both are the same tokens.
        """
        if rows.chosen is None or rows.rejected is None:
            raise DataError(f"'{rows.source}' has no chosen and rejected answers to compare")
        write = Template(tokenizer, self.template).texts
        both = [[texts[-1] for texts in write(rows.answered(side))] for side in (rows.chosen, rows.rejected)]
        texts = [text for pair in zip(*both) for text in pair]
        lines = [line for line in rows.lines for _ in range(2)]
        if truncate:
            bos = tokenizer.bos_token_id
            texts = [text for pair in zip(*both) for text in _cut(pair, self.max_length, bos)]
        refuse_long(rows, lines, [text.ids for text in texts], self.max_length)
        alike = [line for line, one, other in zip(rows.lines, texts[::2], texts[1::2]) if one.ids == other.ids]
        refuse_rows(rows.source, ((line, "both answers are the same tokens to this base") for line in alike))
        learned = [[place for place in text.learned if place >= text.answer] for text in texts]
        return Pairs(
            ids=tuple(text.ids for text in texts),
            labels=tuple(tuple(text.ids[place] for place in own) for text, own in zip(texts, learned)),
            reads=tuple(tuple(place - 1 for place in own) for own in learned),
            lines=rows.lines,
            pad=tokenizer.pad_token_id or 0,
            each=2,
        )

    def informed(self, model: nn.Module, examples: Pairs, scores: Scores) -> Pairs:
        """The pairs with the base's log-probabilities of their answers."""
        with disabled(model):
            found = copy(examples)
            found.reference = scores(examples)
            return found

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """The log-probability of both answers `(pairs, 2)`, in nats."""
        assert batch.reads is not None
        each = losses(model, hidden, batch.labels, self.plain_logits)
        owners = batch.segments.owners()[batch.reads.cpu()].to(each.device)
        total = torch.zeros(len(batch.segments), device=each.device).index_add(0, owners, -each)
        return total.view(-1, 2)

    def loss(self, model: nn.Module, hidden: Tensor, batch: PairBatch) -> Tensor:
        """Summed over pairs."""
        assert batch.reference is not None
        counts = torch.tensor(batch.n_reads).view(-1, 2)
        return self._judged(self.scores(model, hidden, batch), batch.reference, counts)[1].sum()

    def metrics(self, scores: Tensor, examples: Pairs) -> dict[str, float]:
        """Share of pairs whose chosen answer gained more on the base than the rejected one (no gain of either counts
        half), mean margin, mean loss."""
        margins, each = self._measured(scores, examples)
        return {
            "reward_accuracy": float(_won(margins).mean()),
            "margin": float(margins.mean()),
            "loss": float(each.mean()),
        }

    def _measured(self, scores: Tensor, examples: Pairs) -> tuple[Tensor, Tensor]:
        assert examples.reference is not None
        counts = torch.tensor([len(own) for own in examples.labels]).view(-1, 2)
        return self._judged(scores.double(), examples.reference, counts)

    def _judged(self, scores: Tensor, reference: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Margin and loss of each pair; `counts (pairs, 2)` are tokens of answers."""
        gaps = scores - reference.to(scores)
        return VARIANTS[self.variant](gaps, counts.to(scores), self.beta, self.label_smoothing)

    def answers(
        self, rows: Preferences, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> Iterator[Generation]:
        """The answer to each dialogue, as `generate` writes it."""
        return self.writer.answers(rows.asked(), base, scores, truncate=truncate, **options)

    def predict(
        self, rows: Preferences, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> list[Generation]:
        """The same, all of them."""
        return list(self.answers(rows, base, scores, truncate=truncate, **options))

    def shown(self, found: Sequence[Generation]) -> str:
        """The answer; of several each under its question."""
        return self.writer.shown(found)

    def evaluate(self, rows: Preferences, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on pairs of answers."""
        pairs = self.informed(base.model, self.examples(rows, base.tokenizer, truncate=truncate), scores)
        found = scores(pairs)
        if pairs.reference is not None and torch.equal(found, pairs.reference):
            raise UsageError(
                "the model says just what its base says, so there is nothing to compare; of a merged model the base is "
                "no longer known: evaluate the run that it was made of"
            )
        margins, _ = self._measured(found, pairs)
        return Evaluation(self.metrics(found, pairs), bootstrap(_won(margins).tolist()), len(rows))

    def tried(self, base: Base, rows: Preferences) -> dict[str, Any]:
        """Asks a handful of held-out prompts, beside the chosen answers."""
        assert rows.chosen is not None
        return self.writer.tried(base, rows.answered(rows.chosen))

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """How many answers ended, and one of them."""
        return Generate.told(summary)


def _won(margins: Tensor) -> Tensor:
    return (torch.sign(margins) + 1) / 2


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cut(pair: tuple[Text, Text], max_length: int, bos: int | None) -> list[Text]:
    """Both texts in at most `max_length` tokens, with the same part of what was asked: as the longer one has room."""
    longer = max(pair, key=lambda text: len(text.ids))
    kept = cut(longer, max_length, bos)
    asked = kept.ids[: kept.answer]
    return [_moved(text, asked, max_length) for text in pair]


def _moved(text: Text, asked: Sequence[int], max_length: int) -> Text:
    """The text with `asked` before its answer, which loses what is beyond the bound."""
    ids = (*asked, *text.ids[text.answer :])[:max_length]
    moved = len(asked) - text.answer
    learned = (place + moved for place in text.learned if place >= text.answer)
    return Text(ids, tuple(place for place in learned if place < len(ids)), len(asked))
