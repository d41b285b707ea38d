"""Questions on contexts, with answers that stand in them; and the forms in which files hold them.

| form | how |
|---|---|
| SQuAD v1.1, v2 | one JSON object: `data`, `paragraphs`, `context`, `qas` (also `is_impossible`) |
| rows of SQuAD | columns `question`, `context` and `answers`: {text: [...], answer_start: [...]}, or pairs of both |
| table | columns `question`, `context`, `answer`, and where known `start`: the character where it begins |

No answers, or an empty one, say that the context does not answer the question. Without its start an answer is taken
where it first stands.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data.cells import text_of
from lorakit.data.faults import BadRow, leave_out
from lorakit.data.memory import Memory
from lorakit.data.rows import Part, at
from lorakit.data.sources import apart, column_of
from lorakit.data.tables import open_table, read_text
from lorakit.errors import DataError

NAMES = {
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "text"),
    "answer": ("answers", "answer", "answer_text"),
    "begin": ("begin", "start", "answer_start"),
}
_MARKS = "?？\n"  # a question ends here, where a text has it and its context together


class Quote(NamedTuple):
    """An answer: a text, and the character of the context at which it begins."""

    text: str
    start: int


@dataclass(frozen=True)
class Questions(Part):
    """Of every row a question, its context, and where known all right answers: none if the context has no answer."""

    questions: tuple[str, ...]
    contexts: tuple[str, ...]
    answers: tuple[tuple[Quote, ...], ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        known = f"{self.n_empty} without an answer" if self.answers is not None else "answers not known"
        return f"Questions({len(self)} questions, {known}, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The contexts: so a split keeps all questions on one together."""
        return self.contexts

    @property
    def n_empty(self) -> int:
        """Questions that are known to have no answer."""
        return sum(not answers for answers in self.answers or ((None,),))

    def take(self, indices: Sequence[int]) -> "Questions":
        """The rows at these positions."""
        asked, contexts, answers = at(self.questions, indices), at(self.contexts, indices), at(self.answers, indices)
        return Questions(asked, contexts, answers, self.source, at(self.lines, indices))

    def digest(self) -> str:
        """A hash of questions, contexts and answers, in their order."""
        said = json.dumps([self.questions, self.contexts, self.answers])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def about(self) -> str:
        """How many contexts and questions without an answer, and the first row."""
        first = ((self.answers or ((),))[0] or (Quote("(no answer)", 0),))[0].text
        return (
            f"{len(set(self.contexts))} contexts, {self.n_empty} questions without an answer; "
            f"first row: {self.questions[0][:70]!r} -> {first[:70]!r}"
        )

    def faults(self, valid: "Questions", test: "Questions") -> list[str]:
        """Answers must be known; and if some are none, then in training too."""
        faults = [f"'{part.source}' has no answers" for part in (self, valid, test) if part.answers is None]
        if not faults and self.n_empty == len(self):
            faults.append(f"'{self.source}': no context has an answer; there is nothing to learn to find")
        if not faults and not self.n_empty:
            way = "add such rows there, or remove this one"
            faults = [fault for part in (valid, test) for fault in part.empty(f"all training rows have one; {way}")]
        return faults

    def empty(self, way: str) -> list[BadRow]:
        """The rows without an answer; `way` says what that means."""
        pairs = zip(self.lines, self.answers or ())
        return [BadRow(self.source, line, f"it has no answer, and {way}") for line, answers in pairs if not answers]


def make_questions(given: Sequence[Any], source: str = "texts") -> Questions:
    """Questions from Python values: {question, context}, a pair, or a text: the question up to its mark, the context.

    >>> make_questions(["Who came? Ann came.", ("Who left?", "Bob left.")]).contexts
    ('Ann came.', 'Bob left.')
    """
    faults: Faults = []
    found: list[Row] = []
    for line, one in enumerate(given, 1):
        if isinstance(one, str):
            end = min((one.index(mark) + 1 for mark in _MARKS if mark in one), default=0)
            if not one[:end].strip() or not one[end:].strip():
                faults.append((line, f"{one[:60]!r} is not a question up to '?' or a line break, and its context"))
                continue
            one = (one[:end], one[end:])
        pair = (one.get("question"), one.get("context")) if isinstance(one, Mapping) else tuple(one)
        found.append((line, *(pair if len(pair) == 2 else (None, None)), None))
    return _checked(source, found, faults)


def load_questions(source: str | Path | Memory, *, answers: bool = True, **columns: str | None) -> Questions:
    """The questions of one file or table; `columns` (question, context, answer, begin) names those of a table.

    `answers=False` reads none. DataError names every row that cannot be used, and why.
    """
    squad, faults = _squad(source), list[tuple[int, str]]()
    if squad is not None:
        rows = _of_squad(squad, source, answers, faults)
    else:
        rows = _of_table(source, answers, faults, **columns)
    return _checked(str(source), list(rows), faults)


Faults = list[tuple[int, str]]
Row = tuple[int, Any, Any, Any]  # row number, question, context, answers: pairs of text and start or None; or None


