"""Where rows come from: a table, a folder of parts, the demo.

Columns are named by the caller or found by their usual names. Nothing is guessed beyond that: a column that is not
there is an error that lists those that are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lorakit.data.memory import Memory, in_memory, parts_in_memory
from lorakit.data.rows import Part, Rows, Splits, split
from lorakit.data.tables import DEMO, SUFFIXES, open_table
from lorakit.errors import DataError, listed, nearest

TEXT_NAMES = ("text", "sentence", "content", "message", "utterance", "query", "question", "review")
LABEL_NAMES = ("label", "intent", "category", "class", "sentiment", "target")
_PARTS = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
_SHARE = 0.1  # of the training rows, for a part that is not given

P = TypeVar("P", bound=Part)


def load_splits(
    data: Any,
    *,
    valid: Any = None,
    test: Any = None,
    seed: int = 0,
    read: Callable[..., P] | None = None,
    **columns: Any,
) -> Splits[P]:
    """Training, validation and test rows.

    `data` is a file, a directory with parts of their own (`train.csv`, `valid.csv`, `test.csv`, or a Hugging Face
    dataset), "demo:support", or rows in memory (data/memory.py). What is not given is split off the training rows, at
    random by `seed`, within each label where there are labels. `read` reads one table and takes the names of its
    `columns`: `load_rows` (the default) `text` and `label`, `load_dialogues` `prompt` and `answer`. Raises DataError
    that names file, row and way out.
    """
    reader: Callable[..., Any] = read or load_rows
    parts = _parts(data) if isinstance(data, str | Path) else parts_in_memory(data, _PARTS)
    given = {"valid": valid, "test": test}
    loaded = {"train": reader(parts.get("train", data), **columns)}
    for name, own in given.items():
        place = own if own is not None else parts.get(name)
        if place is not None:
            loaded[name] = reader(place if isinstance(place, str | Path) else in_memory(place), **columns)
    train = loaded["train"]
    share = {name: 0.0 if name in loaded else _SHARE for name in ("valid", "test")}
    if not any(share.values()):
        return Splits(train, loaded["valid"], loaded["test"]).checked()
    cut = split(train, seed, **share)
    return Splits(cut.train, loaded.get("valid", cut.valid), loaded.get("test", cut.test)).checked()


def load_rows(
    source: str | Path | Memory, *, text: str | None = None, label: str | None = None, labels: bool = True
) -> Rows:
    """The rows of one file or table. `labels=False` accepts a table without a label column."""
    name = str(source)
    columns, table = open_table(source)
    text_column = column_of(name, columns, text, TEXT_NAMES, "text")
    label_column = column_of(name, columns, label, LABEL_NAMES, "label", needed=labels)
    texts: list[str] = []
    found: list[str] = []
    lines: list[int] = []
    faults: list[str] = []
    for line, row in table:
        value = row.get(text_column)
        tag = row.get(label_column) if label_column else None
        if not isinstance(value, str) or not value.strip():
            faults.append(f"row {line}: column '{text_column}' is {'empty' if not value else repr(value)[:40]}")
        elif "\x00" in value:
            faults.append(f"row {line}: the text has a NUL character; the file is not text")
        elif label_column and (tag is None or not str(tag).strip()):
            faults.append(f"row {line}: column '{label_column}' is empty")
        else:
            texts.append(value.strip())
            found.append(str(tag).strip() if label_column else "")
            lines.append(line)
    if faults:
        raise DataError(f"'{name}': {listed(faults, 5)}; mend or remove these rows")
    if not texts:
        raise DataError(f"'{name}' has a header and no rows" if columns else f"'{name}' is empty")
    return Rows(tuple(texts), tuple(found) if label_column else None, name, tuple(lines))


def column_of(
    source: str, columns: list[str], wanted: str | None, usual: tuple[str, ...], noun: str, needed: bool = True
) -> str:
    """The column that is wanted, or the first with a usual name; "" if there is none and it need not be."""
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"'{source}' has no column '{wanted}'{nearest(wanted, columns)}")
        return wanted
    lower = {column.lower(): column for column in columns}
    for name in usual:
        if name in lower:
            return lower[name]
    if not needed:
        return ""
    raise DataError(
        f"'{source}' has no column with a usual name for the {noun} ({', '.join(usual[:3])} ...); "
        f"its columns are {', '.join(columns) or 'none'}: name one with --{noun} COLUMN"
    )


def _parts(data: str | Path) -> dict[str, Any]:
    """Parts that a directory or the demo brings by itself: train, valid, test -> source."""
    name = str(data)
    if name == f"{DEMO}support":
        return {part: f"{DEMO}support_{part}" for part in _PARTS}
    path = Path(data)
    if not path.is_dir():
        return {}
    found: dict[str, Any] = {}
    for part, names in _PARTS.items():
        for candidate in names:
            files = [path / f"{candidate}{suffix}" for suffix in SUFFIXES] + [path / candidate]
            files += sorted(path.glob(f"{candidate}.*"))
            hit = next((file for file in files if file.exists()), None)
            if hit is not None:
                found.setdefault(part, hit)
    if found and "train" not in found:
        raise DataError(f"'{path}' holds {', '.join(str(part) for part in found.values())} and no training part")
    return found
