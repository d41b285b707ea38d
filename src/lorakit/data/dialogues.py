"""Dialogues: what a person said and what was answered, turn by turn; and the forms in which tables hold them.

| form | columns |
|---|---|
| pair | prompt, completion; or another pair of `PAIRS`, or the two that the caller names; `system` where there is one |
| Alpaca | instruction, input (may be empty), output: the prompt is the instruction, an empty line, the input |
| messages | `messages`: a list of {role, content}; or `conversations` (ShareGPT): a list of {from, value} |

Texts are kept as they are, white space included.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data.cells import text_in, text_of
from lorakit.data.faults import BadRow
from lorakit.data.memory import Memory
from lorakit.data.rows import Part, at
from lorakit.data.sources import apart, column_of
from lorakit.data.tables import open_table, usable_rows
from lorakit.errors import DataError

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("question", "answer"),
    ("mr", "ref"),
    ("source", "target"),
)
MESSAGES = ("messages", "conversations")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Turn(NamedTuple):
    """One turn of a dialogue. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class Dialogues(Part):
    """Turns of every row: perhaps a system turn, then user and assistant. The last is the answer, where it is known."""

    turns: tuple[Turns, ...]
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        answers = sum(turn.role == "assistant" for turns in self.turns for turn in turns)
        return f"Dialogues({len(self)} dialogues, {answers} answers, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """All that was said before the last answer, of each dialogue."""
        return tuple("\n".join(turn.content for turn in turns) for turns in self.asked().turns)

    @property
    def answers(self) -> tuple[str | None, ...]:
        """The last answer of each dialogue; None where it is not known."""
        return tuple(turns[-1].content if turns[-1].role == "assistant" else None for turns in self.turns)

    def asked(self) -> "Dialogues":
        """The dialogues without their last answers: what is to be answered."""
        turns = tuple(turns[:-1] if turns[-1].role == "assistant" else turns for turns in self.turns)
        return Dialogues(turns, self.source, self.lines)

    def take(self, indices: Sequence[int]) -> "Dialogues":
        """The dialogues at these positions."""
        return Dialogues(at(self.turns, indices), self.source, at(self.lines, indices))

    def encoded(self) -> Iterator[str]:
        """All turns of each dialogue."""
        return ("".join(f"{role}{len(content)}:{content}" for role, content in turns) for turns in self.turns)

    def about(self) -> str:
        """How many answers, and the first row."""
        n_answers = sum(turn.role == "assistant" for turns in self.turns for turn in turns)
        prompt, answer = self.asked().turns[0][-1].content, self.answers[0] or ""
        return f"{n_answers} answers to learn; first row: {prompt[:70]!r} -> {answer[:70]!r}"

    def faults(self, valid: "Dialogues", test: "Dialogues") -> list[str]:
        """Every dialogue must end with an answer."""
        return [
            BadRow(part.source, line, "it does not end with an answer of the assistant")
            for part in (self, valid, test)
            for line, answer in zip(part.lines, part.answers)
            if answer is None
        ]


def make_dialogues(asked: Sequence[str | Sequence[Mapping[str, Any]]], source: str = "texts") -> Dialogues:
    """Dialogues from Python values: a text is what a user asks; or messages, each {role, content}.

    >>> make_dialogues(["Hi", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]])
    Dialogues(2 dialogues, 1 answers, 'texts')
    """
    said = ([{"role": "user", "content": one}] if isinstance(one, str) else one for one in asked)
    rows = enumerate(({"messages": messages} for messages in said), 1)
    return _read(source, rows, lambda row: read_messages(row, "messages", False), header=False)


def load_dialogues(
    source: str | Path | Memory, *, prompt: str | None = None, answer: str | None = None, answers: bool = True
) -> Dialogues:
    """The dialogues of one file or table, in any of the forms above; `prompt` and `answer` name columns.

    `answers=False` accepts rows without an answer, and reads none: every dialogue then ends with what is asked.
    Raises DataError that names every row which cannot be used, and why.
    """
    name = str(source)
    columns, table = open_table(source)
    found = _read(name, table, _reader(name, columns, prompt, answer, answers), bool(columns))
    return found if answers else found.asked()


def _read(source: str, rows: Any, read: Callable[[Mapping[str, Any]], Turns], header: bool = True) -> Dialogues:
    turns, lines = usable_rows(source, rows, read, header)
    return Dialogues(tuple(turns), source, tuple(lines))


def _reader(
    source: str, columns: list[str], prompt: str | None, answer: str | None, answers: bool
) -> Callable[[Mapping[str, Any]], Turns]:
    """How to read a row of a table with these columns."""
    prompt, answer = (
        column_of(source, columns, own, (), noun, needed=False)
        for noun, own in (("prompt", prompt), ("answer", answer))
    )
    lower = {column.lower(): column for column in columns}
    if not prompt and not answer:
        for name in MESSAGES:
            if name in lower:
                return lambda row: read_messages(row, lower[name], answers)
    pairs = [
        (prompt or lower.get(first), answer or lower.get(second))
        for first, second in PAIRS
        if (prompt or first in lower) and (answer or second in lower or not answers)
    ]
    if not pairs:
        usual = ", ".join(" and ".join(pair) for pair in PAIRS)
        raise DataError(
            f"'{source}' has neither 'messages' nor 'conversations' nor two columns with usual names ({usual}); its "
            f"columns are {', '.join(columns) or 'none'}: name two with --prompt COLUMN and --answer COLUMN"
        )
    asked, answered = pairs[0]
    apart(source, ("prompt", asked), ("answer", answered if answers else None))
    alpaca = not prompt and asked == lower.get("instruction") and answered != lower.get("input")
    more = lower.get("input") if alpaca else None
    system = lower.get("system") if lower.get("system") not in (asked, answered) else None
    return lambda row: _pair(row, system, asked or "", more, answered if answers else None)


def _pair(row: Mapping[str, Any], system: str | None, asked: str, more: str | None, answered: str | None) -> Turns:
    turns: list[Turn] = []
    if system and row.get(system):
        turns.append(Turn("system", text_in(row, system)))
    prompt = text_in(row, asked)
    if more and row.get(more):
        prompt += "\n\n" + text_in(row, more)
    turns.append(Turn("user", prompt))
    if answered is not None:
        turns.append(Turn("assistant", text_in(row, answered)))
    return tuple(turns)


def read_messages(row: Mapping[str, Any], column: str, answers: bool) -> Turns:
    """The turns in a cell that holds a list of messages, or its JSON. DataError if they are no dialogue, or if
    `answers` are wanted and the last message is none."""
    said = row.get(column)
    if isinstance(said, str):  # a table of texts holds the list as JSON
        try:
            said = json.loads(said)
        except json.JSONDecodeError as error:
            raise DataError(f"column '{column}' is a text, and no list in JSON ({error.msg})") from None
    if not isinstance(said, Sequence) or not said or not all(isinstance(message, Mapping) for message in said):
        raise DataError(f"column '{column}' is {repr(said)[:40]}; it must be a list of messages, each with a role")
    turns = tuple(_turn(message, number) for number, message in enumerate(said, 1))
    roles = [turn.role for turn in turns]
    talk = roles[roles[0] == "system" :]
    if "system" in talk:
        raise DataError(f"message {roles.index('system', 1) + 1} is a system message, and only the first may be one")
    if not talk or talk[0] != "user":
        raise DataError(f"it must begin with the user, after at most one system message; its roles are {_few(roles)}")
    if answers and talk[-1] != "assistant":
        raise DataError("the last message is not from the assistant, so there is no answer to learn")
    return turns


def _turn(message: Mapping[str, Any], number: int) -> Turn:
    role = message.get("role", message.get("from"))
    if role not in _ROLES:
        raise DataError(f"message {number} has the unknown role {role!r}; known: {', '.join(_ROLES)}")
    return Turn(_ROLES[role], text_of(message.get("content", message.get("value")), f"message {number} ({role})"))


def _few(roles: Sequence[str]) -> str:
    return ", ".join(roles[:4]) + (" ..." if len(roles) > 4 else "")
