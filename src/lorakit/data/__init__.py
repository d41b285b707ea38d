"""Data: labelled rows from files, and batches of tokens. Every fault of a file is named with its row."""

from lorakit.data.rows import Rows, Splits
from lorakit.data.sources import load_rows, load_splits

__all__ = ["Rows", "Splits", "load_rows", "load_splits"]
