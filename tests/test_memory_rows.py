"""Rows in memory are read as those of a file are."""

import pytest

import lorakit as lk
from lorakit.data import load_rows, load_splits
from lorakit.data.memory import in_memory
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
    datasets = pytest.importorskip("datasets", reason="runs where datasets is installed")
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
