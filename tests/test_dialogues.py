"""Dialogues from files: every form of instruction data, and every fault named with its row."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from lorakit.data import Dialogues, Turn, load_dialogues, load_rows, load_splits
from lorakit.data.dialogues import PAIRS, make_dialogues
from lorakit.errors import DataError

ONE = (Turn("user", "2 + 2?"), Turn("assistant", "4"))


def put(path, rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_are_found_by_their_usual_names(tmp_path, first, second):
    found = load_dialogues(put(tmp_path / "a.jsonl", [{"id": 1, first: "2 + 2?", second: "4"}]))
    assert found.turns == (ONE,)
    assert found.answers == ("4",)
    assert found.inputs == ("2 + 2?",)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.csv.gz", "a.jsonl.gz", "a.json.gz"]
)
def test_every_format_gives_the_same_dialogues(tmp_path, name):
    path = tmp_path / name
    row = {"prompt": "2 + 2?", "completion": "4"}
    text = {
        "csv": "prompt,completion\n2 + 2?,4\n",
        "tsv": "prompt\tcompletion\n2 + 2?\t4\n",
        "jsonl": json.dumps(row),
        "json": json.dumps([row]),
    }
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({key: [value] for key, value in row.items()}), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(text[name.split(".")[1]].encode()))
    else:
        path.write_text(text[name.split(".")[1]], encoding="utf-8")
    assert load_dialogues(path).turns == (ONE,)


def test_named_columns_win_and_are_taken_as_they_are(tmp_path):
    row = {"instruction": "add", "input": "2 2", "output": "4", "ask": "2 + 2?", "say": "4"}
    path = put(tmp_path / "a.jsonl", [row])
    assert load_dialogues(path, prompt="ask", answer="say").turns == (ONE,)
    assert load_dialogues(path, prompt="instruction", answer="say").inputs == ("add",)
    with pytest.raises(DataError, match="no column 'sya'; did you mean 'say'"):
        load_dialogues(path, prompt="ask", answer="sya")
    with pytest.raises(DataError, match="both 'ask'"):
        load_dialogues(path, prompt="ask", answer="ask")
    path = put(tmp_path / "b.jsonl", [{"ask": "2 + 2?", "system": "4"}])
    assert load_dialogues(path, prompt="ask", answer="system").turns == (ONE,)


def test_alpaca_puts_its_input_behind_an_empty_line(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    ]
    found = load_dialogues(put(tmp_path / "a.jsonl", rows))
    assert found.inputs == ("Add.\n\n2 2", "Sing.")
    assert found.answers == ("4", "la")


def test_a_system_column_becomes_a_system_turn(tmp_path):
    rows = [
        {"system": "Be brief.", "prompt": "2 + 2?", "response": "4"},
        {"system": "", "prompt": "a", "response": "b"},
    ]
    found = load_dialogues(put(tmp_path / "a.jsonl", rows))
    assert found.turns == ((Turn("system", "Be brief."), *ONE), (Turn("user", "a"), Turn("assistant", "b")))


@pytest.mark.parametrize(
    ("column", "role", "content"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_messages_and_sharegpt_keep_every_turn(tmp_path, column, role, content, ending):
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    said = [("system", "Be brief."), (names[0], "2 + 2?"), (names[1], "4"), (names[0], "Sure?"), (names[1], "Yes.")]
    messages = [{role: who, content: what} for who, what in said]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.table({column: [messages]}), path)
    elif ending == "csv":  # as JSON in one field
        path.write_text(f'{column}\n"{json.dumps(messages).replace(chr(34), chr(34) * 2)}"\n', encoding="utf-8")
    else:
        put(path, [{column: messages}])
    (turns,) = load_dialogues(path).turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.content for turn in turns] == [what for _, what in said]


def test_texts_are_kept_to_the_last_space_and_line_separator(tmp_path):
    answer = "  def f():\n\treturn 1\u2028\n"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": " a ", "completion": answer}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_dialogues(path).turns == ((Turn("user", " a "), Turn("assistant", answer)),)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], ["row 2", "'completion' is empty"]),
        ([{"prompt": None, "completion": "b"}], ["row 1", "'prompt' is empty"]),
        ([{"prompt": "a", "completion": 4}], ["row 1", "'completion' is 4", "must be text"]),
        ([{"prompt": "a\x00", "completion": "b"}], ["row 1", "NUL"]),
        ([{"prompt": "a", "reply": "b"}], ["prompt, reply", "--prompt", "--answer", "messages"]),
        ([{"messages": []}], ["row 1", "list of messages"]),
        ([{"messages": "{broken"}], ["row 1", "no list in JSON"]),
        ([{"messages": [{"role": "tool", "content": "x"}]}], ["row 1", "message 1", "'tool'", "assistant"]),
        ([{"messages": [{"content": "x"}]}], ["row 1", "unknown role None"]),
        ([{"messages": [{"role": "user", "content": "x"}]}], ["row 1", "last message is not from the assistant"]),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], ["row 1", "begin with the user", "assistant"]),
        ([{"messages": [{"role": "system", "content": "x"}]}], ["row 1", "begin with the user"]),
        (
            [{"messages": [{"role": r, "content": "x"} for r in ("user", "system", "assistant")]}],
            ["row 1", "message 2 is a system message"],
        ),
        ([{"messages": [{"role": "user", "content": ""}]}], ["row 1", "message 1 (user) is empty"]),
        ([{"messages": [{"role": "user", "content": ["x"]}]}], ["row 1", "message 1 (user)", "must be text"]),
    ],
)
def test_a_faulty_row_is_named_with_what_is_wrong(tmp_path, rows, parts):
    with pytest.raises(DataError) as caught:
        load_dialogues(put(tmp_path / "a.jsonl", rows))
    for part in ("a.jsonl", *parts):
        assert part in str(caught.value)


def test_all_faulty_rows_are_counted(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 9)
    with pytest.raises(DataError, match=r"9 faults(.|\n)*row 1(.|\n)*and 4 more"):
        load_dialogues(path)


def test_files_that_are_no_text_or_damaged_are_named(tmp_path):
    junk = tmp_path / "a.jsonl"
    junk.write_bytes(b'{"prompt": "\xff\xfe"}')
    with pytest.raises(DataError, match=r"a\.jsonl' is not UTF-8"):
        load_dialogues(junk)
    packed = gzip.compress(json.dumps({"prompt": "a", "completion": "b" * 2000}).encode())
    for name, content in (
        ("cut.jsonl.gz", packed[: len(packed) // 2]),
        ("no.jsonl.gz", b"plain"),
        ("x.csv.gz", packed[:-9]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be unpacked"):
            load_dialogues(tmp_path / name)
    (tmp_path / "quotes.csv").write_text('prompt,completion\n"a" b,c\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"quotes\.csv' is not a table of comma-separated values"):
        load_dialogues(tmp_path / "quotes.csv")
    (tmp_path / "data.bin.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"\.bin\.gz' are not read; use \.csv"):
        load_dialogues(tmp_path / "data.bin.gz")


def test_prompts_alone_can_be_read(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    found = load_dialogues(path, answers=False)
    assert found.answers == (None, None)
    assert load_dialogues(put(tmp_path / "b.jsonl", [{"instruction": "a", "input": "b"}]), answers=False).inputs == (
        "a\n\nb",
    )
    whole = put(
        tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    assert load_dialogues(whole, answers=False).turns == ((Turn("user", "a"),),)


def test_values_of_python_become_dialogues():
    found = make_dialogues(["a", [{"role": "user", "content": "b"}]])
    assert found.turns == ((Turn("user", "a"),), (Turn("user", "b"),))
    with pytest.raises(DataError, match="row 2.*is empty"):
        make_dialogues(["a", " "])


def test_the_digest_tells_dialogues_apart():
    def of(*turns):
        return Dialogues((tuple(Turn(*turn) for turn in turns),), "x", (1,)).digest()

    one = of(("user", "a"), ("assistant", "b"))
    assert one == of(("user", "a"), ("assistant", "b"))
    assert len({one, of(("user", "ab"), ("assistant", "b")), of(("user", "a"), ("user", "b"))}) == 3


def test_a_table_is_split_so_that_no_prompt_is_in_two_parts(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"mr": f"m{n % 20}", "ref": f"r{n}"} for n in range(100)])
    splits, again = (load_splits(path, read=load_dialogues, seed=1) for _ in range(2))
    assert splits == again
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (80, 10, 10)
    parts = [set(part.inputs) for part in (splits.train, splits.valid, splits.test)]
    assert len(set.union(*parts)) == 20
    assert sum(map(len, parts)) == 20
    assert splits.labels == ()


def test_one_prompt_for_all_rows_is_split_all_the_same(tmp_path):
    path = put(tmp_path / "a.jsonl", [{"prompt": "a joke", "completion": f"r{n}"} for n in range(10)])
    assert len(load_splits(path, read=load_dialogues).test) == 1


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_rows_are_one_clear_error(tmp_path, n):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "a,b\n" * n, encoding="utf-8")
    wanted = rf"has {n} rows?; at least 3 .* files of their own" if n else "has a header and no rows"
    with pytest.raises(DataError, match=wanted):
        load_splits(path, read=load_dialogues)


def test_a_directory_of_gzip_ed_parts_is_read(tmp_path):
    for part in ("train", "valid", "test"):
        content = json.dumps({"question": part, "answer": "x"}).encode()
        (tmp_path / f"{part}.jsonl.gz").write_bytes(gzip.compress(content))
    splits = load_splits(tmp_path, read=load_dialogues)
    assert [part.inputs for part in (splits.train, splits.valid, splits.test)] == [("train",), ("valid",), ("test",)]


def test_labelled_rows_may_be_gzip_ed_too(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\nhi\tx\n"))
    assert load_rows(tmp_path / "a.tsv.gz").labels == ("x",)
