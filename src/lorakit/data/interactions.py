"""Interactions: who had what. Rows of a table with a user, an item, and perhaps a rating and a time.

Usual tables are read as they are: MovieLens (userId, movieId, rating, timestamp), logs of a shop (user_id, product_id,
date), pairs alone. A rating counts only where a least one is asked for (`rating=">=4"`, or `"stars>=4"` with the name
of its column): rows below it are left out. What a user had more than once counts once, when it came first. Times are
numbers or dates, in all rows alike.
"""

import hashlib
import math
import random
import re
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorakit.data.cells import name_in
from lorakit.data.faults import BadRow, leave_out
from lorakit.data.rows import Part, at
from lorakit.data.sources import apart, column_of
from lorakit.data.tables import open_table
from lorakit.errors import DataError, NoRowsError

USER_NAMES = ("user", "user_id", "userid", "uid", "customer", "customer_id", "reviewerid")
ITEM_NAMES = ("item", "item_id", "itemid", "iid", "movieid", "movie_id", "product", "product_id", "productid", "asin")
TIME_NAMES = ("time", "timestamp", "date", "datetime", "ts", "unixreviewtime")
RATING_NAMES = ("rating", "stars", "score", "overall")
_BOUND = re.compile(r"-?\d+(?:\.\d+)?")
_RATING = re.compile(rf"\s*(.*?)\s*>=\s*({_BOUND.pattern})\s*")


@dataclass(frozen=True)
class Interactions(Part):
    """`users` and, where known, one item each; `times` in seconds, where there are any."""

    users: tuple[str, ...]
    items: tuple[str, ...] | None
    times: tuple[float, ...] | None
    source: str
    lines: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Interactions({len(self)} of {len(set(self.users))} users, '{self.source}')"

    @property
    def inputs(self) -> tuple[str, ...]:
        """User and item of every row."""
        return tuple(f"{user} {item}" for user, item in zip(self.users, self.items or self.users))

    def take(self, indices: Sequence[int]) -> "Interactions":
        """The rows at these positions."""
        users, items, times = at(self.users, indices), at(self.items, indices), at(self.times, indices)
        return Interactions(users, items, times, self.source, at(self.lines, indices))

    def digest(self) -> str:
        """A hash of users and items, in their order."""
        digest = hashlib.sha256()
        for user, item in zip(self.users, self.items or self.users):
            digest.update(f"{len(user)}:{user}{len(item)}:{item}".encode())
        return digest.hexdigest()[:16]

    def about(self) -> str:
        """How many users and items, and the first row."""
        items = self.items or ("",)
        return f"{len(set(self.users))} users, {len(set(items))} items; first row: {self.users[0]} -> {items[0]}"

    def faults(self, valid: "Interactions", test: "Interactions") -> list[str]:
        """All rows need an item, and what is held out must not be learned from."""
        faults = [f"'{part.source}' has no items" for part in (self, valid, test) if part.items is None]
        learned = set(zip(self.users, self.items or ()))
        for part in (valid, test):
            for user, item, line in zip(part.users, part.items or (), part.lines):
                if (user, item) in learned:
                    why = f"'{user}' had '{item}' in the training rows; remove one of them"
                    faults.append(BadRow(part.source, line, why))
        return faults

    def parted(self, draw: random.Random, valid: bool, test: bool) -> tuple[list[int], list[int], list[int]]:
        """The last of every user to report on, the last but one to choose by; without times any two, at random.

        Users with too few rows are learned from only. DataError if that is everybody.
        """
        own: dict[str, list[int]] = defaultdict(list)
        for i, user in enumerate(self.users):
            own[user].append(i)
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        held = int(valid) + int(test)
        for places in own.values():
            if self.times is None:
                draw.shuffle(places)
            else:
                places.sort(key=self.times.__getitem__)
            cut = len(places) - held if len(places) > held else len(places)
            parts[0].extend(places[:cut])
            for part, place in zip([1] * valid + [2] * test, places[cut:]):
                parts[part].append(place)
        if not any(parts[1:]):
            raise DataError(
                f"'{self.source}': no user has more than {held} interactions, so none can be held out; add rows, or "
                "give validation and test rows as files of their own"
            )
        return parts


