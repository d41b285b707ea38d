"""Data: labelled rows and dialogues from files, and batches of tokens. Every fault of a file is named with its row."""

from lorakit.data.dialogues import Dialogues, Turn, load_dialogues
from lorakit.data.rows import Part, Rows, Splits
from lorakit.data.sources import load_rows, load_splits

__all__ = ["Dialogues", "Part", "Rows", "Splits", "Turn", "load_dialogues", "load_rows", "load_splits"]
