"""Tagged words from every form of file, and what is told about files that cannot be used."""

import gzip
import json

import pytest

from lorakit.data import load_splits
from lorakit.data.memory import in_memory
from lorakit.data.tagged import load_tagged, make_tagged
from lorakit.errors import DataError

WORDS = (("play", "jazz"), ("rain", "in", "Bonn"))
TAGS = (("O", "B-style"), ("O", "O", "B-city"))
SPACES = "-DOCSTART- -X- O\n\nplay VB O\njazz NN B-style\n\n# id 5 domain=en\nrain NN O\nin IN O\nBonn NNP B-city\n"
TABS = "play\tO\njazz\tB-style\n\nrain\tO\nin\tO\nBonn\tB-city\n\n"
ROWS = [{"words": list(words), "tags": list(tags)} for words, tags in zip(WORDS, TAGS)]


def written(folder, name, text):
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.conll", SPACES),
        ("a.txt", SPACES.replace("\n", "\r\n")),
        ("a.conll.gz", TABS),
        ("a.bio", TABS),
        ("a.tsv", TABS),
        ("b.tsv", "words\ttags\nplay jazz\tO B-style\nrain in Bonn\tO O B-city\n"),
        ("a.csv", "tokens,ner_tags\nplay jazz,O B-style\nrain in Bonn,O O B-city\n"),
        ("b.csv", 'words,tags\n"[""play"", ""jazz""]","[""O"", ""B-style""]"\nrain in Bonn,O O B-city\n'),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
    ],
)
def test_every_form_gives_the_same_words_and_tags(tmp_path, name, text):
    found = load_tagged(written(tmp_path, name, text))
    assert (found.words, found.tags) == (WORDS, TAGS)
    assert load_tagged(tmp_path / name, answers=False).tags is None


def test_slots_stand_in_a_directory_and_its_parts_are_found(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, "seq.in", "play jazz \nrain in Bonn\n")
        written(tmp_path / name, "seq.out", "O B-style\nO O B-city \n")
    data = load_splits(tmp_path, read=load_tagged)
    assert (data.test.words, data.test.tags) == (WORDS, TAGS)
    assert load_tagged(tmp_path / "test").lines == (1, 2)
    with pytest.raises(DataError, match="holds test, train, valid, and is .*; name one of them, as '.*test'"):
        load_tagged(tmp_path)


def test_conll_parts_of_a_directory_are_found_by_their_names(tmp_path):
    for name in ("train.conll", "dev.conll", "test.conll"):
        written(tmp_path, name, SPACES)
    assert len(load_splits(tmp_path, read=load_tagged).valid) == 2
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match="holds dev.conll, test.conll, train.conll, and is .*, as '.*test.conll'"):
        load_tagged(tmp_path)


def test_columns_are_named_in_tables_and_numbered_in_conll(tmp_path):
    found = load_tagged(written(tmp_path, "a.conll", SPACES), tags="2")
    assert found.tags == (("VB", "NN"), ("NN", "IN", "NNP"))
    assert found.lines == (3, 7)
    table = written(tmp_path, "a.csv", "w,pos,ner\na b,X Y,O O\n")
    assert load_tagged(table, words="w", tags="pos").tags == (("X", "Y"),)


def test_a_hashtag_is_a_word_and_a_comment_is_none(tmp_path):
    found = load_tagged(written(tmp_path, "a.conll", "# sent = 1\n#go\tO\n#\tO\nBonn\tB-city\n"))
    assert found.words == (("#go", "#", "Bonn"),)


def test_rows_in_memory_and_numbers_with_names(tmp_path):
    assert load_tagged(in_memory(ROWS)).tags == TAGS
    import pyarrow as arrow

    folder = tmp_path / "set"
    folder.mkdir()
    table = arrow.table({"tokens": [["play", "jazz"]], "ner_tags": [[0, 1]]})
    with arrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    names = {"_type": "ClassLabel", "names": ["O", "B-style"]}
    features = {"ner_tags": {"_type": "List", "feature": names}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert load_tagged(folder).tags == (("O", "B-style"),)


BAD = [
    ("a.conll", "play\tO\njazz\n", ["row 2", "1 column", "have 2 columns"]),
    ("a.conll", "play\njazz\n", ["row 1", "a word and no tag"]),
    ("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}', ["row 1: 2 words and 1 tags"]),
    ("a.jsonl", '{"words": ["a", ""], "tags": ["O", "O"]}', ["row 1", "empty word"]),
    ("a.jsonl", '{"words": 5, "tags": ["O"]}', ["row 1", "column 'words' is 5"]),
    ("a.jsonl", '{"words": [], "tags": []}', ["row 1", "'words' is empty"]),
    ("a.csv", 'words,tags\n"[""a""",O\n', ["row 2", "no list in JSON"]),
    ("a.csv", "x,tags\na,O\n", ["usual name for the words", "x, tags", "--words COLUMN"]),
    ("a.conll", "\n\n", ["a word and no tag"]),
    ("a.conll", "", ["is empty"]),
]


@pytest.mark.parametrize(("name", "text", "parts"), BAD, ids=[text[:20] for _, text, _ in BAD])
def test_what_cannot_be_used_is_named(tmp_path, name, text, parts):
    with pytest.raises(DataError) as caught:
        load_tagged(written(tmp_path, name, text))
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def test_more_that_cannot_be_used(tmp_path):
    written(tmp_path, "seq.in", "a b\nc\n")
    written(tmp_path, "seq.out", "O O\n")
    with pytest.raises(DataError, match=r"seq.in has 2 lines and seq.out 1"):
        load_tagged(tmp_path)
    with pytest.raises(DataError, match="no column '9'; its columns are called 1 to 3"):
        load_tagged(written(tmp_path, "a.conll", SPACES), tags="9")
    with pytest.raises(DataError, match="row 2: it is empty"):
        make_tagged(["a", " "])
    with pytest.raises(DataError, match="does not exist"):
        load_tagged(tmp_path / "none.conll")


def test_tags_that_training_has_not_seen_are_refused_but_a_prefix_more_is_not(tmp_path):
    train = load_tagged(in_memory([{"words": "a b", "tags": "O B-x"}]))
    other = load_tagged(in_memory([{"words": "a b", "tags": "B-x I-x"}]))
    wrong = load_tagged(in_memory([{"words": "a b", "tags": "O B-y"}]))
    plain = load_tagged(in_memory([{"words": "a b", "tags": "O z"}]))
    assert "row 1: tag 'O' does not occur in the training rows; add examples" in other.faults(train, train)[0]
    assert train.take([0]).faults(train, train) == []
    both = load_tagged(in_memory([{"words": "a b c", "tags": "O B-x I-x"}]))
    assert both.faults(other, other) == []
    assert "tag 'B-y' does not occur" in both.faults(wrong, train)[0]
    assert "'z' has no prefix" in both.faults(plain, train)[0]
    assert both.faults(plain, plain)[0].startswith(
        "'the rows in memory' row 1: tag 'B-x' has a prefix, and 'z' has none"
    )
    assert "one tag only ('O')" in load_tagged(in_memory([{"words": "a", "tags": "O"}])).faults(train, train)[0]
