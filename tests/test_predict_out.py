"""`lorakit predict --out`: a JSON line for each row, from rows in memory and from rows that stay in their file."""

import json
from dataclasses import asdict

import pytest

import lorakit as lk
import tiny_text
from lorakit.cli import main
from lorakit.data import streamed
from lorakit.tasks.task import TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    tiny_text.tiny_bert(folder / "base")
    rows = tiny_text.table(folder / "rows.csv", 150)
    lk.fit(str(folder / "base"), rows, out=folder / "run", max_steps=3, batch_size=8)
    return folder


@pytest.fixture
def chunks(monkeypatch):
    """Every table is too large for memory, and comes in chunks of 37 rows; how many of them were read."""
    monkeypatch.setattr(streamed, "_TAKEN", 1 << 50)
    monkeypatch.setattr(streamed, "_ROWS", 37)
    found, parts = [], streamed.Streamed.chunks

    def counted(self):
        for part in parts(self):
            found.append(len(part))
            yield part

    monkeypatch.setattr(streamed.Streamed, "chunks", counted)
    return found


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_answers_are_those_in_memory(place, tmp_path, chunks, capsys):
    out = tmp_path / "deep" / "answers.jsonl"
    assert main(["predict", str(place / "run"), str(place / "rows.csv"), "--out", str(out)]) == 0
    assert f"150 answers written to '{out}'" in capsys.readouterr().out
    assert sum(chunks) == 150 and len(chunks) > 3, "chunk by chunk"
    rows = TASKS["classify"].read(place / "rows.csv", answers=False)
    wanted = [asdict(one) for one in lk.predict(place / "run", rows)]
    for found, one in zip(lines(out), wanted, strict=True):
        assert (found["text"], found["label"]) == (one["text"], one["label"])
        assert found["probabilities"] == pytest.approx(one["probabilities"], abs=2e-3)


def test_in_python_rows_on_disk_are_answered_too(place, chunks):
    read = TASKS["classify"].read
    rows = streamed.read_or_streamed(place / "rows.csv", read, None)
    assert isinstance(rows, streamed.Streamed)
    assert [one.text for one in lk.predict(place / "run", rows)] == list(read(place / "rows.csv").texts)


def test_texts_that_are_said_go_there_too(place, tmp_path):
    out = tmp_path / "a.jsonl"
    assert main(["predict", str(place / "run"), "--say", "first", "--say", "second", "--out", str(out)]) == 0
    assert [one["text"] for one in lines(out)] == ["first", "second"]


def test_a_file_that_is_there_is_left_as_it_is(place, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    out.write_text("dear")
    assert main(["predict", str(place / "run"), "--say", "x", "--out", str(out)]) == 2
    assert f"'{out}' is there already; name another file" in capsys.readouterr().err
    assert out.read_text() == "dear"


def test_a_row_that_cannot_be_answered_is_named_and_the_answers_before_it_are_kept(place, tmp_path, chunks, capsys):
    rows = (place / "rows.csv").read_text().splitlines()
    rows[120] = "word " * 5000 + "," + rows[120].split(",")[1]
    long = tmp_path / "long.csv"
    long.write_text("\n".join(rows) + "\n")
    out = tmp_path / "a.jsonl"
    assert main(["predict", str(place / "run"), str(long), "--out", str(out)]) == 1
    err, part = capsys.readouterr().err, tmp_path / "a.jsonl.part"
    assert "row 121" in err and f"note: the 111 answers before that are in '{part}'" in err
    assert set(tmp_path.iterdir()) == {long, part}, "nothing that looks whole"
    assert [one["text"] for one in lines(part)] == list(TASKS["classify"].read(place / "rows.csv").texts[:111])
    assert main(["predict", str(place / "run"), str(long), "--out", str(out), "--truncate"]) == 2
    assert f"'{part}' has the answers of a call that did not end; name another file" in capsys.readouterr().err
    part.unlink()
    assert main(["predict", str(place / "run"), str(long), "--out", str(out), "--truncate"]) == 0
    assert set(tmp_path.iterdir()) == {long, out} and len(lines(out)) == 150


def test_before_the_first_answer_there_is_no_file(place, tmp_path, capsys):
    assert main(["predict", str(place / "run"), "--say", "word " * 5000, "--out", str(tmp_path / "a.jsonl")]) == 1
    assert "note:" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
