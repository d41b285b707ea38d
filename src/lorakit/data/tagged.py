"""Tagged words: texts cut into words, and one tag for each; and the forms in which files hold them.

| form | how |
|---|---|
| CoNLL | a word a line, its tag in the last column (tabs or spaces), an empty line between texts; also as .tsv |
| slots | a directory with `seq.in` and `seq.out`: words, and as many tags, of one text a line (Snips, ATIS) |
| table | columns `words` and `tags` (see WORDS, TAGS): lists, lists as JSON, or texts that white space cuts |

In a CoNLL file columns are called by their number: "1" is the first. Lines `-DOCSTART-` and comments (`# ... = ...`) do
not count.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.cells import text_of
from lorakit.data.faults import BadRow, leave_out
from lorakit.data.memory import Memory, plain
from lorakit.data.rows import Part, at
from lorakit.data.sources import WORD_FILES, apart, column_of
from lorakit.data.spans import completed, plain_and_prefixed
from lorakit.data.tables import SUFFIXES, open_table, read_text
from lorakit.errors import DataError

WORDS = ("words", "tokens", "text", "sentence")
TAGS = ("tags", "ner_tags", "labels", "slots", "pos_tags")
_IN, _OUT = "seq.in", "seq.out"

Sentence = tuple[int, list[str], list[str] | None]  # row number, words, tags
Faults = list[tuple[int, str]]


@dataclass(frozen=True)
class Tagged(Part):
    """`words` of every text and, where known, as many `tags`."""

    words: tuple[tuple[str, ...], ...]
    tags: tuple[tuple[str, ...], ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        kinds = f", {len(self.known)} tags" if self.tags is not None else ", no tags"
        return f"Tagged({len(self)} texts{kinds}, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The texts."""
        return tuple(" ".join(words) for words in self.words)

    @property
    def known(self) -> set[str]:
        """All tags that occur."""
        return {tag for tags in self.tags or () for tag in tags}

    def take(self, indices: Sequence[int]) -> "Tagged":
        """The rows at these positions."""
        return Tagged(at(self.words, indices), at(self.tags, indices), self.source, at(self.lines, indices))

    def encoded(self) -> Iterator[str]:
        """Words and tags of each row."""
        return (json.dumps(row) for row in zip(self.words, self.tags or self.words))

    def telling(self) -> list[int]:
        """The first rows, and the first with each tag."""
        first: dict[str, int] = {}
        for place, tags in enumerate(self.tags or ()):
            for tag in tags:
                first.setdefault(tag, place)
        return sorted({*super().telling(), *first.values()})

    def about(self) -> str:
        """How many tags, and the first row."""
        first = " ".join(f"{word}/{tag}" for word, tag in zip(self.words[0], (self.tags or ((),))[0]))
        return f"{len(self.known)} tags; first row: {first[:90]}"

    def faults(self, valid: "Tagged", test: "Tagged") -> list[str]:
        """Tags must be everywhere, in one scheme, of more than one kind, and of no type that training has not seen."""
        faults = [f"'{part.source}' has no tags" for part in (self, valid, test) if part.tags is None]
        if faults:
            return faults
        if len(self.known) < 2:
            return [f"'{self.source}' has one tag only ('{next(iter(self.known))}'); at least two are needed to learn"]
        other = _of_another_scheme(self, valid, test)
        if other:
            return other
        way = "does not occur in the training rows; add examples of it there, or remove the row"
        known = completed(self.known)
        return [fault for part in (valid, test) for fault in part.unseen(known, way)]

    def unseen(self, known: Sequence[str], way: str) -> list[BadRow]:
        """The row of each tag that is not among those `known`; `way` says what that means."""
        seen = set(known)
        return [
            BadRow(self.source, line, f"tag '{tag}' {way}")
            for line, tags in zip(self.lines, self.tags or ())
            for tag in dict.fromkeys(tags)
            if tag not in seen
        ]


