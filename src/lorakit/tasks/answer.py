"""answer: the answer to a question, found in a text (extractive question answering, as in SQuAD).

A context that does not fit becomes several windows that overlap. In each two scores are learned for every token of the
context, where an answer begins and where it ends, and for the first token of all: there both point where the window has
no answer (Devlin et al., 2018, BERT, section 4.3). The answer to a question is the span, over all its windows, that is
most probable against "none" of its window; the odds are what windows can be compared by, for the softmax is over each.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorakit.data.batches import IGNORED, TextBatch, Tokens
from lorakit.data.faults import refuse, refuse_rows
from lorakit.data.questions import Questions, Quote, load_questions, make_questions
from lorakit.data.rows import Splits
from lorakit.errors import DataError
from lorakit.tasks.base import Base
from lorakit.tasks.heads import give_head
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.squad import compared
from lorakit.tasks.task import TASKS, Measured, Scores, Task, refuse_long

HEAD = "qa_outputs"  # as Transformers calls it
_LONGEST = 30  # tokens of an answer, as BERT's script has it
_WINDOW = 384  # tokens of a window at the most, as that script has it
_OVERLAP = 3  # windows share a third of theirs: 128 of 384

Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Found:
    """The answer to one question ("" for none), the character of the context at which it begins (-1), and how probable
    it is in its window."""

    question: str
    answer: str
    start: int
    probability: float

    def __str__(self) -> str:
        return f"{self.probability:6.1%}  {self.answer or '(no answer)'}"


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over questions; `f1_interval` is a 95 % bootstrap interval; `per_kind`: with an answer, and without."""

    metrics: dict[str, float]
    f1_interval: tuple[float, float]
    n_rows: int
    per_kind: dict[str, dict[str, float]]

    def __str__(self) -> str:
        low, high = self.f1_interval
        lines = [
            f"F1 {self.metrics['f1']:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"exact match {self.metrics['exact_match']:.3f}, loss {self.metrics['loss']:.3f}, {self.n_rows} rows"
        ]
        lines += [
            f"{kind}: F1 {values['f1']:.3f}, exact match {values['exact_match']:.3f}, {values['rows']} rows"
            for kind, values in self.per_kind.items()
            if len(self.per_kind) > 1
        ]
        return "\n".join(lines)


class Windows(Tokens):
    """The windows of all `rows`: of each the row that it belongs to (`owners`), and the characters of every token that
    is read (`places`; the first stands for "no answer")."""

    def __init__(self, rows: Questions, owners: Sequence[int], places: Sequence[Places], **tokens: Any) -> None:
        super().__init__(**tokens)
        self.rows, self.owners, self.places = rows, owners, places


class Best(NamedTuple):
    """The best answer to a question: text, start, log probability in its window, and how much above "none"."""

    text: str
    start: int
    logp: float
    odds: float


