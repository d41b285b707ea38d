"""complete: how texts go on. A causal language model learns raw text or code, every token of it, without a question.

The tokens of a document are x[1..n], the last of them end-of-text; before them stands x[0], begin-of-text where the
tokenizer puts it before texts, else end-of-text. What is longer than `window` tokens is cut. Window k is given
x[s - overlap .. e - 1] and learns x[s + 1 .. e], where its predecessor ended at s: every token is learned exactly once,
from at least `overlap` + 1 tokens before it where there are as many. A later window begins with begin-of-text too,
where the tokenizer puts it. Windows lie end to end, and none sees another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorakit.data.batches import Tokens
from lorakit.data.documents import Documents, load_documents, make_documents
from lorakit.data.faults import refuse_rows
from lorakit.data.rows import Splits
from lorakit.errors import UsageError
from lorakit.tasks.answers import Evaluation, few_short, mean_interval, no_scores
from lorakit.tasks.base import Base
from lorakit.tasks.causal import has_plain_logits
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.task import TASKS, Scores
from lorakit.tasks.template import Template
from lorakit.tasks.writing import CausalWriting

_WINDOW = 1024  # tokens: what a language model is mostly tuned with, though many take far longer texts
_TOGETHER = 256  # documents that are made into tokens at once
_FEW = 10  # documents, whose mean has no interval worth the name
_TRIED = 32  # tokens that a tried text begins with, at most; and gets

Ids = tuple[int, ...]


class Window(NamedTuple):
    """Token ids that are given; how many of them are only there to be seen; what the others learn, one token each."""

    ids: Ids
    seen: int
    labels: Ids


def windows(tokens: Sequence[int], first: int, head: Ids, longest: int, overlap: int) -> Iterator[Window]:
    """The windows of one document. `first` stands before its tokens, `head` before every window but the first."""
    given = (first, *tokens)
    begin = 0
    while begin < len(tokens):
        seen = min(overlap, begin)
        lead = head if begin else ()
        end = min(len(tokens), begin + longest - seen - len(lead))
        yield Window((*lead, *given[begin - seen : end]), len(lead) + seen, tuple(tokens[begin:end]))
        begin = end


@dataclass(frozen=True)
class Continuation:
    """How a text goes on; `stopped` tells whether it ended by itself, or at the bound of its length."""

    text: str
    continuation: str
    stopped: bool

    def __str__(self) -> str:
        return self.text + self.continuation


@TASKS.add_class
@dataclass(frozen=True)
class Complete(CausalWriting):
    """The longest text that the model takes, if its logits are plain, and how documents are cut: see above."""

    name = "complete"
    part = Documents
    columns = ("text",)
    choices = ("window", "overlap")
    try_it = "Once upon a time"

    max_length: int = 1024
    plain_logits: bool = True
    window: int = _WINDOW
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.window <= self.max_length:
            raise UsageError(
                f"window is {self.window}; it must be from 4 to {self.max_length} tokens, which is the most"
            )
        if not 0 <= self.overlap <= self.window - 4:
            raise UsageError(f"overlap is {self.overlap}; it must be from 0 to {self.window - 4} tokens (window - 4)")

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Documents:
        """Documents of a file, a folder or a table."""
        return load_documents(source, text=columns.get("text"))

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Documents:
        """Texts to go on with."""
        return make_documents(given)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Complete":
        """With windows of 1024 tokens, or what the model takes."""
        return cls(base.max_length, has_plain_logits(base.model), min(_WINDOW, base.max_length))

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Complete":
        """The inverse of `note`."""
        cut = int(note["window"]), int(note["overlap"])
        return cls(int(note["max_length"]), bool(note["plain_logits"]), *cut)

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"max_length": self.max_length, "plain_logits": self.plain_logits}
        return {"name": self.name, **known, "window": self.window, "overlap": self.overlap}

    def examples(self, rows: Documents, tokenizer: Any, *, truncate: bool) -> Tokens:
        """All windows, in order, with the line of their document; its first one has its bytes as `sizes`.

        DataError where the tokenizer finds no token in a document. Nothing is too long, so `truncate` means nothing.
        """
        template = Template(tokenizer, "")
        first, head = _first(template), template.begin
        found: list[Window] = []
        lines: list[int] = []
        sizes: list[Ids] = []
        faults: list[tuple[int, str]] = []
        for line, text, ids in _tokens(rows, tokenizer):
            if not ids:
                faults.append((line, "the tokenizer finds no token in it"))
            tokens = ids if line in rows.unended else [*ids, template.eos]
            own = list(windows(tokens, first, head, self.window, self.overlap))
            found += own
            lines += [line] * len(own)
            sizes += [(0,) if k else (len(text.encode()),) for k in range(len(own))]
        refuse_rows(rows.source, faults, "remove them")
        whole = not (head or self.overlap)  # then every token is read, of any rows
        reads = [() if whole else range(window.seen, len(window.ids)) for window in found]
        given, labels = [window.ids for window in found], [window.labels for window in found]
        return Tokens(given, labels, reads, lines, tokenizer.pad_token_id or 0, sizes=sizes)

    def metrics(self, scores: Tensor, examples: Tokens) -> dict[str, float]:
        """Loss (nats a token, over all tokens), perplexity, share of tokens predicted right; and the bits that a byte
        of text (UTF-8) takes, which does not depend on the tokenizer."""
        assert examples.sizes is not None
        n_bytes = int(examples.sizes.values.sum())
        bits = float(scores[:, 0].double().sum()) / math.log(2)
        return {**super().metrics(scores, examples), "bits_per_byte": bits / n_bytes}

    def answers(
        self, rows: Documents, base: Base, scores: Scores, *, truncate: bool = False, **options: Any
    ) -> Iterator[Continuation]:
        """How each text goes on, as it comes; `options` are those of `say`."""
        template = Template(base.tokenizer, "")
        first = _first(template)
        questions = [(first, *ids) for _, _, ids in _tokens(rows, base.tokenizer)]
        asked, written = self.say(rows, questions, base, begin=first, ends=template.ends, truncate=truncate, **options)
        for text, question, (ids, stopped) in zip(rows.texts, asked, written):
            yield Continuation(text, _behind(base.tokenizer, question[1:], ids), stopped)

    def shown(self, found: Sequence[Continuation]) -> str:
        """Texts with what follows."""
        return "\n\n".join(map(str, found))

    def evaluate(self, rows: Documents, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on documents, with intervals over documents; of fewer than ten over windows."""
        tokens = self.examples(rows, base.tokenizer, truncate=truncate)
        assert tokens.sizes is not None
        each = scores(tokens)
        sums = torch.cat([each.double(), tokens.sizes.values[:, None].double()], 1)
        if len(rows) >= _FEW:
            own = torch.as_tensor(np.unique(tokens.lines, return_inverse=True)[1])
            sums = torch.zeros(len(rows), 4, dtype=torch.float64).index_add(0, own, sums)
        low, high = mean_interval(sums)
        intervals = {"loss": (low, high), "perplexity": (math.exp(min(low, 700.0)), math.exp(min(high, 700.0)))}
        if len(rows) >= _FEW:
            bits = bootstrap(sums[:, [0, 3]], lambda drawn: drawn[:, 0] / drawn[:, 1] / math.log(2))
            intervals["bits_per_byte"] = bits
        unit = "documents" if len(rows) >= _FEW else "windows, for there are few documents"
        n_tokens, kind = int(each[:, 1].double().sum()), f"tokens; intervals over {unit}"
        return Evaluation(self.metrics(each, tokens), intervals, len(rows), n_tokens, kind)

    def tried(self, base: Base, rows: Documents) -> dict[str, Any]:
        """Goes on with a handful of held-out texts, of those that are shorter, from their beginnings."""
        some = rows.take(few_short([len(text) for text in rows.texts]))
        decode, begun = base.tokenizer.decode, list[tuple[str, str]]()
        for _, _, ids in _tokens(some, base.tokenizer):
            n = min(_TRIED, self.max_length // 2, (len(ids) + 1) // 2)
            begun.append((decode(ids[:n]), _behind(base.tokenizer, tuple(ids[:n]), ids[n : n + _TRIED])))
        found = self.predict(
            make_documents([prompt for prompt, _ in begun]), base, no_scores, truncate=True, max_new_tokens=_TRIED
        )
        example = {"prompt": begun[0][0], "answer": found[0].continuation, "expected": begun[0][1]}
        return {"tried": len(found), "example": example}

    @classmethod
    def told(cls, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
        """One of them."""
        words = (("for example", "prompt"), ("  goes on", "answer"), ("  the text did", "expected"))
        return [(word, f"{summary['example'][key][-200:]!r}") for word, key in words]


def _first(template: Template) -> int:
    """The token that stands before a document."""
    return (*template.begin, template.eos)[0]


def _tokens(rows: Documents, tokenizer: Any) -> Iterator[tuple[int, str, list[int]]]:
    """Line, text and token ids of each document, without what the tokenizer would put around it."""
    for k in range(0, len(rows), _TOGETHER):
        texts = list(rows.texts[k : k + _TOGETHER])
        yield from zip(rows.lines[k:], texts, tokenizer(texts, add_special_tokens=False)["input_ids"])


def _behind(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What these tokens say behind those before them: with the blank between, which many tokenizers write otherwise at
    the beginning of a text."""
    start, whole = (tokenizer.decode(x, skip_special_tokens=True) for x in (list(before), [*before, *ids]))
    return str(whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids, skip_special_tokens=True))
