"""Rows that are in memory already: a list of dicts, a dict of columns, a DataFrame, a Dataset; or one of them for each
part (train, valid, test).
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any

from lorakit.data.faults import leave_out
from lorakit.errors import DataError, UsageError

NAME = "the rows in memory"


class Memory:
    """A table in memory, which readers take as they take a file. `str` of it is for messages.

    A piece of a larger table has the `columns` of all of it, and the numbers of its rows there (`lines`).
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str = NAME,
        columns: Sequence[str] | None = None,
        lines: Sequence[int] | None = None,
    ) -> None:
        numbered = list(zip(range(1, len(rows) + 1) if lines is None else lines, rows))
        self.rows = [(n, row) for n, row in numbered if isinstance(row, Mapping)]
        wrong = [(n, row) for n, row in numbered if not isinstance(row, Mapping)]
        faults = [(n, f"it is {row!r:.60}, not a dict with a value for each column") for n, row in wrong]
        leave_out(name, faults, left=len(self.rows))
        found = columns if columns is not None else dict.fromkeys(str(key) for _, row in self.rows for key in row)
        self.columns, self.name = list(found), name

    def __str__(self) -> str:
        return self.name


def plain(value: Any) -> Any:
    """What a cell says: None for NaN, NaT and pandas' NA, a list for an array of one dimension.

    >>> plain({"text": ("a", "b"), "start": float("nan")})
    {'text': ['a', 'b'], 'start': None}
    """
    if isinstance(value, str):
        return value
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    absent = type(value).__name__ in ("NaTType", "NAType") or (isinstance(value, Real) and value != value)
    return None if absent else value


def in_memory(data: object, name: str = NAME) -> Memory:
    """Rows from Python. UsageError for what is none."""
    if isinstance(data, Memory):
        return data
    if isinstance(data, Mapping):
        return _of_columns(data, name)
    if hasattr(data, "column_names") and hasattr(data, "features"):  # datasets.Dataset
        return Memory(_named(list(data), data.features), name)  # type: ignore[call-overload]
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas.DataFrame
        return Memory(data.to_dict("records"), name)
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        if not data:
            raise DataError(f"{name}: there are none")
        return Memory(data, name)
    raise UsageError(
        f"the data is {type(data).__name__} {data!r:.60}; give a file, a directory, demo:support, a list of dicts, a "
        "dict of columns, a DataFrame, a Dataset, or the Splits that lorakit.data.load_splits gives"
    )


def parts_in_memory(data: object, known: Mapping[str, Sequence[str]]) -> dict[str, Memory]:
    """Part -> rows, where `data` has rows for each part; `known` are the names that each part may have."""
    if not isinstance(data, Mapping):
        return {"train": in_memory(data)}
    found = {
        part: in_memory(data[name], f"{NAME} ('{name}')")
        for part, names in known.items()
        for name in names
        if name in data
    }
    return found if "train" in found else {"train": in_memory(data)}


def _of_columns(columns: Mapping[Any, Any], name: str) -> Memory:
    values = {str(column): list(value) for column, value in columns.items() if not isinstance(value, str | bytes)}
    sizes = {column: len(value) for column, value in values.items()}
    if len(values) < len(columns) or not values:
        raise UsageError(f"{name}: a dict must have a list for each column, as {{'text': [...], 'label': [...]}}")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"'{column}' has {n}" for column, n in islice(sizes.items(), 6))
        raise DataError(f"{name}: the columns are of unlike length: {told}")
    return Memory([dict(zip(values, row)) for row in zip(*values.values())], name)


def _named(rows: list[dict[str, Any]], features: Any) -> list[dict[str, Any]]:
    """Numbers of labels as the names that a Dataset's features have for them."""
    single = {column: getattr(feature, "feature", feature) for column, feature in features.items()}  # of a list
    names = {column: feature.names for column, feature in single.items() if getattr(feature, "names", None)}
    return [{k: by_name(v, names[k]) if k in names else v for k, v in row.items()} for row in rows]


def by_name(value: Any, names: Sequence[str]) -> Any:
    """The name of a label's number, or of each in a list."""
    if isinstance(value, list):
        return [by_name(each, names) for each in value]
    return names[value] if isinstance(value, int) and value >= 0 else value
