"""generate: an answer, token by token, to what was asked. Instruction tuning of a causal language model.

Only answers are learned (tasks/template.py says which tokens those are): the hidden state of the token before each of
them is read, and its loss is that of the next token. There is no head of its own; the base's writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from lorakit.data.batches import TextBatch, Tokens
from lorakit.data.dialogues import Dialogues, load_dialogues, make_dialogues
from lorakit.data.faults import refuse_rows
from lorakit.data.rows import Splits
from lorakit.errors import UsageError
from lorakit.tasks.answers import (
    few_short,
    mean_interval,
    no_scores,
    room_for,
    sums_of_texts,
    token_metrics,
    told_endings,
)
from lorakit.tasks.base import Base
from lorakit.tasks.causal import each_loss, has_plain_logits, head_of, summed_loss
from lorakit.tasks.decode import Spoken, continued
from lorakit.tasks.task import TASKS, Measured, Scores, Task, refuse_long
from lorakit.tasks.template import Template, Text

_SHARE = 4  # a cut text keeps at least a quarter of its room for what was asked


@dataclass(frozen=True)
class Generation:
    """The answer to one text; `stopped` tells whether it ended by itself, or at the bound of its length."""

    text: str
    answer: str
    stopped: bool

    def __str__(self) -> str:
        return self.answer


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over rows; `loss_interval` is a 95 % bootstrap interval over texts; `n_tokens` of answers."""

    metrics: dict[str, float]
    loss_interval: tuple[float, float]
    n_rows: int
    n_tokens: int

    def __str__(self) -> str:
        low, high = self.loss_interval
        return (
            f"loss {self.metrics['loss']:.3f} nats a token (95 % interval {low:.3f} to {high:.3f}), "
            f"perplexity {self.metrics['perplexity']:.3f}, token accuracy {self.metrics['token_accuracy']:.1%}, "
            f"{self.n_rows} rows, {self.n_tokens} tokens of answers"
        )


