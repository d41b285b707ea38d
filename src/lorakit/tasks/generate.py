"""generate: an answer, token by token, to what was asked. Instruction tuning of a causal language model.

Only answers are learned (tasks/template.py says which tokens those are): the hidden state of the token before each of
them is read, and its loss is that of the next token. There is no head of its own; the base's writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lorakit.data.batches import Tokens
from lorakit.data.dialogues import Dialogues, load_dialogues, make_dialogues
from lorakit.data.faults import refuse_rows
from lorakit.data.rows import Splits
from lorakit.tasks.answers import Evaluation, few_short, no_scores, room_for, told_endings
from lorakit.tasks.base import Base
from lorakit.tasks.causal import has_plain_logits
from lorakit.tasks.overlap import references
from lorakit.tasks.task import TASKS, Scores, refuse_long
from lorakit.tasks.template import Template, cut
from lorakit.tasks.writing import CausalWriting


@dataclass(frozen=True)
class Generation:
    """The answer to one text; `stopped` tells whether it ended by itself, or at the bound of its length."""

    text: str
    answer: str
    stopped: bool

    def __str__(self) -> str:
        return self.answer


@TASKS.add_class
@dataclass(frozen=True)
class Generate(CausalWriting):
    """The chat template ("" is ours), the longest text, and if logits are plainly hidden states times a weight."""

    name = "generate"
    part = Dialogues
    wishes = ("template",)
    columns = ("prompt", "answer")
    asks = ("write",)
    try_it = "your question"

    template: str = ""
    max_length: int = 1024
    plain_logits: bool = True

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Dialogues:
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

    def answers(
        self, rows: Dialogues, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> Iterator[Generation]:
        """The answer to each dialogue, as it comes; `options` are those of `say`."""
        template = Template(base.tokenizer, self.template)
        begin, questions = base.tokenizer.bos_token_id, template.questions(rows)
        _, written = self.say(rows, questions, base, begin=begin, ends=template.ends, truncate=truncate, **options)
        decode = base.tokenizer.decode
        for turns, (ids, stopped) in zip(rows.turns, written):
            yield Generation(turns[-1].content, decode(ids, skip_special_tokens=True), stopped)

    def shown(self, found: Sequence[Generation]) -> str:
        """The answer; of several each under its question."""
        if len(found) == 1:
            return found[0].answer
        return "\n\n".join(f"> {one.text}\n{one.answer}" for one in found)

    def evaluate(
        self, rows: Dialogues, base: Base, scores: Scores, *, truncate: bool, write: bool = False
    ) -> Evaluation:
        """Metrics on dialogues with answers. With `write` an answer is written to each that is asked, and measured
        against all last answers that the rows have for it."""
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        sums = scores(tokens)
        told = Evaluation.of(self.metrics(sums, tokens), sums, len(rows), "tokens of answers")
        if not write:
            return told
        asked = rows.asked()
        firsts, known = references(asked.turns, [answer or "" for answer in rows.answers])
        longest = max(len(labels) for labels in tokens.labels)
        most = max(room_for(longest), longest)
        found = self.predict(asked.take(firsts), base, no_scores, truncate=truncate, max_new_tokens=most)
        return told.beside([one.answer for one in found], [one.stopped for one in found], known)

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
