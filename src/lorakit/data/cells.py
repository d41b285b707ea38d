"""What stands in a cell of a table, or in what Python gives for one: a text, a label. Each says no to what is none."""

from collections.abc import Mapping
from typing import Any

from lorakit.errors import DataError

SET_NAMES = ("labels", "tags", "categories", "topics", "genres", "emotions", "classes", "intents")  # of several labels


def any_text(value: Any, place: str) -> str:
    """The value as it is, if it is a text, perhaps an empty one. DataError that begins with the place."""
    if not isinstance(value, str):
        raise DataError(f"{place} is {value!r:.40}; it must be text")
    if "\x00" in value:
        raise DataError(f"{place} has a NUL character; the file is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"{place} has {half!r} at character {error.start}, half of a character that was cut") from None
    return value


def text_of(value: Any, place: str) -> str:
    """The same of a text that is not empty: there is more in it than white space."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place} is empty")
    return any_text(value, place)


def text_in(row: Mapping[str, Any], column: str) -> str:
    """The text in this column, white space included. DataError names the column."""
    return text_of(row.get(column), f"column '{column}'")


def name_in(row: Mapping[str, Any], column: str) -> str:
    """The name in this column, a text or a number, as a text without white space around it."""
    value = row.get(column)
    if isinstance(value, list | tuple | Mapping):
        raise DataError(f"column '{column}' is {value!r:.40}; it must be a text or a number")
    return text_of(None if value is None else str(value), f"column '{column}'").strip()


def label_in(row: Mapping[str, Any], column: str) -> str:
    """The one label in this column, as `name_in`. DataError for a list, also one that is written as a text where the
    column is called as those of several labels are."""
    value = row.get(column)
    if isinstance(value, list | tuple) or (column.lower() in SET_NAMES and isinstance(value, str) and is_list(value)):
        way = "texts with several labels are learned with --task labels"
        raise DataError(f"column '{column}' is {str(value)[:40]}, a list, and one label is wanted; {way}")
    return name_in(row, column)


def is_list(value: str) -> bool:
    """Is it written as JSON and Python write lists?"""
    return value.strip().startswith("[") and value.strip().endswith("]")
