"""Where rows come from: a table, a folder of parts, the demo.

Columns are named by the caller or found by their usual names. Nothing is guessed beyond that: a column that is not
there is an error that lists those that are.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lorakit.data.cells import label_in, text_in
from lorakit.data.faults import gathered, skipping, usable
from lorakit.data.memory import NAME, Memory, in_memory, parts_in_memory
from lorakit.data.rows import Part, Rows, Splits, split
from lorakit.data.streamed import read_or_streamed
from lorakit.data.tables import DEMO, SUFFIXES, Table, open_table, usable_rows
from lorakit.errors import DataError, nearest

TEXT_NAMES = ("text", "sentence", "content", "message", "utterance", "query", "question", "review")
PAIRS = (
    *(("text", "text2"), ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"), ("sentence1", "sentence2")),
    *(("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis")),
    ("question1", "question2"),
)
LABEL_NAMES = ("label", "intent", "category", "class", "sentiment", "target", "gold_label", "is_duplicate")
PARTS = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
WORD_FILES = (".txt", ".conll", ".conllu", ".bio", ".bioes", ".bmes", ".iob", ".iob2")
_ENDINGS = (*SUFFIXES, ".npz", "", *WORD_FILES, *(f"{ending}.gz" for ending in WORD_FILES))  # of parts; "": folders
_SHARE = 0.1  # of the training rows, for a part that is not given

P = TypeVar("P", bound=Part)
X = TypeVar("X")


def load_splits(
    data: Any,
    *,
    valid: Any = None,
    test: Any = None,
    seed: int = 0,
    read: Callable[..., P] | None = None,
    skip_bad: int = 0,
    most_in_memory: int | None = None,
    **columns: Any,
) -> Splits[P]:
    """Training, validation and test rows.

    `data` is a file, a directory with parts of their own (`train.csv`, `valid.csv`, `test.csv`, or a Hugging Face
    dataset), "demo:support", or rows in memory (data/memory.py). What is not given is split off the training rows, at
    random by `seed`, within each label where there are labels. `read` reads one table and takes the names of its
    `columns`: `load_rows` (the default) `text`, `text2` and `label`, `load_dialogues` `prompt` and `answer`. Rows
    of a file that would take more than `most_in_memory` bytes (half of what is free) stay in it: data/streamed.py.
    Raises DataError that names file, row and way out; up to `skip_bad` rows that cannot be used, of all parts together,
    are left out (`Splits.skipped`).
    """
    plain: Callable[..., Any] = partial(read or load_rows, **columns)

    def reader(source: Any) -> Any:
        return read_or_streamed(source, plain, most_in_memory)

    with skipping(skip_bad) as skipped, gathered():
        found = _loaded(data, {"valid": valid, "test": test}, seed, reader)
        return usable(replace(found, skipped=skipped.bad), Splits.checked)[0]


def _loaded(data: Any, given: Mapping[str, Any], seed: int, reader: Callable[[Any], Any]) -> Splits[Any]:
    parts = _parts(data) if isinstance(data, str | Path) else parts_in_memory(data, PARTS)
    loaded = {"train": reader(parts.get("train", data))}
    for name, own in given.items():
        place = own if own is not None else parts.get(name)
        if place is not None:
            loaded[name] = reader(place if isinstance(place, str | Path) else in_memory(place, f"{NAME} ('{name}')"))
    train = loaded["train"]
    share = {name: 0.0 if name in loaded else _SHARE for name in ("valid", "test")}
    if not any(share.values()):
        return Splits(train, loaded["valid"], loaded["test"])
    cut = split(train, seed, **share)
    return Splits(cut.train, loaded.get("valid", cut.valid), loaded.get("test", cut.test))


def load_rows(
    source: str | Path | Memory,
    *,
    text: str | None = None,
    text2: str | None = None,
    label: str | None = None,
    labels: bool = True,
) -> Rows:
    """The rows of one file or table, single texts or pairs of them (`text_columns`); `labels=False` reads no labels."""
    name = str(source)
    columns, table = open_table(source)
    places = text_columns(name, columns, text, text2)
    column = column_of(name, columns, label, LABEL_NAMES, "label") if labels else ""
    apart(name, *named(places), ("label", column))
    learned = partial(label_in, column=column) if column else None
    texts, others, found, lines = read_texts(name, columns, table, places, learned)
    return Rows(texts, found, name, lines, others)


def read_texts(
    source: str,
    columns: list[str],
    table: Table,
    places: tuple[str, str],
    learned: Callable[[Mapping[str, Any]], X] | None,
) -> tuple[tuple[str, ...], tuple[str, ...] | None, tuple[X, ...] | None, tuple[int, ...]]:
    """Texts, second texts where there are pairs, what `learned` finds in each row, and row numbers.

    `places` are the columns that `text_columns` found. DataError names every row that cannot be used, among them those
    for which `learned` raises one.
    """
    first, second = places

    def read(row: Mapping[str, Any]) -> tuple[str, str, list[X]]:
        own = [text_in(row, column).strip() for column in (first, second) if column]
        return own[0], own[-1], [learned(row)] if learned else []

    found, lines = usable_rows(source, table, read, bool(columns))
    texts, others, goals = zip(*found)
    return texts, others if second else None, tuple(goal for (goal,) in goals) if learned else None, tuple(lines)


def text_columns(source: str, columns: list[str], text: str | None, text2: str | None) -> tuple[str, str]:
    """The column of the texts, and that of the second texts: "" where the rows are single texts.

    Pairs are found by the names in `PAIRS`, if there is no other text beside them; or `text2` names the second column.
    """
    if text is None and text2 is None:
        lower = {column.lower(): column for column in columns}
        pairs = [(lower[first], lower[second]) for first, second in PAIRS if first in lower and second in lower]
        if pairs:
            more = [
                lower[name] for name in (*TEXT_NAMES, *sum(PAIRS, ())) if name in lower and lower[name] not in pairs[0]
            ]
            if more:
                raise DataError(
                    f"'{source}' has the pair of columns '{pairs[0][0]}' and '{pairs[0][1]}', and '{more[0]}' too; "
                    "name one with --text COLUMN, or two with --text COLUMN and --text2 COLUMN"
                )
            return pairs[0]
    second = column_of(source, columns, text2, (), "text2", needed=False)
    rest = columns if text is not None else [column for column in columns if column != second]
    first = column_of(source, rest, text, TEXT_NAMES, "text")
    apart(source, *named((first, second)))
    return first, second


def named(places: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The columns of texts with their nouns, for `apart`."""
    return ("text", places[0]), ("text2", places[1])