@TASKS.add_class
@dataclass(frozen=True)
class Answer(Task):
    """The longest window, if the base knows token types, and if a question may have no answer."""

    name = "answer"
    part = Questions
    metric = "f1"
    drawn = "f1"
    head = HEAD
    columns = ("question", "context", "answer", "begin")
    try_it = "Who wrote it? It was written by Ann in 1990."

    max_length: int = 384
    types: bool = False
    may_be_none: bool = False

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Questions:
        """Questions, contexts and answers of one file."""
        return load_questions(source, answers=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Questions:
        """Each {question, context}, a pair of both, or one text with both."""
        return make_questions(given)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Answer":
        """As the base takes texts, and as the training rows have answers."""
        n_types = int(getattr(base.model.config, "type_vocab_size", 0) or 0)  # type: ignore[arg-type]
        types = n_types > 1 and "token_type_ids" in base.tokenizer.model_input_names
        return cls(min(base.max_length, _WINDOW), types, data.train.n_empty > 0)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Answer":
        """The inverse of `note`."""
        return cls(int(note["max_length"]), bool(note["types"]), bool(note["may_be_none"]))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        known = {"max_length": self.max_length, "types": self.types, "may_be_none": self.may_be_none}
        return {"name": self.name, **known}

    def prepare(self, model: nn.Module) -> None:
        """Gives the trunk its head: a score for the begin of an answer, and one for its end."""
        give_head(model, HEAD, 2, "scores")

    def examples(self, rows: Questions, tokenizer: Any, *, truncate: bool) -> Windows:
        """All windows; of each the places of the first token and of the context's, and as labels, among these, those of
        the first answer's begin and end: 0 where the window does not hold it, -100 where it is not known.

        A question may take half a window; `truncate` cuts what is longer.
        """
        questions, most = list(rows.questions), self.max_length // 2
        asked = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
        if not truncate:
            why = f", half of the {self.max_length} that the base reads"
            refuse_long(rows, rows.lines, asked["input_ids"], most, "question", why)
        for i, places in enumerate(asked["offset_mapping"]):
            if len(places) > most:
                questions[i] = questions[i][: places[most - 1][1]]
        encoded = tokenizer(
            questions,
            list(rows.contexts),
            truncation="only_second",
            max_length=self.max_length,
            stride=self.max_length // _OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=self.types,
        )
        owners = tuple(encoded["overflow_to_sample_mapping"])
        windows: list[tuple[tuple[int, ...], Places]] = []
        for i, places in enumerate(encoded["offset_mapping"]):
            own = [at for at, kind in enumerate(encoded.sequence_ids(i)) if kind == 1]
            windows.append(((0, *own), ((0, 0), *(tuple(places[at]) for at in own))))
        reads, characters = zip(*windows)
        types = encoded["token_type_ids"] if self.types else ()
        return Windows(
            rows,
            owners,
            characters,
            ids=encoded["input_ids"],
            labels=_labels(rows, owners, characters),
            reads=reads,
            lines=[rows.lines[owner] for owner in owners],
            pad=tokenizer.pad_token_id or 0,
            types=types,
        )

    def _logits(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """`(windows, most reads, 2)`: of begin and end; -inf where a window has fewer."""
        logits: Tensor = model.get_submodule(HEAD)(hidden.float())
        return pad_sequence(list(torch.split(logits, batch.n_reads)), batch_first=True, padding_value=-torch.inf)

    def loss(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Summed cross-entropy of begins and ends, in nats; the softmax is over each window."""
        logits = self._logits(model, hidden, batch)
        labels = batch.labels.to(logits.device).view(-1, 2)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    def scores(self, model: nn.Module, hidden: Tensor, batch: TextBatch) -> Tensor:
        """Of each window: loss, log probability of its best span and of none, begin and end of that span."""
        logits = self._logits(model, hidden, batch)
        labels = batch.labels.to(logits.device).view(-1, 2)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(1)
        begins, ends = logits.log_softmax(1).unbind(-1)
        best, at = best_spans(begins[:, 1:], ends[:, 1:])
        return torch.stack([loss, best, begins[:, 0] + ends[:, 0], at[:, 0] + 1.0, at[:, 1] + 1.0], -1)

    def metrics(self, scores: Tensor, windows: Windows) -> dict[str, float]:
        """Of questions F1 and exact match (SQuAD); mean loss of the windows' begins and ends."""
        pairs = self._compared(scores, windows)
        f1, exact = (sum(pair[k] for pair in pairs) / len(pairs) for k in (1, 0))
        return {"f1": f1, "exact_match": exact, "loss": float(scores[:, 0].double().sum()) / (2 * len(scores))}

    def _compared(self, scores: Tensor, windows: Windows) -> list[tuple[float, float]]:
        """Exact match and F1 of each question."""
        pairs = zip(self._best(scores, windows), windows.rows.answers or ())
        return [compared(best.text, [answer.text for answer in right]) for best, right in pairs]

    def _best(self, scores: Tensor, windows: Windows) -> list[Best]:
        """The answer to each question."""
        own: dict[int, list[int]] = defaultdict(list)
        for k, owner in enumerate(windows.owners):
            own[owner].append(k)
        values, found = scores.tolist(), list[Best]()
        for i, context in enumerate(windows.rows.contexts):
            k = max(own[i], key=lambda k: values[k][1] - values[k][2])
            _, logp, none, begin, end = values[k]
            odds = logp - none
            if self.may_be_none and odds < 0:
                found.append(Best("", -1, none, odds))
                continue
            first, last = windows.places[k][int(begin)][0], windows.places[k][int(end)][1]
            text = context[first:last]
            first += len(text) - len(text.lstrip())  # some tokenizers count the space before a word to it
            found.append(Best(text.strip(), first, logp, odds))
        return found

    def predict(self, rows: Questions, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Found]:
        """The answer to each question."""
        windows = self.examples(replace(rows, answers=None), base.tokenizer, truncate=truncate)
        best = self._best(scores(windows), windows)
        return [Found(asked, one.text, one.start, exp(one.logp)) for asked, one in zip(rows.questions, best)]

    def shown(self, found: Sequence[Found]) -> str:
        """The answer; of several each under its question."""
        if len(found) == 1:
            return str(found[0])
        return "\n".join(f"> {one.question}\n{one}" for one in found)

    def evaluate(self, rows: Questions, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on questions with answers. DataError for those without one, if it has not learned that."""
        if rows.answers is None:
            raise DataError(f"'{rows.source}' has no answers to evaluate against")
        faults = [] if self.may_be_none else rows.empty("all training rows had one; remove this one")
        refuse(faults)
        windows = self.examples(rows, base.tokenizer, truncate=truncate)
        found = scores(windows)
        pairs = self._compared(found, windows)
        kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for pair, answers in zip(pairs, rows.answers):
            kinds["with an answer" if answers else "without an answer"].append(pair)
        per_kind: dict[str, dict[str, float]] = {}
        for kind, own in sorted(kinds.items()):
            exact, f1 = (sum(column) / len(own) for column in zip(*own))
            per_kind[kind] = {"rows": len(own), "f1": f1, "exact_match": exact}
        return Evaluation(self.metrics(found, windows), bootstrap([f1 for _, f1 in pairs]), len(rows), per_kind)


def best_spans(begins: Tensor, ends: Tensor, longest: int = _LONGEST) -> tuple[Tensor, Tensor]:
    """The most probable span of each window, and its first and last place: `(windows, n)` twice -> `(windows,)`,
    `(windows, 2)`. A span has at most `longest` tokens."""
    ahead = F.pad(ends, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (windows, n, longest)
    best, at = (begins[:, :, None] + ahead).flatten(1).max(1)
    first = at // longest
    return best, torch.stack([first, first + at % longest], -1)


def _labels(rows: Questions, owners: Sequence[int], windows: Sequence[Places]) -> tuple[tuple[int, int], ...]:
    """Begin and end of each row's first answer among the places that are read of each window. DataError for an answer
    without a token."""
    labels: list[tuple[int, int]] = []
    faults: dict[int, str] = {}
    for k, (owner, places) in enumerate(zip(owners, windows)):
        if len(places) == 1:
            faults[owner] = "the tokenizer makes nothing of its context"
        if rows.answers is None:
            labels.append((IGNORED, IGNORED))
            continue
        answer = next(iter(rows.answers[owner]), None)
        first = k == 0 or owners[k - 1] != owner
        last = k + 1 == len(owners) or owners[k + 1] != owner
        if answer is None or not _holds(places, answer, first, last):
            labels.append((0, 0))
            continue
        begin = next((t for t, (_, end) in enumerate(places) if t and end > answer.start), len(places))
        end = answer.start + len(answer.text)
        stop = next((t for t in range(len(places) - 1, 0, -1) if places[t][0] < end), 0)
        if begin > stop:
            faults.setdefault(owner, f"the tokenizer makes nothing of its answer {answer.text[:40]!r}")
        labels.append((begin, stop))
    refuse_rows(rows.source, ((rows.lines[owner], fault) for owner, fault in faults.items()))
    return tuple(labels)


def _holds(places: Places, answer: Quote, first: bool, last: bool) -> bool:
    """Whether the whole answer stands in the window; the first and the last one reach to the context's ends."""
    after = first or places[1][0] <= answer.start
    return after and (last or places[-1][1] >= answer.start + len(answer.text))
