"""Tables: column names and rows of CSV, TSV, JSON Lines, JSON, Parquet, a Hugging Face dataset directory, the demo.

Text files may be gzip-ed (`.csv.gz`, `.jsonl.gz` ...). Every fault of a file is a DataError that names its row.

A file is gone through once to check it and to find its columns, and once for its rows, which come one at a time: only
`.json` is in memory as a whole.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lorakit.data.faults import leave_out
from lorakit.data.memory import Memory, by_name, plain
from lorakit.errors import DataError, MissingExtraError, NoRowsError, nearest

X = TypeVar("X")

DEMO = "demo:"

Table = Iterator[tuple[int, Mapping[str, Any]]]  # row number as a person counts it, column -> value
Opened = tuple[list[str], Callable[[], Table]]  # columns, and rows as often as they are wanted
Reads = Callable[[Path], bool]
_AT_ONCE = 1024  # rows that pyarrow makes Python values of together
_SAMPLE = 1 << 22  # bytes of text that tell how well a file was packed
_JSON = json.JSONDecoder(parse_constant=lambda word: None if word == "NaN" else float(word))  # cells are `plain`
_FIELD = 1 << 27  # characters in a cell of CSV, at the most: beyond it a quote was left open


def open_table(source: str | Path | Memory, also: Reads | None = None) -> tuple[list[str], Table]:
    """Column names and rows of one table. DataError names the file, where it can the row, and the way out; `also` is
    that of `inside`."""
    columns, rows = opened(source, also)
    return columns, rows()


def opened(source: str | Path | Memory, also: Reads | None = None) -> Opened:
    """Column names of one table, and what gives its rows from the first on, again and again; cells are `plain`."""
    if isinstance(source, Memory):
        return source.columns, lambda: ((n, plain(row)) for n, row in source.rows)
    name = str(source)
    if name.startswith(DEMO):
        return _demo(name.removeprefix(DEMO))
    path = Path(source)
    if path.is_dir():
        if is_dataset(path):
            return _read_arrow(path)
        held, way = inside(path, also)
        held = held or "no train.csv, train.jsonl or train.parquet"
        raise DataError(f"'{path}' holds {held}, and is no Hugging Face dataset directory{way}")
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise DataError(f"'{path}': files ending in '{_suffix(path)}' are not read; use {', '.join(SUFFIXES)}")
    with _named(path):
        return reader(path)


def inside(folder: Path, also: Reads | None = None) -> tuple[str, str]:
    """What a directory holds that can be read by itself, and the way out for who wants one table: to name it. Empty
    texts if it holds none. `also` tells of a file or folder whether it can be read beside tables."""
    names = [
        entry.name
        for entry in sorted(folder.iterdir())
        if _suffix(entry) in _READERS or is_dataset(entry) or (also is not None and also(entry))
    ]
    if not names:
        return "", ""
    one = folder / max(names, key=lambda name: name.startswith("test"))
    return ", ".join(names[:4] + ["..."] * (len(names) > 4)), f"; name one of them, as '{one}'"


def usable_rows(
    source: str, table: Iterable[tuple[int, Mapping[str, Any]]], read: Callable[[Mapping[str, Any]], X], header: bool
) -> tuple[list[X], list[int]]:
    """What `read` makes of each row, and the row numbers; without those for which it raises DataError, as many as may
    be left out. DataError names them otherwise; NoRowsError a table without rows, which may have a `header`."""
    found: list[X] = []
    lines: list[int] = []
    faults: list[tuple[int, str]] = []
    for line, row in table:
        try:
            found.append(read(row))
            lines.append(line)
        except DataError as error:
            faults.append((line, str(error)))
    leave_out(source, faults, left=len(found))
    if not found:
        raise NoRowsError(f"'{source}' has a header and no rows" if header else f"'{source}' is empty")
    return found, lines


def table_bytes(source: str | Path) -> int:
    """About how many bytes a table is, unpacked, whose rows can be read without having all of it in memory; else 0."""
    path = Path(source)
    if path.is_dir() and is_dataset(path):
        return sum(file.stat().st_size for file in path.glob("*.arrow"))
    if not path.is_file() or _format(path) not in _BY_ROWS:
        return 0
    n_bytes = path.stat().st_size
    if _suffix(path) == ".parquet":
        try:
            arrow = _arrow()
            note = arrow.parquet.read_metadata(path)
        except (MissingExtraError, OSError, ValueError):  # the reader tells it
            return 0
        return max(n_bytes, sum(int(note.row_group(k).total_byte_size) for k in range(note.num_row_groups)))
    if not _suffix(path).endswith(_GZ):
        return n_bytes
    try:
        with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as stream:
            return int(n_bytes * len(stream.read(_SAMPLE)) / max(1, min(packed.tell(), n_bytes)))
    except (OSError, EOFError, zlib.error):
        return 0


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
        where = _not_text(path) or str(error)
        raise DataError(
            f"'{path}' is not UTF-8 text ({where}); save it as UTF-8, or check that it is the right file"
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


def _bytes(path: Path) -> Any:
    """The file, unpacked."""
    return gzip.open(path) if _suffix(path).endswith(_GZ) else path.open("rb")


def _not_text(path: Path) -> str:
    """The first line that is not UTF-8, and why."""
    with _bytes(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: {error}"
    return ""


def _demo(name: str) -> Opened:
    folder = resources.files("lorakit.data") / "demo"
    known = sorted(entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv"))
    if name not in known:
        raise DataError(f"there is no demo table '{name}'{nearest(name, known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        columns, rows = _read_csv(path)
        kept = list(rows())
    return columns, lambda: iter(kept)


def _read_csv(path: Path) -> Opened:
    delimiter = "\t" if _format(path) == ".tsv" else ","
    csv.field_size_limit(max(_FIELD, csv.field_size_limit()))

    def lines() -> Iterator[tuple[int, list[str], int]]:
        """Number and fields of every row, and the line on which it ends."""
        number = end = 0
        with _named(path), io.TextIOWrapper(_bytes(path), "utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            try:
                for number, row in enumerate(reader, 1):
                    end = reader.line_num
                    yield number, row, end
            except csv.Error as error:
                where = f"row {number + 1}, line{_lines(end + 1, reader.line_num)}"
                raise DataError(
                    f"'{path}' is not a table of comma-separated values: {where} ({error}); check its quotes"
                ) from None

    found = lines()
    first = next(found, None)
    if first is None:
        raise DataError(f"'{path}' is empty")
    _, fields, before = first
    header = [column.strip() for column in fields]
    if len(header) == 1:
        _refuse_other_cut(path, header[0])
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"'{path}' names column '{twice[0]}' twice in its header")
    faults: list[tuple[int, str]] = []
    n_good = 0
    for number, row, end in found:
        if row and len(row) != len(header):
            over = f", over line{_lines(before + 1, end)}: is a quote left open?" if end > before + 1 else ""
            faults.append((number, f"{len(row)} fields where the header has {len(header)}{over}"))
        n_good += len(row) == len(header)
        before = end
    leave_out(path, faults, "a text with a comma must stand in double quotes", left=n_good)
    return header, lambda: (
        (number, dict(zip(header, row))) for number, row, _ in islice(lines(), 1, None) if len(row) == len(header)
    )


def _refuse_other_cut(path: Path, header: str) -> None:
    """DataError if the only column seems to be several."""
    marks = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    mark = next((mark for mark in marks if mark in header), None)
    if mark is not None:
        wanted, way = ("tabs", ".csv") if _format(path) == ".tsv" else ("commas", ".tsv")
        renamed = f", or call it {way}" if mark in ",\t" else ""
        raise DataError(
            f"'{path}' has one column, {header[:60]!r}, which seems to be cut by {marks[mark]}; write the table with "
            f"{wanted}{renamed}"
        )


def _lines(begin: int, end: int) -> str:
    return f" {begin}" if begin == end else f"s {begin} to {end}"


def _read_json_lines(path: Path) -> Opened:
    def records() -> Iterator[tuple[int, Any]]:
        with _named(path), io.TextIOWrapper(_bytes(path), "utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        yield number, _JSON.decode(line)
                    except json.JSONDecodeError as error:
                        yield number, error

    rows = _of_list(path) if _format(path) == ".json" else records
    columns: dict[str, None] = {}
    faults: list[tuple[int, str]] = []
    n_good = 0
    for number, record in rows():
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
            n_good += 1
        else:
            broken = isinstance(record, json.JSONDecodeError)
            faults.append((number, f"not valid JSON ({record.msg})" if broken else "not an object"))
    leave_out(path, faults, left=n_good)
    return list(columns), lambda: ((number, record) for number, record in rows() if isinstance(record, dict))


def _of_list(path: Path) -> Callable[[], Iterator[tuple[int, Any]]]:
    try:
        whole = _JSON.decode(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(whole, list):
        raise DataError(f"'{path}' must hold a list of objects; for one object a line name it .jsonl")
    return lambda: enumerate(whole, 1)


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    return pyarrow


def _counted(batches: Iterator[Any]) -> Table:
    """Rows of pyarrow's batches, by number."""
    return enumerate((plain(row) for batch in batches for row in batch.to_pylist()), 1)


