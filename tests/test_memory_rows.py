"""Rows in memory are read as those of a file are."""

import json
import math

import numpy as np
import pandas
import pytest

import lorakit as lk
from lorakit.data import load_dialogues, load_label_sets, load_questions, load_rows, load_splits, load_tagged
from lorakit.data.interactions import load_interactions
from lorakit.data.memory import in_memory
from lorakit.data.tables import open_table
from lorakit.errors import DataError, UsageError
from tiny_text import small_task, table

place, base, data = small_task(60)


@pytest.fixture
def rows(place):
    found = load_rows(place / "data.csv")
    return [{"text": text, "label": label} for text, label in zip(found.texts, found.labels)]


def test_every_form_gives_the_rows_of_the_file(place, rows):
    import pyarrow

    wanted = load_rows(place / "data.csv")
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    for form in (rows, tuple(rows), columns, Frame(rows)):
        found = load_rows(in_memory(form))
        assert (found.texts, found.labels) == (wanted.texts, wanted.labels)
    assert load_rows(in_memory(pyarrow.table(columns).to_pylist())).texts == wanted.texts
    parts = load_splits({"train": rows, "validation": rows[:9], "test": columns})
    assert [len(part) for part in (parts.train, parts.valid, parts.test)] == [60, 9, 60]
    assert load_splits(rows).train.labels == load_splits(place / "data.csv").train.labels


class Frame:
    """What a DataFrame shows of itself."""

    def __init__(self, rows):
        self.rows, self.columns = rows, list(rows[0])

    def to_dict(self, orient):
        assert orient == "records"
        return self.rows


def test_a_dataset_is_read_with_the_names_of_its_labels(rows):
    import datasets

    names = sorted({row["label"] for row in rows})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_list([{**row, "label": names.index(row["label"])} for row in rows], features=features)
    assert load_rows(in_memory(made)).labels == tuple(row["label"] for row in rows)


def test_a_fit_takes_them_and_gives_the_same_adapter_as_the_file(place, base, rows):
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3}
    found = lk.fit(base, rows, out=place / "run", **settings)
    assert found.adapter == lk.fit(base, place / "data.csv", **settings).adapter
    assert lk.evaluate(place / "run", rows).n_rows == 60
    assert lk.evaluate(place / "run", table(place / "more.csv", 30)).n_rows == 30


def test_faults_name_the_row_or_the_column():
    for wrong, error, words in (
        ([{"text": "a", "label": "b"}, "c"], DataError, "row 2: it is 'c', not a dict"),
        ({"text": ["a", "b"], "label": ["x"]}, DataError, "unlike length: 'text' has 2, 'label' has 1"),
        ({"text": "a", "label": "b"}, UsageError, "must have a list for each column"),
        ([{"txt": "a", "label": "b"}] * 9, DataError, "'the rows in memory' has no column with a usual name"),
        ([], DataError, "the rows in memory: there are none"),
        (None, UsageError, "the data is NoneType None; give a file"),
    ):
        with pytest.raises(error, match=words):
            load_splits(wrong)


ALPACA = {"instruction": ["Add.", "Sing."], "input": ["2 2", math.nan], "output": ["4", "la"]}


@pytest.mark.parametrize("frame", [False, True], ids=["dict", "DataFrame"])
def test_a_cell_that_is_not_a_number_is_an_empty_one(frame):
    def made(columns):
        if not frame:
            return in_memory(columns)
        return in_memory(pandas.DataFrame(columns))

    assert load_dialogues(made(ALPACA)).inputs == ("Add.\n\n2 2", "Sing.")
    for read, columns, told in (
        (load_rows, {"text": ["a", "b"], "label": ["x", math.nan]}, "row 2: column 'label' is empty"),
        (load_rows, {"text": ["a", np.float32("nan")], "label": ["x", "y"]}, "row 2: column 'text' is empty"),
        (load_interactions, {"user": [7, math.nan], "item": ["a", "b"]}, "row 2: column 'user' is empty"),
    ):
        with pytest.raises(DataError, match=told):
            read(made(columns))


def test_what_pandas_says_is_absent_is_so():
    rows = {"user": ["a", pandas.NA], "item": ["x", "y"], "time": [pandas.Timestamp("2026-01-31"), pandas.NaT]}
    with pytest.raises(DataError, match="row 2: column 'user' is empty"):
        load_interactions(in_memory(pandas.DataFrame(rows)))
    with pytest.raises(DataError, match="row 2: column 'time' is None, neither a number nor a date"):
        load_interactions(in_memory(pandas.DataFrame({**rows, "user": ["a", "b"]})))


def test_a_label_that_is_not_a_number_is_empty_in_a_file_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(DataError, match="row 2: column 'label' is empty"):
        load_rows(tmp_path / "a.jsonl")
    rows = [{key: values[k] for key, values in ALPACA.items()} for k in range(2)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_dialogues(tmp_path / "b.jsonl").inputs == ("Add.\n\n2 2", "Sing.")


def test_arrays_in_cells_are_lists_as_those_of_a_parquet_file_are():
    talk = np.array([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], dtype=object)
    assert load_dialogues(in_memory([{"messages": talk}])).answers == ("b",)
    said = {"text": np.array(["b", "b"], dtype=object), "answer_start": np.array([2, 2])}
    row = {"question": "a?", "context": "a b", "answers": said}
    assert load_questions(in_memory([row])).answers == ((("b", 2), ("b", 2)),)
    assert load_label_sets(in_memory([{"text": "a", "labels": np.array([3, 1])}])).labels == (("3", "1"),)
    words = {"words": np.array(["a", "b"]), "tags": np.array(["O", "B-x"], dtype=object)}
    assert load_tagged(in_memory([words])).tags == (("O", "B-x"),)
    pixels = np.zeros((2, 2), np.uint8)
    ((_, kept),) = open_table(in_memory([{"image": pixels}]))[1]
    assert kept["image"] is pixels  # an image stays one