def text_column(source: str, columns: list[str], text: str | None, way: str = "") -> str:
    """The column of the texts, for who takes single ones. DataError where rows are pairs; `way` is one more way out."""
    first, second = text_columns(source, columns, text, None)
    if second:
        raise DataError(
            f"'{source}' has pairs of texts, in '{first}' and '{second}', and here each row is one text; name its "
            f"column with --text COLUMN{way}"
        )
    return first


def column_of(
    source: str, columns: list[str], wanted: str | None, usual: tuple[str, ...], noun: str, needed: bool = True
) -> str:
    """The column of this name, or of a usual one; "" if there is none and none is needed."""
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


def apart(source: str, *pairs: tuple[str, str | None]) -> None:
    """DataError if two of these, each a noun and its column (none, if it has none), are one column.

    Whoever is shown what is to be learned learns nothing, and reports that all of it is right.
    """
    nouns: dict[str, str] = {}
    for noun, column in pairs:
        if column and (other := nouns.setdefault(column, noun)) != noun:
            raise DataError(
                f"'{source}': {other} and {noun} are both '{column}'; give each a column of its own, with "
                f"--{other} COLUMN and --{noun} COLUMN"
            )


def _parts(data: str | Path) -> dict[str, Any]:
    """Parts that a directory or the demo brings by itself: train, valid, test -> source."""
    name = str(data)
    if name == f"{DEMO}support":
        return {part: f"{DEMO}support_{part}" for part in PARTS}
    from lorakit.data.images import is_class, parts_of_archive

    path = Path(data)
    if not path.is_dir():
        return parts_of_archive(path)
    places = {part: [path / f"{name}{end}" for name in names for end in _ENDINGS] for part, names in PARTS.items()}
    there = {part: [one for one in some if one.exists() and not is_class(one)] for part, some in places.items()}
    found = {part: some[0] for part, some in there.items() if some}
    return found if "train" in found else {}  # without it the folder is of another making