def _of_another_scheme(*parts: Tagged) -> list[str]:
    """The rows with tags of the scheme that fewer rows have, where some have prefixes and others not."""
    rows = [(part.source, line, set(tags)) for part in parts for line, tags in zip(part.lines, part.tags or ())]
    kinds = plain_and_prefixed(set().union(*(part.known for part in parts)))
    if not all(kinds):
        return []
    counts = [sum(not tags.isdisjoint(kind) for _, _, tags in rows) for kind in kinds]
    rare = int(counts[1] < counts[0])
    usual, n_usual = kinds[1 - rare][0], counts[1 - rare]
    own, others = ("no prefix", "a prefix")[rare], ("one", "none")[rare]
    return [
        BadRow(
            source,
            line,
            f"tag '{min(tags.intersection(kinds[rare]))}' has {own}, and '{usual}' has {others}, as those of {n_usual} "
            "rows have; write all tags in one scheme",
        )
        for source, line, tags in rows
        if not tags.isdisjoint(kinds[rare])
    ]


def make_tagged(given: Sequence[str | Sequence[str]], source: str = "texts") -> Tagged:
    """Texts without tags from Python values: a text, which white space cuts, or its words.

    >>> make_tagged(["play some jazz", ["New York", "rocks"]]).words
    (('play', 'some', 'jazz'), ('New York', 'rocks'))
    """
    faults: Faults = []
    cut = [(k, _cut(plain(one), k, "it", faults), None) for k, one in enumerate(given, 1)]
    return _checked(source, cut, faults)


def load_tagged(
    source: str | Path | Memory, *, words: str | None = None, tags: str | None = None, answers: bool = True
) -> Tagged:
    """The texts of one file, table or directory of slots; `words` and `tags` name columns.

    `answers=False` reads no tags, and takes what has none. DataError names every row that cannot be used, and why.
    """
    place, faults = None if isinstance(source, Memory) else Path(source), list[tuple[int, str]]()
    if place and (place / _IN).is_file():
        found = _slots(place, answers)
    elif place and _is_conll(place):
        found = _conll(place, words, tags, answers, faults)
    else:
        found = _table(source, words, tags, answers, faults)
    return _checked(str(source), list(found), faults)


def _checked(source: str, given: Sequence[Sentence], faults: Faults) -> Tagged:
    bad = {line for line, _ in faults}
    found: list[Sentence] = []
    for line, said, marks in given:
        if line in bad:
            continue
        if not said or marks == []:
            faults.append((line, "it has no words"))
        elif marks is not None and len(marks) != len(said):
            faults.append((line, f"{len(said)} words and {len(marks)} tags; each word needs one"))
        else:
            try:
                text_of(" ".join((*said, *(marks or ()))), "it")
                found.append((line, said, marks))
            except DataError as error:
                faults.append((line, str(error)))
    leave_out(source, sorted(faults), left=len(found))
    if not found:
        raise DataError(f"'{source}' has no rows")
    known = all(marks is not None for _, _, marks in found)
    words = tuple(tuple(said) for _, said, _ in found)
    tags = tuple(tuple(said or ()) for _, _, said in found)
    return Tagged(words, tags if known else None, source, tuple(line for line, _, _ in found))


def _slots(place: Path, answers: bool) -> Iterator[Sentence]:
    texts = read_text(place / _IN).rstrip("\n").split("\n")
    if not answers:
        yield from ((k, text.split(), None) for k, text in enumerate(texts, 1))
        return
    tags = read_text(place / _OUT).rstrip("\n").split("\n")
    if len(tags) != len(texts):
        raise DataError(
            f"'{place}': {_IN} has {len(texts)} lines and {_OUT} {len(tags)}; each text needs a line of tags"
        )
    yield from ((k, text.split(), found.split()) for k, (text, found) in enumerate(zip(texts, tags), 1))


def _is_conll(place: Path) -> bool:
    """Whether it is no table: another ending; or tab-separated with empty lines and no header that we know."""
    if not place.is_file():
        return False
    name = place.name.lower().removesuffix(".gz")
    if not name.endswith(".tsv"):
        return not name.endswith(tuple(SUFFIXES))
    text = read_text(place)
    header = {column.strip().lower() for column in text.split("\n", 1)[0].split("\t")}
    return bool(re.search(r"\n[ \t\r]*\n", text.strip())) and not header & {*WORDS, *TAGS}


