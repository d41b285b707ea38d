"""Tables of interactions: what is read, what is held out, what is refused."""

import random

import pytest

from lorakit.data import load_splits
from lorakit.data.faults import skipping
from lorakit.data.interactions import Interactions, load_interactions
from lorakit.errors import DataError


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_usual_columns_are_found_and_a_repeated_pair_counts_once(tmp_path):
    file = write(tmp_path / "a.csv", "userId,movieId,rating,timestamp", "7,b,5,30", "7,b,3,10", "8,a,1,20", "7,c,4,40")
    rows = load_interactions(file)
    assert rows.users == ("7", "8", "7")
    assert rows.items == ("b", "a", "c")
    assert rows.times == (10, 20, 40)
    assert rows.lines == (3, 4, 5)
    assert load_interactions(file, items=False).users == ("7", "8")
    assert rows.about() == "2 users, 3 items; first row: 7 -> b"


@pytest.mark.parametrize("rating", [">=4", "rating >= 4", "rating>=3.5"])
def test_ratings_below_the_least_are_left_out(tmp_path, rating):
    file = write(tmp_path / "a.csv", "user,item,rating", "1,a,5", "1,b,3", "2,a,4.0")
    assert load_interactions(file, rating=rating).items == ("a", "a")


def test_numbers_and_dates_are_what_they_are_in_other_formats(tmp_path):
    lines = [
        '{"user": 3.0, "item": 12, "date": "2026-01-02"}',
        '{"user": 3, "item": 13, "date": "2026-01-01T12:00:00"}',
    ]
    rows = load_interactions(write(tmp_path / "a.jsonl", *lines))
    assert rows.users == ("3", "3")
    assert rows.times[0] - rows.times[1] == 12 * 3600


@pytest.mark.parametrize(
    ("lines", "columns", "words"),
    [
        (("user,item", ",a", "1,"), {}, "row 2: column 'user' is empty.*row 3: column 'item' is empty"),
        (("user,item,time", "1,a,soon"), {}, "row 2: column 'time' is 'soon', neither a number nor a date"),
        (
            ("user,item,time", "1,a,2026-01-01", "1,b,1767312000", "2,a,2026-01-03"),
            {},
            "row 3: column 'time' is a number, and 2 rows have dates; write all times in one way",
        ),
        (
            ("user,item,time", "1,a,5", "1,b,2026-01-01", "2,a,7"),
            {},
            "row 3: column 'time' is a date, and 2 rows have n",
        ),
        (("user,item,rating", "1,a,good"), {"rating": ">=3"}, "row 2: column 'rating' is 'good', which is no number"),
        (("user,item,rating", "1,a,2"), {"rating": "rating"}, "does not say from which value on.*'rating>=4'"),
        (("user,item,rating", "1,a,2"), {"rating": "4"}, "does not say from which value on.* write '>=4',"),
        (("user,item,rating", "1,a,2"), {"rating": ">3.5"}, "does not say from which value on.* write '>=3.5',"),
        (("user,item,rating", "1,a,2"), {"rating": "good"}, "does not say from which value on.* write '>=4',"),
        (("user,item,rating", "1,a,2"), {"rating": ">=3"}, "has no row with rating >= 3"),
        (("user,item", "1,a"), {"rating": "stars>=3"}, "has no column 'stars'"),
        (("who,item", "1,a"), {}, "no column with a usual name for the user.*name one with --user"),
        (("user,item",), {}, "a header and no rows"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, lines, columns, words):
    with pytest.raises(DataError, match=f"(?s){words}"):
        load_interactions(write(tmp_path / "a.csv", *lines), **columns)


def test_a_time_of_another_kind_that_is_left_out_hides_no_other_row(tmp_path):
    lines = ("user,item,time", "1,a,2026-01-05", "1,a,7", "1,b,2026-01-03")
    with skipping(1):
        rows = load_interactions(write(tmp_path / "a.csv", *lines))
    assert (rows.items, rows.lines) == (("a", "b"), (2, 4))


def test_the_last_of_every_user_is_held_out():
    users = tuple("aaaabbbcc")
    times = (4.0, 1.0, 3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 2.0)
    rows = Interactions(users, tuple("123456789"), times, "here", tuple(range(9)))
    train, valid, test = (rows.take(places).items for places in rows.parted(random.Random(0), True, True))
    assert set(test) == {"1", "6"}
    assert set(valid) == {"3", "7"}
    assert set(train) == set("245" + "89")  # two interactions are too few to hold two out
    train, valid, test = rows.parted(random.Random(0), False, True)
    assert {rows.items[i] for i in test} == {"1", "6", "9"} and not valid


def test_without_times_the_seed_says_what_is_held_out(tmp_path):
    lines = [f"u{k % 9},i{k}" for k in range(90)]
    file = write(tmp_path / "a.csv", "user,item", *lines)
    one, same, other = (load_splits(file, seed=seed, read=load_interactions) for seed in (1, 1, 2))
    assert one == same
    assert one.test.items != other.test.items
    assert sorted(one.test.users) == sorted(one.valid.users) == sorted(set(one.train.users))
    assert len(one.train) == 72


def test_nothing_to_hold_out_and_held_out_rows_that_are_learned_are_refused(tmp_path):
    single = write(tmp_path / "single.csv", "user,item", "1,a", "2,b")
    with pytest.raises(DataError, match="no user has more than 2 interactions"):
        load_splits(single, read=load_interactions)
    more = write(tmp_path / "more.csv", "user,item", "1,b", "1,a")
    with pytest.raises(DataError, match="row 3: '1' had 'a' in the training rows"):
        load_splits(single, valid=more, test=more, read=load_interactions)