def load_interactions(
    source: str | Path,
    *,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    time: str | None = None,
    items: bool = True,
) -> Interactions:
    """The rows of one file or table. `items=False` reads users only. DataError names every row that cannot be used."""
    name = str(source)
    columns, table = open_table(source)
    user_column = column_of(name, columns, user, USER_NAMES, "user")
    item_column = column_of(name, columns, item, ITEM_NAMES, "item") if items else ""
    time_column = column_of(name, columns, time, TIME_NAMES, "time", needed=False) if items else ""
    apart(name, ("user", user_column), ("item", item_column), ("time", time_column))
    rating_column, least = _threshold(name, columns, rating) if rating and items else ("", 0.0)
    firsts: list[dict[tuple[str, str], tuple[float, int]]] = [{}, {}]  # of rows with numbers as times, and with dates
    good = [array("q"), array("q")]
    faults: list[tuple[int, str]] = []
    for line, row in table:
        try:
            who, what = (_word(row, column) if column else "" for column in (user_column, item_column))
        except DataError as error:
            faults.append((line, str(error)))
            continue
        stars = _number(row.get(rating_column)) if rating_column else least
        when, dated = _moment(row.get(time_column)) if time_column else (0.0, False)
        if stars is None:
            faults.append((line, f"column '{rating_column}' is {row.get(rating_column)!r:.40}, which is no number"))
        elif when is None:
            told = f"{row.get(time_column)!r:.40}, neither a number nor a date like 2026-01-31"
            faults.append((line, f"column '{time_column}' is {told}"))
        else:
            good[dated].append(line)
            found = firsts[dated]
            if stars >= least and (when, line) < found.get((who, what), (math.inf, 0)):
                found[who, what] = (when, line)
    usual = int(len(good[1]) > len(good[0]))
    own, others = ("a number", "dates") if usual else ("a date", "numbers")
    odd = f"column '{time_column}' is {own}, and {len(good[usual])} rows have {others}; write all times in one way"
    leave_out(name, sorted([*faults, *((line, odd) for line in good[1 - usual])]), left=len(good[usual]))
    found = firsts[usual]
    if not found:
        why = f"no row with {rating_column} >= {least:g}" if rating_column else "a header and no rows"
        raise NoRowsError(f"'{name}' has {why}" if columns else f"'{name}' is empty")
    order = sorted(found, key=lambda pair: found[pair][1])
    return Interactions(
        tuple(who for who, _ in order),
        tuple(what for _, what in order) if items else None,
        tuple(found[pair][0] for pair in order) if time_column else None,
        name,
        tuple(found[pair][1] for pair in order),
    )


def _threshold(source: str, columns: list[str], rating: str) -> tuple[str, float]:
    """The rating's column, and the least that counts."""
    match = _RATING.fullmatch(rating)
    if match is None:
        number = _BOUND.search(rating)
        meant = f"{rating}>=4" if rating in columns else f">={number[0] if number else 4}"
        raise DataError(
            f"'{source}': the rating '{rating}' does not say from which value on an interaction counts; write "
            f"'{meant}', or leave it out and every row counts"
        )
    return column_of(source, columns, match[1] or None, RATING_NAMES, "rating"), float(match[2])


def _word(row: Mapping[str, Any], column: str) -> str:
    """A name; 7 and 7.0 are the same one. DataError if there is none."""
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        row = {column: int(value)}
    return name_in(row, column)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _moment(value: Any) -> tuple[float | None, bool]:
    """Seconds of a number or a date, None of what is neither; and whether it is a date."""
    number = _number(value)
    if number is not None:
        return number, False
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    except ValueError:
        return None, False
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp(), True
