"""Data: rows of every task from files, and batches of tokens. Every fault of a file is named with its row."""

from lorakit.data.dialogues import Dialogues, Turn, load_dialogues
from lorakit.data.questions import Questions, load_questions
from lorakit.data.rows import Part, Rows, Splits
from lorakit.data.sources import load_rows, load_splits
from lorakit.data.tagged import Tagged, load_tagged

__all__ = [
    "Dialogues",
    "Part",
    "Questions",
    "Rows",
    "Splits",
    "Tagged",
    "Turn",
    "load_dialogues",
    "load_questions",
    "load_rows",
    "load_splits",
    "load_tagged",
]