def _squad(source: str | Path | Memory) -> Mapping[str, Any] | None:
    """The object of a JSON file, if it is one and no list."""
    name = str(source).lower().removesuffix(".gz")
    if isinstance(source, Memory) or not name.endswith(".json") or not Path(source).is_file():
        return None
    try:
        found = json.loads(read_text(source))
    except json.JSONDecodeError as error:
        raise DataError(f"'{source}' is not valid JSON: {error}") from None
    if isinstance(found, list):
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("data"), list):
        raise DataError(f"'{source}' is no data set as SQuAD is ('data' with 'paragraphs'), and no list of rows")
    return found


def _of_squad(squad: Mapping[str, Any], source: str | Path | Memory, answers: bool, faults: Faults) -> Iterator[Row]:
    """Rows are counted by questions."""
    line = 0
    try:
        for article in squad["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    line += 1
                    try:
                        empty = asked.get("is_impossible", False)
                        said = ([] if empty else _pairs(asked["answers"])) if answers else None
                        yield line, asked["question"], paragraph["context"], said
                    except (KeyError, TypeError, AttributeError) as error:
                        faults.append((line, f"this question {_unlike(error)}"))
                    except DataError as error:
                        faults.append((line, str(error)))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{source}': what stands after question {line} {_unlike(error)}") from None


def _unlike(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else f"is not as SQuAD is ({error})"


def _of_table(source: str | Path | Memory, answers: bool, faults: Faults, **columns: str | None) -> Iterator[Row]:
    names, table = open_table(source)
    needed = {"question": True, "context": True, "answer": answers, "begin": False}
    asked, context, answer, start = (
        column_of(str(source), names, columns.get(noun), usual, noun, needed[noun]) for noun, usual in NAMES.items()
    )
    apart(str(source), *zip(NAMES, (asked, context, answer if answers else None, start)))
    for line, row in table:
        said = None
        if answers:
            value, begin = row.get(answer), row.get(start) if start else None
            try:
                said = _pairs(value) if isinstance(value, Mapping | list) else _written(value, begin)
            except (TypeError, AttributeError):
                faults.append((line, f"column '{answer}' is {value!r:.60}; it must be an answer, or texts and starts"))
                continue
            except DataError as error:
                faults.append((line, str(error)))
                continue
        yield line, row.get(asked), row.get(context), said


def _written(value: Any, start: Any) -> list[tuple[Any, Any]]:
    """The answers of a cell: JSON, or a text; none if it is empty."""
    if isinstance(value, str) and value.lstrip()[:2] in ('{"', "[{", "[["):
        try:
            return _pairs(json.loads(value))
        except json.JSONDecodeError:
            pass
    return [] if value is None or value == "" else [(value, None if start in (None, "") else start)]


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    """Text and start of each answer, as SQuAD or the rows made of it hold them. DataError if some lack the other."""
    if isinstance(value, Mapping):
        texts = value.get("text", [])
        starts = value.get("answer_start") or [None] * len(texts)
        if len(texts) != len(starts):
            raise DataError(f"its answers have {len(texts)} texts and {len(starts)} starts; each text needs one")
        return list(zip(texts, starts))
    return [_pair(one) for one in value]


def _pair(one: Any) -> tuple[Any, Any]:
    """Text and start of {text, answer_start}, of a pair, or of a text alone."""
    if isinstance(one, Mapping):
        return one.get("text"), one.get("answer_start")
    return (one[0], one[1]) if isinstance(one, list | tuple) and len(one) == 2 else (one, None)


def _checked(source: str, found: Sequence[Row], faults: Faults) -> Questions:
    answers: dict[int, tuple[Quote, ...]] = {}
    for line, question, context, said in found:
        try:
            for noun, text in (("question", question), ("context", context)):
                text_of(text, f"the {noun}")
            answers[line] = tuple(_placed(text, start, context) for text, start in said or ())
        except DataError as error:
            faults.append((line, str(error)))
    bad = {line for line, _ in faults}
    good = [row for row in found if row[0] not in bad]
    leave_out(source, sorted(faults), left=len(good))
    if not good:
        raise DataError(f"'{source}' has no rows")
    known = good[0][3] is not None
    lines, questions, contexts, _ = zip(*good)
    asked = tuple(question.strip() for question in questions)
    return Questions(asked, contexts, tuple(answers[line] for line in lines) if known else None, source, lines)


def _placed(text: Any, start: Any, context: str) -> Quote:
    """The answer. DataError if it is none."""
    first = context.find(text_of(text, "an answer"))
    if start is None and first < 0:
        raise DataError(f"the answer {text[:60]!r} does not stand in the context")
    place = first if start is None else int(start) if str(start).strip().isdigit() else -1
    if place >= 0 and context.startswith(text, place):
        return Quote(text, place)
    other = f"it first stands at {first}" if first >= 0 else "it stands nowhere in it"
    raise DataError(f"the answer {text[:60]!r} does not stand at character {start} of the context; {other}")