@TASKS.add_class
@dataclass(frozen=True)
class Generate(Task):
    """The chat template ("" is ours), the longest text, and if logits are plainly hidden states times a weight."""

    name = "generate"
    part = Dialogues
    metric = "loss"
    drawn = "token_accuracy"
    output = "causal"
    wishes = ("template",)
    columns = ("prompt", "answer")
    options = ("max_new_tokens", "temperature", "seed")
    peft_task = "CAUSAL_LM"
    try_it = "your question"

    template: str = ""
    max_length: int = 1024
    plain_logits: bool = True

    @classmethod
    def read(cls, source: Any, *, answers: bool = True, **columns: str | None) -> Dialogues:
        """Dialogues of one table."""
        return load_dialogues(source, prompt=columns.get("prompt"), answer=columns.get("answer"), answers=answers)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Dialogues:
        """Prompts, or lists of messages, as dialogues that end with what is asked."""
        return make_dialogues(given).asked()

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Generate":
        """Written as the base wants it."""
        return cls(base.template, base.max_length, has_plain_logits(base.model))

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Generate":
        """The inverse of `note`."""
        return cls(note["template"], int(note["max_length"]), bool(note["plain_logits"]))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"template": self.template, "max_length": self.max_length, "plain_logits": self.plain_logits}
        return {"name": self.name, **known}

    def prepare(self, model: nn.Module) -> None:
        """The base brings its head; UsageError where it does not."""
        head_of(model)

    def examples(self, rows: Dialogues, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Token ids of all texts; of each answer's tokens the id, and the place before it.

        A dialogue may become several texts (tasks/template.py). `truncate` cuts the beginning of what stands before
        the last answer (not the begin-of-text token); where the answer alone fills more than three quarters of the
        longest text, its end is cut too. DataError where an answer was not known, or a text is too long.
        """
        refuse_rows(
            rows.source,
            ((line, "it has no answer to learn") for line, answer in zip(rows.lines, rows.answers) if answer is None),
        )
        found = Template(tokenizer, self.template).texts(rows)
        lines = tuple(line for line, texts in zip(rows.lines, found) for _ in texts)
        texts = [text for texts in found for text in texts]
        if truncate:
            texts = [cut(text, self.max_length, tokenizer.bos_token_id) for text in texts]
        refuse_long(rows, lines, [text.ids for text in texts], self.max_length)
        labels = tuple(tuple(text.ids[place] for place in text.learned) for text in texts)
        reads = tuple(tuple(place - 1 for place in text.learned) for text in texts)
        return Tokens(tuple(text.ids for text in texts), labels, reads, lines, tokenizer.pad_token_id or 0)

    def preview(self, examples: Tokens, number: int, tokenizer: Any) -> str:
        """A text, what is learned of it between « and »."""
        ids, learned = examples.ids[number], {int(place) + 1 for place in examples.reads[number]}
        pieces = groupby(range(len(ids)), key=learned.__contains__)
        told = ((tokenizer.decode([ids[i] for i in places]), wanted) for wanted, places in pieces)
        return "".join(f"«{text}»" if wanted else str(text) for text, wanted in told)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        return summed_loss(model, hidden, batch.labels, self.plain_logits)

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Of each text: summed loss, tokens of answers, how many of them were the most probable ones."""
        assert batch.reads is not None
        each = each_loss(model, hidden, batch.labels, self.plain_logits)
        return sums_of_texts(each, batch.segments.owners()[batch.reads.cpu()], len(batch.segments))

    def metrics(self, scores: Tensor, tokens: Tokens) -> dict[str, float]:
        """Loss (nats for each token of an answer, over all tokens), perplexity, share of tokens predicted right."""
        return token_metrics(scores)

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None) -> bool:
        """A lower loss."""
        return old is None or new["loss"] < old["loss"]

    def predict(
        self,
        rows: Dialogues,
        base: Base,
        scores: Scores,
        *,
        truncate: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        heard: Callable[[str], object] | None = None,
        watch: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """The answer to each dialogue: the most probable one, token by token, or one drawn if `temperature` is above 0.

        `truncate` cuts the beginning of what is asked where there is no room left for an answer. `heard` gets the
        answer to a single dialogue piece by piece, as it is written.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise UsageError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}; they must be at least 1 and 0"
            )
        template = Template(base.tokenizer, self.template)
        questions = template.questions(rows)
        longest = max(1, self.max_length - (min(max_new_tokens, self.max_length // _SHARE) if truncate else 1))
        if truncate:
            bos = base.tokenizer.bos_token_id
            questions = [cut(Text(ids, (), len(ids)), longest, bos).ids for ids in questions]
        refuse_long(rows, rows.lines, questions, longest)
        written = continued(
            base.model,
            questions,
            ends=template.ends,
            most=max_new_tokens,
            max_length=self.max_length,
            temperature=temperature,
            seed=seed,
            heard=None if heard is None else Spoken(base.tokenizer, template.ends, heard).hear,
            watch=watch,
        )
        decode = base.tokenizer.decode
        return [
            Generation(turns[-1].content, decode(ids, skip_special_tokens=True), stopped)
            for turns, (ids, stopped) in zip(rows.turns, written)
        ]

    def shown(self, found: Sequence[Generation]) -> str:
        """The answer; of several each under its question."""
        if len(found) == 1:
            return found[0].answer
        return "\n\n".join(f"> {one.text}\n{one.answer}" for one in found)

    def evaluate(self, rows: Dialogues, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on dialogues with answers."""
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        found = scores(tokens)
        n_tokens = int(found[:, 1].sum())
        return Evaluation(self.metrics(found, tokens), mean_interval(found), len(rows), n_tokens)

    def tried(self, base: Base, rows: Dialogues) -> dict[str, Any]:
        """Asks a handful of held-out prompts, of those with the shorter answers: do answers end by themselves?"""
        some = rows.take(few_short([len(answer or "") for answer in rows.answers]))
        texts = Template(base.tokenizer, self.template).texts(some)
        expected = max(len(written[-1].ids) - written[-1].answer for written in texts)
        most = room_for(expected)
        found = self.predict(some.asked(), base, no_scores, truncate=True, max_new_tokens=most)
        example = {"prompt": found[0].text, "answer": found[0].answer, "expected": some.answers[0]}
        ended = sum(one.stopped for one in found)
        return {"ends_by_itself": ended / len(found), "tried": len(found), "tried_tokens": most, "example": example}

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """How many answers ended, one of them, and a warning if none did."""
        return told_endings(summary)


def cut(text: Text, max_length: int, bos: int | None = None) -> Text:
    """The text in at most `max_length` tokens: without the beginning of what stands before its last answer.

    That part keeps at least a quarter of the room, or all it has; beyond it the answer loses its end. A leading `bos`
    stays. A token whose predecessor was cut away is not learned.
    """
    if len(text.ids) <= max_length:
        return text
    room = max(max_length - (len(text.ids) - text.answer), min(text.answer, max(1, max_length // _SHARE)))
    room = min(room, text.answer)
    kept = text.ids[:1] if text.ids[0] == bos and room > 1 else ()
    begin, end = text.answer - room + len(kept), text.answer + max_length - room
    moved = len(kept) - begin
    learned = tuple(place + moved for place in text.learned if begin < place < end)
    return Text(kept + text.ids[begin:end], learned, text.answer + moved)
