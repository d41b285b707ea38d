"""Rows from files: every format, and every fault named with its file and row."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from lorakit.data import Splits, load_rows, load_splits
from lorakit.data.batches import Tokens, passes, training_batches
from lorakit.data.rows import Rows, split
from lorakit.errors import DataError
from lorakit.tasks.task import TASKS

ROWS = [("good film", "pos"), ("bad film", "neg"), ("so, so", "neg")]


def put(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def csv_text(rows=ROWS, header="text,label"):
    return header + "\n" + "".join(f'"{text}",{label}\n' for text, label in rows)


def rows_of(texts_and_labels, source="x"):
    texts, labels = zip(*texts_and_labels)
    return Rows(tuple(texts), tuple(labels), source, tuple(range(2, len(texts) + 2)))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "dataset", "named"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    texts, labels = [t for t, _ in ROWS], [label for _, label in ROWS]
    if name == "a.csv":
        put(path, csv_text())
    elif name == "a.tsv":
        put(path, "text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in ROWS))
    elif name == "a.jsonl":
        put(path, "\n".join(json.dumps({"text": t, "label": label}) for t, label in ROWS))
    elif name == "a.json":
        put(path, json.dumps([{"text": t, "label": label} for t, label in ROWS]))
    elif name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    else:  # as datasets.Dataset.save_to_disk writes it
        path.mkdir()
        column = labels if name == "dataset" else [1, 0, 0]
        table = pyarrow.table({"text": texts, "label": column})
        with pyarrow.ipc.new_stream(str(path / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
        put(path / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        if name == "named":
            features = {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}
            put(path / "dataset_info.json", json.dumps({"features": features}))
    rows = load_rows(path)
    assert rows.texts == tuple(texts)
    assert rows.labels == tuple(labels)


def test_columns_can_be_named_and_are_found_by_their_usual_names(tmp_path):
    path = put(tmp_path / "a.csv", "id,Utterance,Intent\n1,hello,greet\n")
    assert load_rows(path).labels == ("greet",)
    path = put(tmp_path / "b.csv", "words,kind\nhello,greet\n")
    assert load_rows(path, text="words", label="kind").texts == ("hello",)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", "words,label\nhi,x\n", ["a.csv", "words, label", "--text"]),
        ("a.csv", "", ["a.csv", "empty"]),
        ("a.csv", "text,label\n", ["a.csv", "header and no rows"]),
        ("a.csv", "text,label\nhi,x\n,y\n", ["a.csv", "row 3", "text"]),
        ("a.csv", "text,label\nhi,\n", ["a.csv", "row 2", "label"]),
        ("a.csv", "text,label\nso, so,x\n", ["a.csv", "row 2", "3 fields", "quotes"]),
        ("a.csv", "text,label,text\nhi,x,y\n", ["a.csv", "'text' twice"]),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{broken\n[1]\n', ["2 faults", "row 2", "row 3"]),
        ("a.json", '{"text": "a"}', ["a.json", "list of objects"]),
        ("a.parquet", "not parquet", ["a.parquet", "Parquet"]),
        ("a.xlsx", "x", [".xlsx", ".csv"]),
    ],
)
def test_a_faulty_file_is_named_with_its_row_and_the_way_out(tmp_path, name, content, parts):
    path = put(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    for part in parts:
        assert part in str(caught.value)


ONE_COLUMN = [  # task, columns of a table, those that are named, what is said
    ("classify", "text,label", {"label": "text"}, "text and label are both 'text'"),
    ("classify", "text,text2", {"label": "text2"}, "text2 and label are both 'text2'"),
    ("regress", "text,score", {"number": "text"}, "text and number are both 'text'"),
    ("labels", "text,labels", {"label": "text"}, "text and label are both 'text'"),
    ("labels", "text,toxic", {"labels": "toxic,text"}, "text and labels are both 'text'"),
    ("tag", "words,tags", {"tags": "words"}, "words and tags are both 'words'"),
    ("embed", "query,positive", {"positive": "query"}, "query and positive are both 'query'"),
    ("embed", "query,positive", {"negative": "positive"}, "positive and negative are both 'positive'"),
    ("embed", "text,label", {"label": "text"}, "text and label are both 'text'"),
    ("answer", "question,context,answer", {"answer": "context"}, "context and answer are both 'context'"),
    ("recommend", "user,item", {"item": "user"}, "user and item are both 'user'"),
    ("generate", "question,answer", {"answer": "question"}, "prompt and answer are both 'question'"),
    ("generate", "question,answer", {"prompt": "answer"}, "prompt and answer are both 'answer'"),
    ("prefer", "prompt,chosen,rejected", {"chosen": "prompt"}, "prompt and chosen are both 'prompt'"),
    ("prefer", "prompt,chosen,rejected", {"rejected": "chosen"}, "chosen and rejected are both 'chosen'"),
    ("translate", "text,summary", {"target": "text"}, "source and target are both 'text'"),
    ("translate", "text,summary", {"source": "summary"}, "source and target are both 'summary'"),
    ("image", "image,label", {"label": "image"}, "image and label are both 'image'"),
    ("image_text", "image,text,label", {"label": "text"}, "text and label are both 'text'"),
    ("image_text", "image,text,label", {"text": "image"}, "image and text are both 'image'"),
]


@pytest.mark.parametrize(("task", "header", "named", "told"), ONE_COLUMN)
def test_what_is_learned_is_never_what_it_is_learned_from(tmp_path, task, header, named, told):
    path = put(tmp_path / "a.csv", f"{header}\n{header}\n")
    with pytest.raises(DataError, match=rf"a.csv': {told}; give each a column of its own, with --"):
        TASKS[task].read(path, **named)


UNREAD = [  # task, a row without what is to be predicted
    ("classify", {"text": "a", "label": None}),
    ("labels", {"text": "a", "labels": None}),
    ("regress", {"text": "a", "score": None}),
    ("tag", {"words": "a", "tags": None}),
    ("embed", {"text": "a", "label": ""}),
    ("embed", {"query": "a", "positive": None}),
    ("answer", {"question": "a?", "context": "a", "answers": 5}),
    ("recommend", {"user": "a", "item": None}),
    ("generate", {"prompt": "a", "completion": None}),
    ("prefer", {"prompt": "a", "chosen": "", "rejected": ""}),
    ("prefer", {"prompt": "a", "chosen": [{"role": "assistant", "content": ""}], "rejected": None}),
    ("translate", {"source": "a", "target": None}),
    ("image", {"image": "a.png", "label": None}),
    ("image_text", {"image": "a.png", "text": "a", "label": None}),
]


@pytest.mark.parametrize(("task", "row"), UNREAD)
def test_what_is_to_be_predicted_is_not_read(tmp_path, task, row):
    put(tmp_path / "a.png", "not decoded here")
    path = put(tmp_path / "a.jsonl", json.dumps(row))
    assert len(TASKS[task].read(path, answers=False)) == 1
    with pytest.raises(DataError, match="row 1"):
        TASKS[task].read(path)


@pytest.mark.parametrize(
    ("name", "mark", "told"),
    [
        ("a.csv", ";", "semicolons; write the table with commas$"),
        ("a.csv", "\t", "tabs; write the table with commas, or call it .tsv$"),
        ("a.csv", "|", "bars; write the table with commas$"),
        ("a.tsv", ";", "semicolons; write the table with tabs$"),
        ("a.tsv", ",", "commas; write the table with tabs, or call it .csv$"),
    ],
)
def test_a_table_that_is_cut_by_another_mark_says_so(tmp_path, name, mark, told):
    path = put(tmp_path / name, f"text{mark}label\ngood film{mark}pos\n")
    with pytest.raises(DataError, match=f"has one column, 'text.*label', which seems to be cut by {told}"):
        load_rows(path)


def test_a_cell_may_hold_a_long_text(tmp_path):
    long = "word " * 30_000
    path = put(tmp_path / "a.csv", f'text,label\n"{long}",x\n')
    assert load_rows(path).texts == (long.strip(),)


def test_binary_junk_is_not_taken_for_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_rows(path)
    path.write_bytes(b"text,label\nhi\x00there,x\n")
    with pytest.raises(DataError, match="NUL|row 2"):
        load_rows(path)


def test_an_unknown_column_names_the_nearest(tmp_path):
    path = put(tmp_path / "a.csv", csv_text())
    with pytest.raises(DataError, match="did you mean 'label'"):
        load_rows(path, label="lable")


def test_a_single_class_is_refused():
    one = rows_of([("a", "x"), ("b", "x"), ("c", "x")])
    with pytest.raises(DataError, match="one class only"):
        Splits(one, one, one).checked()


def test_labels_in_a_list_are_not_one_class(tmp_path):
    path = put(tmp_path / "a.csv", "text,labels,label\nx,\"['a', 'b']\",[a]\n")
    with pytest.raises(DataError, match=r"row 2: column 'labels' is \['a', 'b'\], a list, .* with --task labels"):
        load_rows(path, label="labels")
    assert load_rows(path).labels == ("[a]",)  # a name, where the column does not say otherwise


def test_a_label_unseen_in_training_is_named_with_its_row():
    train, valid = rows_of([("a", "x"), ("b", "y")]), rows_of([("c", "x"), ("d", "z")], "v.csv")
    with pytest.raises(DataError, match=r"'v.csv' row 3: label 'z'"):
        Splits(train, valid, train).checked()


def test_numeric_labels_are_ordered_by_value():
    train = rows_of([("a", "10"), ("b", "9"), ("c", "-1")])
    assert Splits(train, train, train).labels == ("-1", "9", "10")


def test_one_table_is_split_within_each_label_by_the_seed():
    rows = rows_of([(f"text {n}", "xy"[n % 2]) for n in range(40)])
    cut, again, other = split(rows, 1), split(rows, 1), split(rows, 2)
    assert cut == again
    assert cut != other
    assert sorted(cut.train.texts + cut.valid.texts + cut.test.texts) == sorted(rows.texts)
    assert set(cut.valid.labels) == set(cut.test.labels) == {"x", "y"}


def test_rows_with_the_same_text_stay_in_one_part():
    texts = [f"text {k % 20}" for k in range(120)]
    rows = Rows(tuple(texts), tuple("ab"[k % 2] for k in range(120)), "here", tuple(range(120)))
    parts = split(rows, seed=3)
    sets = [set(part.texts) for part in (parts.train, parts.valid, parts.test)]
    assert sum(map(len, sets)) == 20
    assert [len(part) for part in (parts.train, parts.valid, parts.test)] == [96, 12, 12]


def test_a_label_with_too_few_rows_to_split_is_refused():
    with pytest.raises(DataError, match="label 'y' has 1 row; at least 3"):
        split(rows_of([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")]))


def test_a_directory_of_parts_and_given_parts_are_used(tmp_path):
    for part in ("train", "validation", "test"):
        put(tmp_path / f"{part}.csv", csv_text([(f"{part} {t}", label) for t, label in ROWS]))
    splits = load_splits(tmp_path)
    assert splits.valid.texts[0].startswith("validation")
    many = put(tmp_path / "many.csv", csv_text([(f"text {n}", "xy"[n % 2]) for n in range(20)]))
    own_test = put(tmp_path / "own.csv", csv_text([("t", "x")]))
    splits = load_splits(many, test=own_test)
    assert splits.test.texts == ("t",)
    assert len(splits.train) + len(splits.valid) == 20
    assert len(splits.valid) == 2


def test_a_directory_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="no Hugging Face dataset"):
        load_splits(tmp_path)


def test_a_directory_of_dataset_directories_names_one(tmp_path):
    for name in ("test", "train"):
        (tmp_path / name).mkdir()
        put(tmp_path / name / "state.json", "{}")
    with pytest.raises(DataError, match="holds test, train, and is no Hugging Face .*; name one of them, as '.*test'"):
        load_rows(tmp_path)


@pytest.mark.parametrize(("names", "one"), [(("train.csv", "test.csv"), "test.csv"), (("a.jsonl", "b.csv"), "a.jsonl")])
def test_a_directory_with_tables_is_no_table_itself(tmp_path, names, one):
    for name in names:
        put(tmp_path / name, csv_text())
    told = f"holds {', '.join(sorted(names))}, and is no Hugging Face .*; name one of them, as '.*{one}'"
    with pytest.raises(DataError, match=told):
        load_rows(tmp_path)


def tokens(lengths):
    ids = tuple(tuple(range(1, n + 1)) for n in lengths)
    return Tokens(ids, tuple((k,) for k in range(len(ids))), ((),) * len(ids), tuple(range(len(ids))), 0)


@pytest.mark.parametrize("by_length", [True, False])
def test_an_epoch_visits_every_row_once_in_an_order_of_seed_and_epoch(by_length):
    data = tokens([n % 7 + 1 for n in range(50)])
    batches = training_batches(data, 8, 3, 0, by_length)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert list(batches) == list(training_batches(data, 8, 3, 0, by_length))
    assert list(batches) != list(training_batches(data, 8, 3, 1, by_length))


def test_a_batch_is_laid_end_to_end_and_can_be_padded():
    batch = tokens([2, 4]).gather([1, 0])
    assert batch.ids.tolist() == [1, 2, 3, 4, 1, 2]
    assert batch.segments.starts.tolist() == [0, 4, 6]
    assert batch.segments.positions().tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.n_tokens == 6
    rows, mask = batch.segments.padded(batch.ids, 9)
    assert rows.tolist() == [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_step_is_cut_into_passes_of_bounded_size():
    data = tokens([5, 1, 3, 9, 2])
    assert passes(data, range(5), 6) == [[1, 4, 2], [0], [3]]
    assert passes(data, [3, 0], 100) == [[0, 3]]
