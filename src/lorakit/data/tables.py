"""Tables: column names and rows of CSV, TSV, JSON Lines, JSON, Parquet, a Hugging Face dataset directory, the demo.

Text files may be gzip-ed (`.csv.gz`, `.jsonl.gz` ...). Every fault of a file is a DataError that names its row.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorakit.data.faults import leave_out
from lorakit.data.memory import Memory, by_name
from lorakit.errors import DataError, MissingExtraError, nearest

DEMO = "demo:"

Table = Iterator[tuple[int, dict[str, Any]]]  # row number as a person counts it, column -> value


def open_table(source: str | Path | Memory) -> tuple[list[str], Table]:
    """Column names and rows of one table. DataError names the file, where it can the row, and the way out."""
    if isinstance(source, Memory):
        return source.table()
    name = str(source)
    if name.startswith(DEMO):
        return _demo(name.removeprefix(DEMO))
    path = Path(source)
    if path.is_dir():
        if not is_dataset(path):
            raise DataError(
                f"'{path}' holds no train.csv, train.jsonl or train.parquet, and is no Hugging Face dataset directory"
            )
        return _read_arrow(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise DataError(f"'{path}': files ending in '{_suffix(path)}' are not read; use {', '.join(SUFFIXES)}")
    with _named(path):
        return reader(path)


def read_text(source: str | Path) -> str:
    """All text of a file, unpacked where its name ends in .gz. DataError names the file and the way out."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    with _named(path):
        return _text(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within the block, what is wrong with this file becomes a DataError."""
    try:
        if path.stat().st_size == 0:
            raise DataError(f"'{path}' is empty")
        yield
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"'{path}' is not UTF-8 text (line {line}: {error}); save it as UTF-8, or check that it is the right file"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' cannot be unpacked ({error}); it is damaged, or no gzip file") from None
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}") from None


def _suffix(path: Path) -> str:
    """`.csv`, or both of `.csv.gz`."""
    ends = [end.lower() for end in path.suffixes]
    return "".join(ends[-2:]) if ends[-1:] == [_GZ] else "".join(ends[-1:])


def _format(path: Path) -> str:
    return _suffix(path).removesuffix(_GZ)


def _text(path: Path) -> str:
    """The whole file, unpacked, as text; line ends as they are."""
    content = path.read_bytes()
    return (gzip.decompress(content) if _suffix(path).endswith(_GZ) else content).decode("utf-8-sig")


def _demo(name: str) -> tuple[list[str], Table]:
    folder = resources.files("lorakit.data") / "demo"
    known = sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))
    if name not in known:
        raise DataError(f"there is no demo table '{name}'{nearest(name, known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        return _read_csv(path)


def _read_csv(path: Path) -> tuple[list[str], Table]:
    delimiter = "\t" if _format(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[list[str], int]] = []  # fields, and the line on which they end
    try:
        rows.extend((row, reader.line_num) for row in reader)
    except csv.Error as error:
        begin = rows[-1][1] + 1 if rows else 1
        where = f"row {len(rows) + 1}, line{_lines(begin, reader.line_num)}"
        raise DataError(
            f"'{path}' is not a table of comma-separated values: {where} ({error}); check its quotes"
        ) from None
    if not rows:
        raise DataError(f"'{path}' is empty")
    header = [column.strip() for column in rows[0][0]]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"'{path}' names column '{twice[0]}' twice in its header")
    faults: list[tuple[int, str]] = []
    good: list[tuple[int, list[str]]] = []
    for number, ((_, before), (row, end)) in enumerate(pairwise(rows), 2):
        if not row:
            continue
        if len(row) == len(header):
            good.append((number, row))
            continue
        over = f", over line{_lines(before + 1, end)}: is a quote left open?" if end > before + 1 else ""
        faults.append((number, f"{len(row)} fields where the header has {len(header)}{over}"))
    leave_out(path, faults, "a text with a comma must stand in double quotes", left=len(good))
    return header, ((number, dict(zip(header, row))) for number, row in good)


def _lines(begin: int, end: int) -> str:
    return f" {begin}" if begin == end else f"s {begin} to {end}"


def _read_json_lines(path: Path) -> tuple[list[str], Table]:
    content = _text(path)
    records: list[tuple[int, Any]] = []
    faults: list[tuple[int, str]] = []
    if _format(path) == ".json":
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"'{path}' is not valid JSON: {error}") from None
        if not isinstance(whole, list):
            raise DataError(f"'{path}' must hold a list of objects; for one object a line name it .jsonl")
        records = list(enumerate(whole, 1))
    else:
        for number, line in enumerate(content.split("\n"), 1):  # splitlines would also split inside a text, at U+2028
            if line.strip():
                try:
                    records.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    faults.append((number, f"not valid JSON ({error.msg})"))
    good = [(number, record) for number, record in records if isinstance(record, dict)]
    faults += [(number, "not an object") for number, record in records if not isinstance(record, dict)]
    leave_out(path, sorted(faults), left=len(good))
    columns = list(dict.fromkeys(column for _, record in good for column in record))
    return columns, iter(good)


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


def is_dataset(path: Path) -> bool:
    """Is it a directory that `datasets.Dataset.save_to_disk` wrote?"""
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
    return columns, ((n, {k: by_name(v, names[k]) if k in names else v for k, v in row.items()}) for n, row in rows)


def _label_names(path: Path) -> dict[str, list[str]]:
    info = path / "dataset_info.json"
    if not info.is_file():
        return {}
    features = json.loads(info.read_text(encoding="utf-8")).get("features") or {}
    found: dict[str, list[str]] = {}
    for column, feature in features.items():
        if isinstance(feature, list):  # lists of labels are told in one of two ways
            feature = feature[0] if feature else None
        elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column] = feature["names"]
    return found


_GZ = ".gz"
_TEXTS: dict[str, Callable[[Path], tuple[list[str], Table]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
}
_READERS = {**_TEXTS, ".parquet": _read_parquet, **{f"{suffix}{_GZ}": reader for suffix, reader in _TEXTS.items()}}
SUFFIXES = tuple(_READERS)
