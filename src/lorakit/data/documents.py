"""Documents: texts as they are, to be learned from their first word to their last; and where they come from.

| form | document |
|---|---|
| a file that is no table (also .gz) | all of it; of a .txt what stands between lines with `<|endoftext|>`, if any |
| a folder, and the folders in it | each file of text or code by its ending; not hidden ones, `node_modules` ... |
| a table | the column `text`, `content` or `code`, or the one that the caller names |

White space is kept.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.data.cells import any_text, text_in
from lorakit.data.memory import Memory
from lorakit.data.rows import Part, at
from lorakit.data.sources import column_of
from lorakit.data.tables import DEMO, SUFFIXES, inside, is_dataset, open_table, read_text, usable_rows
from lorakit.errors import DataError

NAMES = ("text", "content", "code")
END = "<|endoftext|>"
PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (
    *(".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".scala"),
    *(".go", ".rs", ".rb", ".php", ".swift", ".cs", ".sh", ".sql", ".html", ".css", ".r", ".jl", ".lua", ".hs", ".ml"),
    *(".ex", ".erl", ".clj", ".pl", ".vim", ".toml", ".yaml", ".yml"),
)
_BESIDE = {"node_modules", "__pycache__", "venv", "site-packages", "dist", "build"}
_FEW = 10  # documents; a tenth of fewer is none
_STRETCHES = 100  # of few documents together, where parts are split off
_STRETCH = 2000  # characters; shorter only where there would be fewer than `_FEW` stretches
_SHOWN = 3  # names of files


@dataclass(frozen=True)
class Documents(Part):
    """`texts`; `unended` are the lines of those that go on behind their end; `left_out` tells what was left out."""

    texts: tuple[str, ...]
    source: str
    lines: tuple[int, ...]
    unended: frozenset[int] = frozenset()
    left_out: str = ""

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The texts."""
        return self.texts

    def take(self, indices: Sequence[int]) -> "Documents":
        """The documents at these positions."""
        return replace(self, texts=at(self.texts, indices), lines=at(self.lines, indices))

    def encoded(self) -> Iterator[str]:
        """Each text, and whether it ends there."""
        return (f"{';' if line in self.unended else ':'}{text}" for line, text in zip(self.lines, self.texts))

    def about(self) -> str:
        """How much text, what was left out, and how it begins."""
        kind = "stretches of few documents" if self.unended else "documents"
        told = f"{len(self)} {kind}, {sum(map(len, self.texts)):,} characters"
        return "; ".join(filter(None, [told, self.left_out, f"first: {self.texts[0][:70]!r}"]))

    def divided(self) -> "Documents":
        """Itself; fewer than ten documents are cut at line ends, into about a hundred stretches of like length."""
        if len(self) >= _FEW:
            return self
        size = sum(map(len, self.texts))
        length = max(1, size // max(_FEW, min(_STRETCHES, size // _STRETCH)))
        found = [(piece, last) for text in self.texts for piece, last in _stretches(text, length)]
        unended = frozenset(line for line, (_, last) in enumerate(found, 1) if not last)
        texts = tuple(piece for piece, _ in found)
        return replace(self, texts=texts, lines=tuple(range(1, len(found) + 1)), unended=unended)

    def parted(self, draw: random.Random, valid: bool, test: bool) -> tuple[list[int], list[int], list[int]] | None:
        """Of stretches the last ones are held out: what a text says is not known from what follows it."""
        n = len(self)
        if not self.unended or n <= valid + test:
            return None
        n_valid, n_test = (max(1, n // _FEW) if wanted else 0 for wanted in (valid, test))
        places, begin = list(range(n)), n - n_valid - n_test
        return places[:begin], places[begin : begin + n_valid], places[begin + n_valid :]


def make_documents(texts: Sequence[Any], source: str = "texts") -> Documents:
    """Texts from Python, to be continued; one may be empty. DataError names what is no text."""
    found, lines = usable_rows(source, enumerate(texts, 1), lambda text: any_text(text, "it"), header=False)
    return Documents(tuple(found), source, tuple(lines))


def load_documents(source: str | Path | Memory, *, text: str | None = None) -> Documents:
    """The documents of a file, a folder or a table, in any of the forms above; `text` names a column.

    Raises DataError that names file and row of what cannot be used. Files of a folder that are no text are left out,
    and `left_out` tells of them.
    """
    if _is_table(source):
        return _of_table(source, text)
    path = Path(str(source))
    if text is not None:
        raise DataError(f"'{path}' is no table, so it has no column '{text}'; leave --text out")
    found, left_out = _of_folder(path) if path.is_dir() else (_of_file(path), "")
    if not found:
        way = inside(path)[1] if path.is_dir() else ""
        raise DataError(f"'{path}' holds no text{f': {left_out}' if left_out else ''}{way}")
    return Documents(tuple(found), str(source), tuple(range(1, len(found) + 1)), left_out=left_out)


def _is_table(source: str | Path | Memory) -> bool:
    if isinstance(source, Memory) or str(source).startswith(DEMO):
        return True
    path = Path(source)
    if path.is_dir():
        return is_dataset(path)
    return not path.exists() or path.name.lower().endswith(SUFFIXES)


def _of_table(source: str | Path | Memory, text: str | None) -> Documents:
    name = str(source)
    columns, table = open_table(source)
    column = column_of(name, columns, text, NAMES, "text")
    texts, lines = usable_rows(name, table, lambda row: text_in(row, column), bool(columns))
    return Documents(tuple(texts), name, tuple(lines))


def _of_file(path: Path) -> list[str]:
    """The documents of one file; none if it holds only white space."""
    text = any_text(read_text(path), f"'{path}'")
    marked = END in text and ".txt" in path.suffixes
    parts = re.split(rf"^{re.escape(END)}\r?\n?", text, flags=re.MULTILINE) if marked else [text]
    return [part for part in parts if part.strip()]


def _of_folder(path: Path) -> tuple[list[str], str]:
    """The documents of all text files in it, by name, and what was left out."""
    found: list[str] = []
    left: dict[str, list[str]] = {"are no text": [], "are empty": [], "have other endings": []}
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") or part in _BESIDE for part in inner.parts):
            continue
        if not file.name.lower().removesuffix(".gz").endswith((*PROSE, *CODE)):
            left["have other endings"].append(str(inner))
            continue
        try:
            own = _of_file(file) if file.stat().st_size else []
        except DataError:
            left["are no text"].append(str(inner))
            continue
        found += own
        if not own:
            left["are empty"].append(str(inner))
    told = [f"{len(names)} files {why} ({_few(names)})" for why, names in left.items() if names]
    return found, f"left out: {', '.join(told)}" if told else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


def _stretches(text: str, length: int) -> Iterator[tuple[str, bool]]:
    """The text in stretches of at least so many characters, up to a line end (or a blank, in a long line); and whether
    it is the last one."""
    begin = 0
    while begin < len(text):
        end = begin + length
        if len(text) - end < length // 2:
            end = len(text)
        else:
            places = [place + 1 for mark in "\n " if (place := text.find(mark, end, end + length)) >= 0]
            end = places[0] if places else end
        yield text[begin:end], end == len(text)
        begin = end