def _read_parquet(path: Path) -> Opened:
    arrow = _arrow()

    def batches() -> Iterator[Any]:
        try:
            with arrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_AT_ONCE)
        except arrow.ArrowInvalid as error:
            raise DataError(f"'{path}' is not a readable Parquet file: {error}") from None

    try:
        columns = arrow.parquet.read_schema(path).names
    except arrow.ArrowInvalid as error:
        raise DataError(f"'{path}' is not a readable Parquet file: {error}") from None
    return list(columns), lambda: _counted(batches())


def is_dataset(path: Path) -> bool:
    """Is it a directory that `datasets.Dataset.save_to_disk` wrote?"""
    return (path / "state.json").is_file() or any(path.glob("*.arrow"))


def _read_arrow(path: Path) -> Opened:
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
    columns, names = list(table.column_names), _label_names(path)

    def rows() -> Table:
        for number, row in _counted(table.to_batches(_AT_ONCE)):
            yield number, {k: by_name(v, names[k]) if k in names else v for k, v in row.items()} if names else row

    return columns, rows


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
_BY_ROWS = (".csv", ".tsv", ".jsonl", ".parquet")
_TEXTS: dict[str, Callable[[Path], Opened]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
}
_READERS = {**_TEXTS, ".parquet": _read_parquet, **{f"{suffix}{_GZ}": reader for suffix, reader in _TEXTS.items()}}
SUFFIXES = tuple(_READERS)