def _is_part(place: Path) -> bool:
    """Whether it is called as a CoNLL file, or is a directory of slots."""
    return place.name.lower().removesuffix(".gz").endswith(WORD_FILES) or (place / _IN).is_file()


def _conll(place: Path, words: str | None, tags: str | None, answers: bool, faults: Faults) -> Iterator[Sentence]:
    lines = [line.rstrip("\r") for line in read_text(place).split("\n")]
    rows = [(k, re.split("\t" if "\t" in line else "[ \t]+", line.strip(" \r"))) for k, line in enumerate(lines, 1)]
    real = [(k, fields) for k, fields in rows if any(fields) and fields[0] != "-DOCSTART-"]
    n_fields = next((len(fields) for _, fields in real if not fields[0].startswith("#")), 1)
    if answers and n_fields < 2:
        raise DataError(f"'{place}' row {real[0][0] if real else 1}: a word and no tag; a line is a word and its tag")
    word = _number(place, words, n_fields, 0)
    tag = _number(place, tags, n_fields, n_fields - 1) if answers else None
    apart(str(place), ("words", str(word + 1)), ("tags", None if tag is None else str(tag + 1)))
    sentence: list[tuple[int, list[str]]] = []
    broken = False
    for k, fields in [*rows, (len(rows) + 1, [""])]:
        if not any(fields) or fields[0] == "-DOCSTART-":
            if sentence and not broken:
                found = [each for _, each in sentence]
                said = [each[tag] for each in found] if tag is not None else None
                yield sentence[0][0], [each[word] for each in found], said
            sentence, broken = [], False
        elif _is_comment(fields, n_fields):
            continue
        elif len(fields) != n_fields or not fields[word].strip() or (tag is not None and not fields[tag].strip()):
            faults.append((k, f"{_few(fields)}, where other lines have {n_fields} columns"))
            broken = True
        else:
            sentence.append((k, fields))


def _is_comment(fields: Sequence[str], n_fields: int) -> bool:
    """Not a tagged "#", nor a tagged "#word"."""
    told = fields[0] == "#" and any("=" in field for field in fields)
    return fields[0].startswith("#") and (len(fields) != n_fields or told)


def _number(place: Path, wanted: str | None, n_fields: int, usual: int) -> int:
    if wanted is None:
        return usual
    if not wanted.isdigit() or not 1 <= int(wanted) <= n_fields:
        raise DataError(f"'{place}' has no column '{wanted}'; its columns are called 1 to {n_fields}")
    return int(wanted) - 1


def _table(
    source: str | Path | Memory, words: str | None, tags: str | None, answers: bool, faults: Faults
) -> Iterator[Sentence]:
    columns, table = open_table(source, _is_part)
    asked = column_of(str(source), columns, words, WORDS, "words")
    said = column_of(str(source), columns, tags, TAGS, "tags") if answers else None
    apart(str(source), ("words", asked), ("tags", said))
    for line, row in table:
        found = _cut(row.get(asked), line, f"column '{asked}'", faults)
        yield line, found, _cut(row.get(said), line, f"column '{said}'", faults) if said else None


def _cut(value: Any, line: int, place: str, faults: Faults) -> list[str]:
    """Words or tags: a list, a list as JSON, or a text. [] and a fault if it is none, or has an empty one."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            faults.append((line, f"{place} is no list in JSON ({error.msg})"))
            return []
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(one, str | int) for one in found):
        faults.append((line, f"{place} is {repr(value)[:40]}; it must be a list of words, or a text"))
        return []
    words = [str(one).strip() for one in found]
    if not all(words) or not words:
        faults.append((line, f"{place} is empty" if not words else f"{place} has an empty word: {repr(found)[:60]}"))
        return []
    return words


def _few(fields: Sequence[str]) -> str:
    return f"{len(fields)} column{'s' if len(fields) != 1 else ''} ({' '.join(fields)[:40]!r})"
