"""Where rows come from: CSV, TSV, JSON Lines, Parquet, a Hugging Face dataset directory, a folder of parts, the demo.

Columns are named by the caller or found by their usual names. Nothing is guessed beyond that: a column that is not
there is an error that lists those that are.
"""

import csv
import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from lorakit.data.rows import Rows, Splits, split
from lorakit.errors import DataError, MissingExtraError, listed, nearest

TEXT_NAMES = ("text", "sentence", "content", "message", "utterance", "query", "question", "review")
LABEL_NAMES = ("label", "intent", "category", "class", "sentiment", "target")
_PARTS = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
_DEMO = "demo:"
_SHARE = 0.1  # of the training rows, for a part that is not given

Table = Iterator[tuple[int, dict[str, Any]]]  # row number as a person counts it, column -> value


def load_splits(
    data: str | Path,
    *,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    seed: int = 0,
) -> Splits:
    """Training, validation and test rows.

    `data` is a file, a directory with parts of their own (`train.csv`, `valid.csv`, `test.csv`, or a Hugging Face
    dataset), or "demo:support". What is not given is split off the training rows, at random within each label, by
    `seed`. Raises DataError that names file, row and way out.
    """
    parts = _parts(data)
    given = {"valid": valid, "test": test}
    loaded = {"train": load_rows(parts.get("train", data), text=text, label=label)}
    for name, own in given.items():
        place = own if own is not None else parts.get(name)
        if place is not None:
            loaded[name] = load_rows(place, text=text, label=label)
    train = loaded["train"]
    share = {name: 0.0 if name in loaded else _SHARE for name in ("valid", "test")}
    if not any(share.values()):
        return Splits(train, loaded["valid"], loaded["test"]).checked()
    cut = split(train, seed, **share)
    return Splits(cut.train, loaded.get("valid", cut.valid), loaded.get("test", cut.test)).checked()


def load_rows(source: str | Path, *, text: str | None = None, label: str | None = None, labels: bool = True) -> Rows:
    """The rows of one file or table. `labels=False` accepts a table without a label column."""
    name = str(source)
    columns, table = _open(source)
    text_column = _column(name, columns, text, TEXT_NAMES, "text")
    label_column = _column(name, columns, label, LABEL_NAMES, "label", needed=labels)
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


def _column(
    source: str, columns: list[str], wanted: str | None, usual: tuple[str, ...], noun: str, needed: bool = True
) -> str:
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


def _parts(data: str | Path) -> dict[str, str | Path]:
    """Parts that a directory or the demo brings by itself: train, valid, test -> source."""
    name = str(data)
    if name == f"{_DEMO}support":
        return {part: f"{_DEMO}support_{part}" for part in _PARTS}
    path = Path(data)
    if not path.is_dir():
        return {}
    found: dict[str, str | Path] = {}
    for part, names in _PARTS.items():
        for candidate in names:
            files = [path / f"{candidate}{suffix}" for suffix in _READERS] + [path / candidate]
            hit = next((file for file in files if file.exists()), None)
            if hit is not None:
                found.setdefault(part, hit)
    if not found and not _is_dataset(path):
        raise DataError(
            f"'{path}' holds no train.csv, train.jsonl or train.parquet, and is no Hugging Face dataset directory"
        )
    if found and "train" not in found:
        raise DataError(f"'{path}' holds {', '.join(str(part) for part in found.values())} and no training part")
    return found


def _open(source: str | Path) -> tuple[list[str], Table]:
    """Column names and rows of one table."""
    name = str(source)
    if name.startswith(_DEMO):
        return _demo(name.removeprefix(_DEMO))
    path = Path(source)
    if path.is_dir():
        if not _is_dataset(path):
            raise DataError(f"'{path}' is a directory without data_*.arrow files; name a file in it")
        return _read_arrow(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"'{path}': files ending in '{path.suffix}' are not read; use {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty")
    try:
        return reader(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"'{path}' is not UTF-8 text ({error}); save it as UTF-8, or check that it is the right file"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}") from None


def _demo(name: str) -> tuple[list[str], Table]:
    folder = resources.files("lorakit.data") / "demo"
    known = sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))
    if name not in known:
        raise DataError(f"there is no demo table '{name}'{nearest(name, known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        return _read_csv(path)


def _read_csv(path: Path) -> tuple[list[str], Table]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.reader(stream, delimiter=delimiter, strict=True))
    if not rows:
        raise DataError(f"'{path}' is empty")
    header = [column.strip() for column in rows[0]]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"'{path}' names column '{twice[0]}' twice in its header")
    faults = [
        f"row {number}: {len(row)} fields where the header has {len(header)}"
        for number, row in enumerate(rows[1:], 2)
        if row and len(row) != len(header)
    ]
    if faults:
        raise DataError(f"'{path}': {listed(faults, 5)}; a text with a comma must stand in double quotes")
    return header, ((number, dict(zip(header, row))) for number, row in enumerate(rows[1:], 2) if row)


def _read_json_lines(path: Path) -> tuple[list[str], Table]:
    content = path.read_text(encoding="utf-8-sig")
    records: list[tuple[int, Any]] = []
    faults: list[str] = []
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"'{path}' is not valid JSON: {error}") from None
        if not isinstance(whole, list):
            raise DataError(f"'{path}' must hold a list of objects; for one object a line name it .jsonl")
        records = list(enumerate(whole, 1))
    else:
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    faults.append(f"row {number}: not valid JSON ({error.msg})")
    faults += [f"row {number}: not an object" for number, record in records if not isinstance(record, dict)]
    if faults:
        raise DataError(f"'{path}': {listed(faults, 5)}")
    columns = list(dict.fromkeys(column for _, record in records for column in record))
    return columns, iter(records)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    return pyarrow


def _rows_of(table: Any) -> tuple[list[str], Table]:
    return list(table.column_names), enumerate(table.to_pylist(), 1)


def _read_parquet(path: Path) -> tuple[list[str], Table]:
    arrow = _arrow()
    try:
        return _rows_of(arrow.parquet.read_table(path))
    except arrow.ArrowInvalid as error:
        raise DataError(f"'{path}' is not a readable Parquet file: {error}") from None


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or any(path.glob("*.arrow"))


def _read_arrow(path: Path) -> tuple[list[str], Table]:
    """A directory written by `datasets.Dataset.save_to_disk`; label numbers become the names of its features."""
    arrow = _arrow()
    state = path / "state.json"
    if state.is_file():
        files = [path / entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    else:
        files = sorted(path.glob("*.arrow"))
    try:
        table = arrow.concat_tables([arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all() for file in files])
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' is not a readable dataset directory: {error}") from None
    names = _label_names(path)
    columns, rows = _rows_of(table)
    if not names:
        return columns, rows
    return columns, (
        (n, {k: names[k][v] if k in names and isinstance(v, int) else v for k, v in row.items()}) for n, row in rows
    )


def _label_names(path: Path) -> dict[str, list[str]]:
    info = path / "dataset_info.json"
    if not info.is_file():
        return {}
    features = json.loads(info.read_text(encoding="utf-8")).get("features") or {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


_READERS: dict[str, Callable[[Path], tuple[list[str], Table]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
