"""Documents: from text files, folders and tables; few of them are cut so that some text can be held out."""

import gzip

import pytest

from lorakit.data import load_documents, load_splits
from lorakit.data.documents import make_documents
from lorakit.errors import DataError

STORIES = ["Once there was a cat.\nIt slept.\n", "  A dog\n\nbarked.\n", "The end came."]


@pytest.mark.parametrize("packed", [False, True], ids=["txt", "gz"])
def test_a_text_file_is_one_document_or_what_stands_between_marks(tmp_path, packed):
    def write(name, text):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return path

    marked = "<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n"
    assert load_documents(write("a.txt", marked)).texts == (*STORIES[:2], STORIES[2] + "\n")
    assert load_documents(write("b.txt", STORIES[0])).texts == (STORIES[0],)
    inside = "what <|endoftext|> means\n"
    assert load_documents(write("c.txt", inside)).texts == (inside,)
    assert load_documents(write("d.py", marked)).texts == (marked,)
    assert load_documents(write("wiki.train.tokens", STORIES[0])).texts == (STORIES[0],)


def test_a_folder_gives_its_text_files_and_tells_what_it_left_out(tmp_path):
    for name, content in {
        "b/main.py": b"print(1)\n",
        "a.md": b"# Title\n",
        "test/test_main.py": b"assert 1\n",
        "train.py": b"train()\n",
        "b/__init__.py": b"",
        "image.png": b"\x89PNG",
        "bad.c": b"int x\x00;",
        "worse.c": b"\xff\xfe\xff",
        ".git/config.toml": b"x = 1",
        "node_modules/x.js": b"x()",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = load_documents(tmp_path)
    assert found.texts == ("# Title\n", "print(1)\n", "assert 1\n", "train()\n")
    told = found.about()
    assert "4 documents" in told
    assert "2 files are no text (bad.c, worse.c)" in told
    assert "1 files are empty (b/__init__.py)" in told
    assert "1 files have other endings (image.png)" in told
    splits = load_splits(tmp_path, read=load_documents)  # train.py and test/ are no parts of a data set
    assert len(splits.train) + len(splits.valid) + len(splits.test) >= 4
    assert splits.train.left_out == found.left_out


def test_folders_with_parts_keep_them(tmp_path):
    for name, n in (("train", 3), ("valid", 1), ("test", 1)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>\n".join(STORIES[:n]))
    splits = load_splits(tmp_path, read=load_documents)
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [3, 1, 1]
    assert not splits.train.unended


@pytest.mark.parametrize("names", [("train.ipynb", "train.log", "test.md"), ("test.json", "dev.ini")])
def test_files_of_a_repository_are_no_parts_whatever_they_are_called(tmp_path, names):
    for name in ("a.py", "src/b.py", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 200)
    splits = load_splits(tmp_path, read=load_documents)
    assert splits.train.source == splits.test.source == str(tmp_path)
    assert "# a.py" in splits.train.texts[0]


@pytest.mark.parametrize("column", ["text", "content", "code", "body"])
def test_a_table_has_its_documents_in_a_column_as_they_are(tmp_path, column):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"id": 1, "{column}": "  def f():\\n"}}\n{{"id": 2, "{column}": "x"}}\n')
    named = {"text": column} if column == "body" else {}
    assert load_documents(path, **named).texts == ("  def f():\n", "x")


def test_a_single_text_is_cut_at_line_ends_and_its_end_is_held_out(tmp_path):
    lines = [f"line {number} of a long text that goes on\n" for number in range(5000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    rows = load_documents(tmp_path / "book.txt")
    splits = load_splits(tmp_path / "book.txt", read=load_documents)
    parts = (splits.train, splits.valid, splits.test)
    assert "".join(text for part in parts for text in part.texts) == "".join(lines) == rows.texts[0]
    assert all(text.endswith("\n") for part in parts for text in part.texts)
    assert 70 <= sum(map(len, parts)) <= 100
    assert [round(len(part) / sum(map(len, parts)), 1) for part in parts] == [0.8, 0.1, 0.1]
    assert splits.train.unended and "stretches of few documents" in splits.train.about()
    *goes_on, last = [line in splits.test.unended for line in splits.test.lines]
    assert all(goes_on) and not last


def test_a_text_without_line_ends_is_cut_at_blanks_and_without_blanks_anywhere():
    blank = make_documents(["word " * 4000]).divided()
    assert len(blank) == 10
    assert all(text.endswith("word ") for text in blank.texts)
    solid = make_documents(["x" * 20_001]).divided()
    assert "".join(solid.texts) == "x" * 20_001 and len(solid) == 10
    assert make_documents(["a b"] * 10).divided().texts == ("a b",) * 10


def test_faults_are_told(tmp_path):
    (tmp_path / "a.bin.txt").write_bytes(b"ab\x00c")
    with pytest.raises(DataError, match="NUL character"):
        load_documents(tmp_path / "a.bin.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt' is not UTF-8 text"):
        load_documents(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"blank.txt' holds no text"):
        load_documents(tmp_path / "blank.txt")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.png").write_bytes(b"1")
    with pytest.raises(DataError, match=r"holds no text: left out: 1 files have other endings"):
        load_documents(tmp_path / "none")
    (tmp_path / "none" / "test.csv").touch()
    with pytest.raises(DataError, match="; name one of them, as '.*test.csv'"):
        load_documents(tmp_path / "none")
    with pytest.raises(DataError, match="does not exist"):
        load_documents(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is no table, so it has no column 'body'"):
        load_documents(tmp_path / "blank.txt", text="body")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": 3}\n')
    with pytest.raises(
        DataError, match=r"row 2: column 'text' is empty\s+- row 3: column 'text' is 3; it must be text"
    ):
        load_documents(tmp_path / "t.jsonl")
    (tmp_path / "u.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="name one with --text COLUMN"):
        load_documents(tmp_path / "u.csv")
    with pytest.raises(DataError, match="row 2: it is 3; it must be text"):
        make_documents(["a", 3])
    (tmp_path / "v.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud83d"}\n')
    with pytest.raises(DataError, match=r"row 2: column 'text' has '\\ud83d' at character 2, half of a character"):
        load_documents(tmp_path / "v.jsonl")
    with pytest.raises(DataError, match=r"row 1: it has '\\ud83d' at character 0"):
        make_documents(["\ud83d"])
