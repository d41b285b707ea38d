"""Preferences: what was asked, an answer that is preferred, and one that is rejected; and the forms that tables have.

| form | columns |
|---|---|
| texts | prompt (or question, instruction, input), chosen, rejected; `system` where there is one |
| messages, with a prompt | prompt: a text or a list of {role, content}; chosen, rejected: lists with the answer alone |
| messages, without | chosen, rejected: lists of the whole dialogue, alike up to their last answers (UltraFeedback) |
| texts of dialogues | chosen, rejected: "\\n\\nHuman: ... \\n\\nAssistant: ..." in one text (HH-RLHF) |

The first two and the last two may have other names, given by the caller. In a CSV file lists are written as JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.cells import text_in
from lorakit.data.dialogues import MESSAGES, Dialogues, Turn, Turns, load_dialogues, read_messages
from lorakit.data.rows import Part, at
from lorakit.data.sources import apart, column_of
from lorakit.data.tables import open_table, usable_rows
from lorakit.errors import DataError

PROMPTS = ("prompt", "question", "instruction", "input")
_TALK = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preferences(Part):
    """`turns` that ask, and for each of them the `chosen` and the `rejected` answer, where they are known."""

    turns: tuple[Turns, ...]
    chosen: tuple[str, ...] | None
    rejected: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Preferences({len(self)} {'prompts' if self.chosen is None else 'pairs of answers'}, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """All that was said before the answers."""
        return self.asked().inputs

    def asked(self) -> Dialogues:
        """What is to be answered."""
        return Dialogues(self.turns, self.source, self.lines)

    def answered(self, answers: Sequence[str]) -> Dialogues:
        """The dialogues with these answers."""
        turns = tuple((*turns, Turn("assistant", answer)) for turns, answer in zip(self.turns, answers))
        return Dialogues(turns, self.source, self.lines)

    def take(self, indices: Sequence[int]) -> "Preferences":
        """The rows at these positions."""
        chosen, rejected = at(self.chosen, indices), at(self.rejected, indices)
        return Preferences(at(self.turns, indices), chosen, rejected, self.source, at(self.lines, indices))

    def encoded(self) -> Iterator[str]:
        """All turns and both answers of each row."""
        none = ("",) * len(self)
        rows = zip(self.asked().encoded(), self.chosen or none, self.rejected or none)
        return (f"{len(asked)}:{asked}{len(good)}:{good}{len(bad)}:{bad}" for asked, good, bad in rows)

    def about(self) -> str:
        """How many pairs, and the first row."""
        asked, good, bad = self.turns[0][-1].content, (self.chosen or ("",))[0], (self.rejected or ("",))[0]
        return f"{len(self)} pairs of answers; first row: {asked[:60]!r} -> {good[:60]!r} rather than {bad[:60]!r}"

    def faults(self, valid: "Preferences", test: "Preferences") -> list[str]:
        """Every part needs both answers."""
        parts = (self, valid, test)
        return [f"'{part.source}' has no chosen and rejected answers" for part in parts if part.chosen is None]


def load_preferences(
    source: str | Path,
    *,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    answers: bool = True,
) -> Preferences:
    """The preferences of one file or table, in any of the forms above; the arguments name columns.

    `answers=False` reads what is asked only, also from a table as `load_dialogues` takes it. Raises DataError that
    names every row which cannot be used, and why.
    """
    name = str(source)
    columns, table = open_table(source)
    lower = {column.lower(): column for column in columns}
    asked = column_of(name, columns, prompt, PROMPTS, "prompt", needed=False)
    good = column_of(name, columns, chosen, ("chosen",), "chosen", needed=False)
    bad = column_of(name, columns, rejected, ("rejected",), "rejected", needed=False)
    if not answers and (not good or any(usual in lower for usual in MESSAGES)):
        found = load_dialogues(source, prompt=prompt, answers=False)
        return Preferences(found.turns, None, None, name, found.lines)
    system = lower.get("system")
    read = _reader(asked, system)

    def before(row: Mapping[str, Any]) -> Turns:
        said = _unpacked(row.get(good))
        whole = not asked or (isinstance(said, Sequence) and not isinstance(said, str) and len(said) > 1)
        return read(row, good)[0] if whole else _asked(row, asked, system)

    if not answers:
        alone, lines = usable_rows(name, table, before, bool(columns))
        return Preferences(tuple(alone), None, None, name, tuple(lines))
    if not (good and bad):
        raise DataError(
            f"'{name}' needs a column with chosen and another with rejected answers; its columns are "
            f"{', '.join(columns) or 'none'}: name them with --chosen COLUMN and --rejected COLUMN"
        )
    apart(name, ("prompt", asked), ("chosen", good), ("rejected", bad))

    def both(row: Mapping[str, Any]) -> tuple[Turns, str, str]:
        turns, answer = read(row, good)
        return turns, answer, _other(read(row, bad), turns, answer)

    triples, lines = usable_rows(name, table, both, bool(columns))
    turns, firsts, seconds = zip(*triples)
    return Preferences(turns, firsts, seconds, name, tuple(lines))


def _other(found: tuple[Turns, str], before: Turns, answer: str) -> str:
    """The rejected answer, which must be another one to the same."""
    if found[0] != before:
        raise DataError(
            "the chosen and the rejected dialogue differ before their last answers; both must answer the same"
        )
    if found[1] == answer:
        raise DataError("the chosen and the rejected answer are the same")
    return found[1]


def _reader(prompt: str, system: str | None) -> Callable[[Mapping[str, Any], str], tuple[Turns, str]]:
    """How to read from a row what was asked, and the answer in one of its columns."""

    def read(row: Mapping[str, Any], column: str) -> tuple[Turns, str]:
        said = _unpacked(row.get(column))
        if isinstance(said, str) and prompt:
            return _asked(row, prompt, system), text_in(row, column)
        if isinstance(said, str):
            return _parted(_talk(text_in(row, column), column))
        alone = isinstance(said, Sequence) and len(said) == 1 and isinstance(said[0], Mapping)
        if alone and prompt:
            asked = _asked(row, prompt, system)
            whole = [*(turn._asdict() for turn in asked), said[0]]
            return _parted(read_messages({column: whole}, column, True))
        return _parted(read_messages({column: said}, column, True))

    return read


def _unpacked(cell: Any) -> Any:
    """A list of messages that a table of texts holds as JSON; anything else as it is."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def _asked(row: Mapping[str, Any], prompt: str, system: str | None) -> Turns:
    said = _unpacked(row.get(prompt))
    if not isinstance(said, str) and said is not None:
        return read_messages({prompt: said}, prompt, False)
    asked = Turn("user", text_in(row, prompt))
    return (Turn("system", text_in(row, system)), asked) if system and row.get(system) else (asked,)


def _talk(text: str, column: str) -> Turns:
    """The turns of a dialogue that is written as one text."""
    _, *parts = _TALK.split(text)
    if not text.lstrip().startswith("Human:") or not parts:
        raise DataError(
            f"column '{column}' is a text, and there is no column with the prompt; name it with --prompt COLUMN"
        )
    messages = [{"role": _ROLES[role], "content": said.strip()} for role, said in zip(parts[::2], parts[1::2])]
    return read_messages({column: messages}, column, True)


def _parted(turns: Turns) -> tuple[Turns, str]:
    return turns[:-1], turns[-1].content
