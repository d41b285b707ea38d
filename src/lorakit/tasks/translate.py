"""translate: from a text to a text by an encoder-decoder (T5, BART, Marian ...): translation, summarising, rewriting.

The encoder reads the source, the decoder writes the target. Its inputs are the target's tokens shifted right, so every
token of the target is learned from those before it. There is no head of its own; the base's writes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.data.batches import TextBatch, Tokens
from lorakit.data.faults import refuse_rows
from lorakit.data.rows import Splits
from lorakit.data.translations import Translations, load_translations, make_translations
from lorakit.errors import DataError, UsageError
from lorakit.tasks.answers import Evaluation, few_short, no_scores, room_for, sums_of_texts, told_endings
from lorakit.tasks.base import Base
from lorakit.tasks.decode import Answers, rewritten
from lorakit.tasks.overlap import references
from lorakit.tasks.seq2seq import each_loss, head_of, logit_scale, summed_loss
from lorakit.tasks.task import TASKS, Scores, refuse_long
from lorakit.tasks.writing import Writing
from lorakit.trunk import PairTrunk

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Translation:
    """What one text became; `stopped` tells whether it ended by itself, or at the bound of its length."""

    text: str
    target: str
    stopped: bool

    def __str__(self) -> str:
        return self.target


@TASKS.add_class
@dataclass(frozen=True)
class Translate(Writing):
    """What stands in front of every source, the longest text, how the decoder begins and ends, and `logit_scale`."""

    name = "translate"
    part = Translations
    output = "seq2seq"
    wishes = ("source_prefix",)
    columns = ("source", "target")
    options = ("max_new_tokens", "beams")
    peft_task = "SEQ_2_SEQ_LM"
    try_it = "your text"

    source_prefix: str
    max_length: int
    start: int
    ends: Ids
    scale: float

    @classmethod
    def read(cls, source: str | Path, /, *, answers: bool = True, **columns: str | None) -> Translations:
        """Texts and targets of one table."""
        return load_translations(source, source=columns.get("source"), target=columns.get("target"), targets=answers)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Translations:
        """Texts without targets."""
        return make_translations(given)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Translate":
        """As the base wants it. UsageError if it is no encoder-decoder, or does not say how a text begins and ends."""
        scale = logit_scale(base.model)
        start, ends = _marks(base)
        return cls(base.source_prefix, base.max_length, start, ends, scale)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Translate":
        """The inverse of `note`."""
        ends = tuple(int(end) for end in note["ends"])
        return cls(note["source_prefix"], int(note["max_length"]), int(note["start"]), ends, float(note["logit_scale"]))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"source_prefix": self.source_prefix, "max_length": self.max_length, "start": self.start}
        return {"name": self.name, **known, "ends": list(self.ends), "logit_scale": self.scale}

    def prepare(self, model: nn.Module) -> None:
        """The base brings its head; UsageError where it does not."""
        head_of(model)

    def trunk(self, model: nn.Module, *, dtype: str, pad: int, keep: bool = True) -> PairTrunk:
        """What runs encoder and decoder fast."""
        return PairTrunk(model, dtype=dtype, pad=pad, keep=keep)

    def examples(self, rows: Translations, tokenizer: Any, *, truncate: bool) -> Tokens:
        """Of each row two texts: the source's tokens; and what the decoder is given, all of it read, with its labels.

        `truncate` cuts the end of what is too long. DataError where a target is not known, or a text is too long.
        """
        if rows.targets is None:
            raise DataError(f"'{rows.source}' has no targets; they are needed to learn from and to measure by")
        sources = self._sources(rows, tokenizer, truncate)
        cut = {"truncation": truncate, "max_length": self.max_length if truncate else None}
        encoded = tokenizer(text_target=list(rows.targets), **cut)["input_ids"]
        targets = [self._ended(tuple(ids), truncate) for ids in encoded]
        refuse_long(rows, rows.lines, targets, self.max_length)
        ids, labels, reads = list[Ids](), list[Ids](), list[Ids]()
        for source, target in zip(sources, targets):
            ids += [source, (self.start, *target[:-1])]
            labels += [(), target]
            reads += [(), tuple(range(len(target)))]
        return Tokens(tuple(ids), tuple(labels), tuple(reads), rows.lines, tokenizer.pad_token_id or 0, each=2)

    def _sources(self, rows: Translations, tokenizer: Any, truncate: bool) -> list[Ids]:
        texts = [self.source_prefix + text for text in rows.texts]
        encoded = tokenizer(texts, truncation=truncate, max_length=self.max_length if truncate else None)["input_ids"]
        found = [tuple(ids) for ids in encoded]
        refuse_long(rows, rows.lines, found, self.max_length)
        why = "the tokenizer finds no token in its text"
        refuse_rows(rows.source, ((line, why) for line, ids in zip(rows.lines, found) if not ids))
        return found

    def _ended(self, ids: Ids, truncate: bool) -> Ids:
        """With an end, where the tokenizer sets none."""
        if ids and ids[-1] in self.ends:
            return ids
        return (*(ids[: self.max_length - 1] if truncate else ids), self.ends[0])

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        return summed_loss(model, hidden, batch.labels, self.scale)

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Of each pair: summed loss, tokens of the target, how many of them were the most probable ones."""
        assert batch.reads is not None
        each = each_loss(model, hidden, batch.labels, self.scale)
        return sums_of_texts(each, batch.segments.owners()[batch.reads.cpu()] // 2, len(batch.segments) // 2)

    def answers(
        self, rows: Translations, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> Iterator[Translation]:
        """What each text becomes, as it comes; `options` are those of `say`."""
        written = self.say(self._sources(rows, base.tokenizer, truncate), base, **options)
        decode = base.tokenizer.decode
        for text, (ids, stopped) in zip(rows.texts, written):
            yield Translation(text, decode(ids, skip_special_tokens=True).strip(), stopped)

    def say(
        self,
        sources: Sequence[Ids],
        base: Base,
        *,
        max_new_tokens: int = 256,
        beams: int = 1,
        watch: Callable[[int, int], object] | None = None,
    ) -> Answers:
        """What these tokens become. With several `beams` the best of what they find, else the most probable each time.
        `watch` is called with how many are done, of all."""
        if max_new_tokens < 1 or beams < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens} and beams {beams}; both must be at least 1")
        pad, most = base.tokenizer.pad_token_id or 0, min(max_new_tokens, self.max_length)
        return rewritten(
            base.model, sources, start=self.start, ends=self.ends, pad=pad, most=most, beams=beams, watch=watch
        )

    def shown(self, found: Sequence[Translation]) -> str:
        """What the text became; of several each under its text."""
        if len(found) == 1:
            return found[0].target
        return "\n\n".join(f"> {one.text}\n{one.target}" for one in found)

    def evaluate(self, rows: Translations, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Loss on the rows; and what is written for each text against all targets that the rows have for it."""
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        assert rows.targets is not None
        sums = scores(tokens)
        firsts, known = references(rows.texts, rows.targets)
        longest = max(len(labels) for labels in tokens.labels)
        most = max(room_for(longest), longest)
        found = self.predict(rows.take(firsts), base, scores, truncate=truncate, max_new_tokens=most)
        told = Evaluation.of(self.metrics(sums, tokens), sums, len(rows), "tokens of targets")
        return told.beside([one.target for one in found], [one.stopped for one in found], known)

    def tried(self, base: Base, rows: Translations) -> dict[str, Any]:
        """Translates a handful of held-out texts, of those with the shorter targets: do answers end by themselves?"""
        assert rows.targets is not None
        some = rows.take(few_short([len(target) for target in rows.targets]))
        assert some.targets is not None
        tokens = self.examples(some, base.tokenizer, truncate=True)
        most = min(room_for(max(len(labels) for labels in tokens.labels)), self.max_length)
        found = self.predict(some, base, no_scores, truncate=True, max_new_tokens=most)
        example = {"prompt": found[0].text, "answer": found[0].target, "expected": some.targets[0]}
        ended = sum(one.stopped for one in found)
        return {"ends_by_itself": ended / len(found), "tried": len(found), "tried_tokens": most, "example": example}

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """How many answers ended, one of them, and a warning if none did."""
        return told_endings(summary)


def _marks(base: Base) -> tuple[int, Ids]:
    """The token that a decoder begins with, and those that end a text."""
    model: Any = base.model
    places = (getattr(model, "generation_config", None), model.config)
    start = next((x for x in (getattr(p, "decoder_start_token_id", None) for p in places) if x is not None), None)
    end = next((x for x in (getattr(p, "eos_token_id", None) for p in places) if x is not None), None)
    if end is None:
        end = base.tokenizer.eos_token_id
    if start is None or end is None:
        which = "decoder_start_token_id" if start is None else "eos_token_id"
        raise UsageError(f"the config.json of '{base.name}' has no {which}; add it, as the base was made with")
    return int(start), tuple(int(x) for x in (end if isinstance(end, Sequence) else [end]))
