"""Rows that cannot be used, for every task: refused by file and row; left out and counted with skip_bad; never more."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers

import lorakit as lk
from lorakit.cli import main
from lorakit.data import Splits, load_rows, load_splits
from lorakit.data.faults import BadRow, counted, skipping, told
from lorakit.data.images import load_images
from lorakit.data.interactions import load_interactions
from lorakit.data.tagged import load_tagged
from lorakit.errors import DataError, UsageError
from lorakit.fit.loop import Record
from lorakit.tasks.base import load_base
from lorakit.tasks.image_text import both
from lorakit.tasks.task import TASKS
from tiny_chat import CHATML, tiny_causal
from tiny_image import arrays, cnn_base, tiny_vit
from tiny_seq2seq import tiny_seq2seq
from tiny_text import WORDS, table, tiny_bert

LONG = " ".join(["rain"] * 60)
SILENT = "~"  # the tokenizers of the bases below make nothing of it
TALK = [{"role": "user", "content": "sort rain"}, {"role": "assistant", "content": "weather"}]
_WORDS = [word for words in WORDS.values() for word in words]
_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


def _word(k):
    return _WORDS[k % len(_WORDS)]


GOOD = {  # a row of every task; rows of one number are alike in a half only
    "classify": lambda k: {"text": f"i like {_word(k)}", "label": ("a", "b")[k % 2]},
    "labels": lambda k: {"text": f"i like {_word(k)}", "labels": [["a"], ["b"], ["a", "b"]][k % 3]},
    "regress": lambda k: {"text": f"i like {_word(k)}", "score": k % 5},
    "embed": lambda k: {"query": f"i like {_word(k)}", "positive": f"the {_word(k + 1)}"},
    "tag": lambda k: {"words": ["like", _word(k)], "tags": ["O", ("B-x", "B-y")[k % 2]]},
    "answer": lambda k: {"question": "like much?", "context": f"i like {_word(k)}", "answer": _word(k)},
    "recommend": lambda k: {"user": f"u{k % 4}", "item": f"i{k}", "time": k},
    "generate": lambda k: {"prompt": f"sort {_word(k)}", "completion": ("food", "tools")[k % 2]},
    "prefer": lambda k: {"prompt": f"sort {_word(k)}", "chosen": "food", "rejected": ("tools", "weather")[k % 2]},
    "translate": lambda k: {"source": f"sort {_word(k)}", "target": ("food", "tools")[k % 2]},
    "image": lambda k: {"image": f"{k % 9}.png", "label": ("a", "b")[k % 2]},
    "image_text": lambda k: {"image": f"{k % 9}.png", "text": f"i like {_word(k)}", "label": ("a", "b")[k % 2]},
}

READ = [  # task, part, a row that reading or comparing the parts refuses, why
    ("classify", "train", '{"text": "a", ', "not valid JSON"),
    ("classify", "train", "[1, 2]", "not an object"),
    ("classify", "train", {"text": "", "label": "a"}, "column 'text' is empty"),
    ("classify", "train", {"text": "a\x00", "label": "a"}, "NUL character"),
    ("classify", "train", {"text": "a", "label": None}, "column 'label' is empty"),
    ("classify", "train", {"text": "a", "label": ["a"]}, "is ['a'], a list, and one label is wanted; texts with sever"),
    ("image", "train", {"image": "0.png", "label": ["a"]}, "is ['a'], a list, and one label is wanted; texts with sev"),
    ("recommend", "train", {"user": ["u1"], "item": "i1", "time": 3}, "column 'user' is ['u1']; it must be a text or"),
    ("classify", "valid", {"text": "a", "label": "odd"}, "label 'odd' does not occur in the training rows"),
    ("labels", "train", {"text": "a", "labels": None}, "column 'labels' is null"),
    ("labels", "test", {"text": "a", "labels": ["odd"]}, "label 'odd' does not occur"),
    ("regress", "train", {"text": "a", "score": "3,5"}, "column 'score' is '3,5'; it must be a number"),
    ("embed", "train", {"query": "same", "positive": "same"}, "'same' stands in two of its columns"),
    ("embed", "valid", {"query": "a", "positive": ""}, "column 'positive' is empty"),
    ("tag", "train", {"words": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags; each word needs one"),
    ("tag", "train", {"words": "[", "tags": 7}, "column 'tags' is 7"),
    ("tag", "valid", {"words": ["a"], "tags": ["B-odd"]}, "tag 'B-odd' does not occur in the training rows"),
    ("answer", "train", {"question": "q?", "context": "a b", "answer": "c"}, "does not stand in the context"),
    (
        "answer",
        "train",
        {"question": "q?", "context": "a b", "answer": {"text": ["b"], "answer_start": [0]}},
        "does not stand at character 0 of the context; it first stands at 2",
    ),
    ("answer", "train", {"question": "q?", "context": "a b", "answer": {"text": None}}, "must be an answer, or texts"),
    (
        "answer",
        "train",
        {"question": "q?", "context": "a b", "answer": {"text": ["a", "b"], "answer_start": [0]}},
        "its answers have 2 texts and 1 starts; each text needs one",
    ),
    ("answer", "train", {"question": " ", "context": "a b", "answer": "b"}, "the question is"),
    ("answer", "test", {"question": "q?", "context": "a b", "answer": ""}, "it has no answer, and all training rows"),
    ("recommend", "train", {"user": "", "item": "i1", "time": 3}, "column 'user' is empty"),
    ("recommend", "train", {"user": "u1", "item": "i1", "time": "soon"}, "neither a number nor a date"),
    ("generate", "train", {"prompt": "a", "completion": " "}, "column 'completion' is empty"),
    ("prefer", "train", {"prompt": "a", "chosen": "b", "rejected": "b"}, "the rejected answer are the same"),
    ("translate", "train", {"source": "a", "target": ""}, "'target' is empty"),
    ("image", "train", {"image": "none.png", "label": "a"}, "names 'none.png', which is not in"),
    ("image", "train", {"image": "1.png", "label": ""}, "column 'label' is empty"),
    ("image", "valid", {"image": "1.png", "label": "odd"}, "label 'odd' does not occur"),
    ("image_text", "train", {"image": "none.png", "text": "a", "label": "a"}, "names 'none.png'"),
    ("image_text", "train", {"image": "1.png", "text": "", "label": "a"}, "column 'text' is empty"),
]  # fmt: skip

HALF = "rain \ud83d"  # an emoji that was cut, as JSON can hold it
CUT = r"has '\ud83d' at character 5, half of a character"
READ += [
    ("classify", "train", {"text": HALF, "label": "a"}, f"column 'text' {CUT}"),
    ("classify", "train", {"text": "a", "label": HALF}, f"column 'label' {CUT}"),
    ("labels", "train", {"text": "a", "labels": [HALF]}, f"a label in column 'labels' {CUT}"),
    ("embed", "train", {"query": "a", "positive": HALF}, f"column 'positive' {CUT}"),
    ("tag", "train", {"words": ["rain", HALF[-1]], "tags": ["O", "O"]}, f"it {CUT}"),
    ("answer", "train", {"question": "q?", "context": HALF, "answer": "rain"}, f"the context {CUT}"),
    ("recommend", "train", {"user": HALF, "item": "i1", "time": 3}, f"column 'user' {CUT}"),
    ("generate", "train", {"prompt": HALF, "completion": "a"}, f"column 'prompt' {CUT}"),
    ("generate", "train", {"messages": [TALK[0], {**TALK[1], "content": HALF}]}, f"message 2 (assistant) {CUT}"),
    ("prefer", "train", {"prompt": "a", "chosen": "b", "rejected": HALF}, f"column 'rejected' {CUT}"),
    ("translate", "train", {"source": HALF, "target": "a"}, f"column 'source' {CUT}"),
    ("image", "train", {"image": "1.png", "label": HALF}, f"column 'label' {CUT}"),
]

MADE = [  # task, base, part, a row that only the base refuses, why
    ("classify", "bert", "train", {"text": LONG, "label": "a"}, "texts are longer than 24 tokens"),
    ("labels", "bert", "valid", {"text": LONG, "labels": ["a"]}, "texts are longer than 24 tokens"),
    ("regress", "bert", "test", {"text": LONG, "score": 2}, "texts are longer than 24 tokens"),
    ("embed", "bert", "train", {"query": LONG, "positive": "sun"}, "texts are longer than 24 tokens"),
    ("tag", "bert", "train", {"words": ["a", SILENT], "tags": ["O", "O"]}, r"makes nothing of word 2 \('~'\)"),
    ("answer", "bert", "train", {"question": "q?", "context": "a ~ b", "answer": "~"}, "nothing of its answer '~'"),
    ("answer", "bert", "valid", {"question": "q?", "context": "~", "answer": "~"}, "makes nothing of its context"),
    ("recommend", "new:8", "valid", {"user": "odd", "item": "i0", "time": 1}, "user 'odd' has no training rows"),
    ("recommend", "tables", "train", {"user": "odd", "item": "i0", "time": 1}, "user 'odd' is none of the 4"),
    ("recommend", "tables", "test", {"user": "u0", "item": "odd", "time": 1}, "item 'odd' is none of the 96"),
    ("generate", "llama", "train", {"messages": [{"role": "system", "content": "x"}, *TALK]}, "no system turn"),
    (
        "prefer",
        "llama",
        "test",
        {
            "prompt": [{"role": "system", "content": "x"}, TALK[0]],
            "chosen": [TALK[1]],
            "rejected": [{"role": "assistant", "content": "food"}],
        },
        "no system turn",
    ),
    ("translate", "t5", "train", {"source": SILENT, "target": "food"}, "the tokenizer finds no token in its text"),
    ("image", "vit", "train", {"image": "cut.png", "label": "a"}, "'cut.png' is not a readable image"),
    ("image", "cnn", "train", {"image": "large.png", "label": "a"}, "'large.png' has 20 x 20 pixels, and the first"),
    ("image_text", "both", "valid", {"image": "cut.png", "text": "rain", "label": "a"}, "not a readable image"),
]  # fmt: skip


def names(cases):
    return [f"{k}-{case[0]}-{case[-1][:24]}" for k, case in enumerate(cases)]


def shaped(row, bad):
    """The row in the form of the bad one: plain texts, or messages."""
    if not isinstance(bad, dict) or not ("messages" in bad or isinstance(bad.get("prompt"), list)):
        return row
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    said = {column: {"role": roles[column], "content": text} for column, text in row.items()}
    if "messages" in bad:
        return {"messages": [said["prompt"], said["completion"]]}
    return {column: [turn] for column, turn in said.items()}


def write(place, name, task, part, bad, places=(3, 5)):
    """Files of the three parts; one of them has this row at these places."""
    files = {}
    for own, begin, n in (("train", 0, 48), ("valid", 48, 24), ("test", 72, 24)):
        lines = [json.dumps(shaped(GOOD[task](begin + k), bad)) for k in range(n)]
        for at in places if own == part else ():
            lines.insert(at, bad if isinstance(bad, str) else json.dumps(bad))
        files[own] = place / f"{name}_{own}.jsonl"
        files[own].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def read(task, files, **more):
    parts = {name: files[name] for name in ("valid", "test")}
    return load_splits(files["train"], **parts, read=TASKS[task].read, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images: 0.png to 8.png, one of another size, one cut short."""
    folder = tmp_path_factory.mktemp("skip")
    for k, pixels in enumerate(arrays(9)[0]):
        Image.fromarray(pixels).save(folder / f"{k}.png")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "large.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    table(folder / "data.csv", 60)
    return folder


@pytest.fixture(scope="module")
def bases(place):
    """How each base is made; texts lose a "~" before they become tokens."""

    def deaf(base):
        backend = base.tokenizer.backend_tokenizer
        old = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*old, normalizers.Replace(SILENT, "")])
        return base

    def bert():
        base = deaf(load_base(str(place / "bert")))
        base.tokenizer.unk_token = None
        return base

    def t5():
        base = deaf(load_base(str(place / "t5"), head="seq2seq"))
        base.tokenizer.backend_tokenizer.post_processor = None
        return base

    tiny_bert(place / "bert")
    tiny_vit(place / "vit")
    tiny_seq2seq(place / "t5")
    tiny_causal(place / "llama", template=_SYSTEM + "{% endfor %}" + CHATML)
    return {
        "bert": bert,
        "new:8": lambda: "new:8",
        "tables": lambda: TASKS["recommend"].base_for(
            "new:8", read("recommend", write(place, "u", "recommend", "", {}))
        ),
        "llama": lambda: load_base(str(place / "llama"), head="causal"),
        "t5": t5,
        "vit": lambda: load_base(str(place / "vit"), head="vision"),
        "cnn": cnn_base,
        "both": lambda: both(load_base(str(place / "bert")), load_base(str(place / "vit"), head="vision")),
    }


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(("task", "part", "bad", "why"), READ, ids=names(READ))
def test_a_bad_row_is_refused_by_file_and_row_or_left_out_and_counted(place, task, part, bad, why):
    files = write(place, "bad", task, part, bad)
    with pytest.raises(DataError) as refused:
        read(task, files)
    for words in (f"bad_{part}.jsonl'", "row 4:", "row 6:", why, "leave these 2 rows out with --skip-bad 2"):
        assert words in str(refused.value)
    with pytest.raises(DataError, match=r"--skip-bad 2 or more \(1 are too few\)"):
        read(task, files, skip_bad=1)
    found = read(task, files, skip_bad=2)
    assert [(one.source, one.row) for one in found.skipped] == [(str(files[part]), 4), (str(files[part]), 6)]
    assert all(why in one.reason for one in found.skipped)
    clean = read(task, write(place, "good", task, "", bad))
    assert clean.skipped == ()
    for own, other in zip((found.train, found.valid, found.test), (clean.train, clean.valid, clean.test)):
        assert own.digest() == other.digest()
    assert 4 not in getattr(found, part).lines


def test_the_bound_is_for_all_parts_together(place):
    files = write(place, "two", "classify", "train", {"text": "", "label": "a"}, places=(3,))
    with files["valid"].open("a") as file:
        file.write('{"text": "x", "label": "odd"}\n{"text": "y", "label": ""}\n')
    assert [one.row for one in read("classify", files, skip_bad=3).skipped] == [4, 26, 25]
    with pytest.raises(
        DataError, match=r"row 25: label 'odd'.*with --skip-bad 3 or more \(2 are too few, 2 were left out before"
    ):
        read("classify", files, skip_bad=2)


def test_one_refusal_names_the_bad_rows_of_all_parts_and_of_every_reason(place, bases):
    files = write(place, "many", "classify", "train", {"text": "", "label": "a"}, places=(3,))
    with files["valid"].open("a") as file:
        file.write('{"text": "x", "label": "odd"}\n{"text": "y", "label": ""}\n')
    with pytest.raises(DataError) as refused:
        read("classify", files)
    for words in (
        "3 faults",
        "train.jsonl' row 4: column 'text'",
        "valid.jsonl' row 26: column",
        "row 25: label 'odd'",
    ):
        assert words in str(refused.value)
    assert str(refused.value).count("mend or remove these rows") == 1
    assert str(refused.value).endswith("; or leave these 3 rows out with --skip-bad 3 or more")
    for part in ("train", "valid", "test"):
        with files[part].open("a") as file:
            file.write(json.dumps({"text": LONG, "label": "a"}) + "\n")
    data = read("classify", files, skip_bad=3)
    with pytest.raises(DataError) as refused:
        lk.fit(bases["bert"](), data, max_steps=1, threads=1, skip_bad=3)
    for part, row in (("train", 50), ("valid", 27), ("test", 25)):
        assert f"{part}.jsonl' row {row}: it has 62 tokens, and 24 are the most" in str(refused.value)
    assert "; shorten them, or pass --truncate to cut them; or leave these 3 rows out with --skip-bad 6 (3 are" in str(
        refused.value
    )
    found = lk.fit(bases["bert"](), data, max_steps=1, threads=1, skip_bad=6)
    assert found.summary["skipped"]["rows"] == 6


def test_what_else_is_wrong_does_not_hide_the_bad_rows(place):
    files = write(place, "hidden", "classify", "train", {"text": "", "label": "a"})
    files["test"].write_text("")
    with pytest.raises(DataError, match=r"(?s)row 4: column 'text'.*--skip-bad 2 or more"):
        read("classify", files)
    with pytest.raises(DataError, match=r"hidden_test\.jsonl' is empty"):
        read("classify", files, skip_bad=2)


def test_an_image_or_its_text_may_be_bad_and_all_are_named(place, bases):
    files = write(place, "halves", "image_text", "train", {"image": "none.png", "text": "sun", "label": "a"}, (1,))
    with files["train"].open("a") as file:
        for row in ({"image": "1.png", "text": "", "label": "a"}, {"image": "cut.png", "text": "sun", "label": "b"}):
            file.write(json.dumps(row) + "\n")
    with files["test"].open("a") as file:
        file.write(json.dumps({"image": "2.png", "text": LONG, "label": "b"}) + "\n")
    with pytest.raises(DataError, match=r"(?s)row 2: .*none\.png.*row 50: column 'text'.*--skip-bad 2 or more"):
        read("image_text", files)
    data = read("image_text", files, skip_bad=2)
    with pytest.raises(DataError, match=r"(?s)row 51: 'cut\.png'.*row 25: it has 62 tokens.*--skip-bad 4 \(2 are"):
        lk.fit(bases["both"](), data, "image_text", max_steps=1, threads=1, skip_bad=2)


def test_every_row_with_too_long_a_text_is_named(place, bases):
    long = {"text": LONG, "label": "a"}
    files = write(place, "long", "classify", "train", long, places=(1, 3, 5, 7, 9, 11, 13))
    with pytest.raises(DataError, match=r"7 of 55 texts .* 24 tokens \(rows 2, 4, 6, 8, 10 and 2 more\), the longest"):
        lk.fit(bases["bert"](), read("classify", files), max_steps=1)


def test_pairs_that_were_learned_and_labels_of_one_text_alone(place):
    files = write(place, "had", "recommend", "", {})
    with files["valid"].open("a") as file:
        file.write(json.dumps(GOOD["recommend"](3)) + "\n")
    with pytest.raises(DataError, match=r"valid\.jsonl' row 25: 'u3' had 'i3' in the training rows.*--skip-bad 1"):
        read("recommend", files)
    assert [one.row for one in read("recommend", files, skip_bad=1).skipped] == [25]
    odd = {"text": "sun", "label": "odd"}
    files = write(place, "alone", "classify", "train", odd, places=(7,))
    with pytest.raises(DataError, match=r"train\.jsonl' row 8: label 'odd' has one text only"):
        read("embed", files)
    found = read("embed", files, skip_bad=1)
    assert ([one.row for one in found.skipped], len(found.train)) == ([8], 48)


def test_rows_in_memory_are_left_out_too():
    rows = [GOOD["classify"](k) for k in range(30)]
    wrong = [*rows[:4], {"text": "", "label": "a"}, *rows[4:], "no row"]
    with pytest.raises(
        DataError, match=r"(?s)'the rows in memory': 2 faults:.*row 5: column.*row 32: it is 'no row', not a dict"
    ):
        load_splits(wrong)
    found = load_splits(wrong, valid=[*rows, {"text": "x", "label": "odd"}], skip_bad=3)
    assert sorted((one.source, one.row) for one in found.skipped) == [
        ("the rows in memory", 5),
        ("the rows in memory", 32),
        ("the rows in memory ('valid')", 31),
    ]
    assert len(found.train) + len(found.test) == len(found.valid) == 30


def test_rows_of_a_csv_file_with_too_many_or_too_few_fields(tmp_path):
    good = [f"i like {_word(k)},{'ab'[k % 2]}" for k in range(20)]
    file = tmp_path / "x.csv"
    file.write_text(
        "\n".join(["text,label", *good[:3], "one", *good[3:], "a,b,c", '"open\nand on', 'shut",x,y']) + "\n"
    )
    with pytest.raises(DataError, match=r"(?s)row 5: 1 fields where the header has 2.*must stand in double quotes"):
        load_splits(file)
    with skipping(3) as skipped:
        rows = load_rows(file)
    assert rows.texts == tuple(line.split(",")[0] for line in good)
    assert [one.row for one in skipped.bad] == [5, 23, 24]
    assert skipped.bad[2].reason == "3 fields where the header has 2, over lines 24 to 26: is a quote left open?"
    file.write_text('text,label\na,b\n"a\nb" c,d\n')
    with pytest.raises(DataError, match=r"no.* table of comma-separated values: row 3, lines 3 to 4 \("), skipping(9):
        load_rows(file)


def test_a_text_of_a_conll_file_goes_as_a_whole(tmp_path):
    file = tmp_path / "x.conll"
    file.write_text("rain B-x\nsun O\n\nsnow B-x\nsoup\nfog O\n\nhail O\n")
    with pytest.raises(DataError, match=r"row 5: 1 column \('soup'\), where other lines have 2"):
        load_tagged(file)
    with skipping(1) as skipped:
        assert load_tagged(file).words == (("rain", "sun"), ("hail",))
    assert [one.row for one in skipped.bad] == [5]


def test_a_question_of_squad(tmp_path):
    asked = {"question": "q?", "answers": [{"text": "b", "answer_start": 2}]}
    questions = [asked, {"question": "q?"}, {**asked, "answers": [{"text": "c", "answer_start": 0}]}, asked]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": questions}]}]}))
    with pytest.raises(
        DataError, match=r"(?s)row 2: this question lacks 'answers'.*row 3: the answer 'c' does not stand"
    ):
        TASKS["answer"].read(file)
    with skipping(2) as skipped:
        assert TASKS["answer"].read(file).lines == (1, 4)
    assert [one.row for one in skipped.bad] == [2, 3]


def test_images_are_looked_at_before_training_where_they_do_not_fit_into_memory(place, bases, monkeypatch):
    monkeypatch.setattr("lorakit.data.pixels.available_memory", lambda: 0)
    files = write(place, "lazy", "image", "train", {"image": "cut.png", "label": "a"})
    rows, base = load_images(files["train"]), bases["vit"]()
    goal = TASKS["image"].of(load_splits(files["train"], read=load_images), base)
    assert goal.examples(rows, base.tokenizer, truncate=False).kept is None  # found out when its batch comes
    with skipping(2), pytest.raises(DataError, match=r"row 4: 'cut\.png' is not a readable image"):
        goal.examples(rows, base.tokenizer, truncate=False)


# ---------------------------------------------------------------- what only a base finds


@pytest.mark.parametrize(("task", "base", "part", "bad", "why"), MADE, ids=names(MADE))
def test_a_fit_leaves_out_what_its_base_cannot_use_and_learns_the_same(place, bases, task, base, part, bad, why):
    files = write(place, "bad", task, part, bad)
    if task == "recommend":  # the same pair twice is one
        text = files[part].read_text().splitlines()
        files[part].write_text("\n".join([*text[:5], text[5].replace("i0", "i1").replace('"u0"', '"u1"'), *text[6:]]))
    data, settings = read(task, files), {"task": task, "max_steps": 2, "threads": 1, "tokens_per_pass": 512}
    with pytest.raises(DataError, match=why) as refused:
        lk.fit(bases[base](), data, **settings)
    for words in (f"bad_{part}.jsonl'", "row 4", "leave these 2 rows out with --skip-bad 2"):
        assert words in str(refused.value)
    with pytest.raises(DataError, match=r"--skip-bad 2 \(1 are too few\)"):
        lk.fit(bases[base](), data, **settings, skip_bad=1)
    found = lk.fit(bases[base](), data, **settings, skip_bad=2)
    assert found.summary["skipped"]["rows"] == 2
    assert [(one["source"], one["row"]) for one in found.summary["skipped"]["first"]] == [
        (str(files[part]), 4),
        (str(files[part]), 6),
    ]
    assert sum("2 bad rows were left out" in note for note in found.summary["notes"]) == 1
    clean = lk.fit(bases[base](), read(task, write(place, "good", task, "", bad)), **settings)
    assert clean.summary["skipped"] == {"rows": 0, "first": []}
    assert clean.metrics == found.metrics
    assert [one["loss"] for one in clean.records] == [one["loss"] for one in found.records]


def test_the_first_image_says_the_size_unless_it_is_a_bad_one(place):
    files = write(place, "first", "image", "train", {"image": "cut.png", "label": "a"}, places=(0,))
    data = read("image", files)
    with pytest.raises(DataError, match=r"row 1: 'cut\.png' is not a readable image.*--skip-bad 1"):
        lk.fit(cnn_base(), data, "image", max_steps=1)
    assert lk.fit(cnn_base(), data, "image", max_steps=1, skip_bad=1).summary["skipped"]["rows"] == 1


def test_a_label_that_goes_with_its_only_training_row_takes_the_rows_of_other_parts_along(place, bases):
    files = write(place, "rare", "classify", "train", {"text": LONG, "label": "rare"}, places=(3,))
    with files["test"].open("a") as file:
        file.write('{"text": "sun", "label": "rare"}\n')
    with pytest.raises(
        DataError, match=r"row 25: label 'rare' does not occur.*2 \(1 are too few, 1 were left out before"
    ):
        lk.fit(bases["bert"](), read("classify", files), max_steps=1, skip_bad=1)
    found = lk.fit(bases["bert"](), read("classify", files), max_steps=1, skip_bad=2)
    assert found.summary["labels"] == ["a", "b"]
    assert [one["row"] for one in found.summary["skipped"]["first"]] == [4, 25]


def test_a_fit_that_reads_for_itself_counts_what_reading_left_out(place, bases):
    files = write(place, "one", "classify", "train", {"text": "", "label": "a"})
    rows = {part: [json.loads(line) for line in file.read_text().splitlines()] for part, file in files.items()}
    for data, source in ((files["train"], str(files["train"])), (rows, "the rows in memory ('train')")):
        with pytest.raises(DataError, match="--skip-bad 2"):
            lk.fit(bases["bert"](), data, max_steps=1)
        found = lk.fit(bases["bert"](), data, max_steps=1, skip_bad=2)
        assert [(one["source"], one["row"]) for one in found.summary["skipped"]["first"]] == [(source, 4), (source, 6)]


def test_parts_of_one_name_are_not_confused(place, bases):
    data = read("classify", write(place, "bad", "classify", "train", {"text": LONG, "label": "a"}))
    held = (replace(part, source=data.train.source) for part in (data.valid, data.test))
    alike = Splits(data.train, *held)
    with pytest.raises(DataError, match="several parts have rows of this name, so none can be left out"):
        lk.fit(bases["bert"](), alike, max_steps=1, skip_bad=2)


def test_a_run_goes_on_with_the_same_rows(place, bases, tmp_path):
    files = write(place, "bad", "classify", "train", {"text": "", "label": "a"})
    settings = {"epochs": 2, "batch_size": 8, "threads": 1, "tokens_per_pass": 512, "skip_bad": 2}

    def stop(record: Record, total: int) -> None:
        if record.kind == "step" and record.step == 8:
            raise KeyboardInterrupt

    whole = lk.fit(bases["bert"](), read("classify", files, skip_bad=2), **settings)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(bases["bert"](), read("classify", files, skip_bad=2), out=tmp_path / "run", watch=stop, **settings)
    again = {**settings, "skip_bad": 5}  # the rows are compared, not the bound
    found = lk.fit(bases["bert"](), read("classify", files, skip_bad=5), out=tmp_path / "run", resume=True, **again)
    assert found.metrics == whole.metrics
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"]["rows"] == 2


def test_images_that_cannot_be_read_are_named_of_all_parts_at_once(place, bases):
    files = write(place, "cuts", "image", "train", {"image": "cut.png", "label": "a"})
    with files["test"].open("a") as file:
        file.write(json.dumps({"image": "cut.png", "label": "b"}) + "\n")
    with pytest.raises(
        DataError, match=r"(?s)row 4:.*row 6:.*test.jsonl' row 25:.*leave these 3 rows out.*--skip-bad 3$"
    ):
        lk.fit(bases["vit"](), read("image", files), "image", max_steps=1)


def test_of_users_and_items_only_those_that_are_used_are_counted(place, bases, capsys):
    base = bases["tables"]()
    base.model.save_pretrained(place / "films")
    base.tokenizer.save_pretrained(place / "films")
    files = write(place, "odd", "recommend", "train", {"user": "odd", "item": "i0", "time": 1}, places=(3,))
    words = ["fit", place / "films", files["train"], "--valid", files["valid"], "--test", files["test"]]
    words += ["--task", "recommend", "--max-steps", "1", "--rank", "2", "--skip-bad", "1", "--out", place / "odd"]
    assert main([*map(str, words), "--overwrite"]) == 0
    assert "\n4 users, 48 items; first row" in capsys.readouterr().err


def test_tags_of_another_scheme_are_named_by_their_rows(place, bases):
    for bad, why in (
        (
            {"words": ["a", "b"], "tags": ["O", "1"]},
            "tag '1' has no prefix, and 'B-x' has one, as those of 96 rows have",
        ),
        ({"words": ["a"], "tags": [7]}, "tag '7' has no prefix"),
    ):
        files = write(place, "tags", "tag", "valid", bad)
        with pytest.raises(DataError, match=f"(?s)row 4: {why}.*row 6: .*one scheme; or leave these 2 rows"):
            read("tag", files)
        assert [one.row for one in read("tag", files, skip_bad=2).skipped] == [4, 6]


# ---------------------------------------------------------------- evaluate, predict, the command line

MEASURED = [  # task, base, a row that a run cannot measure
    ("classify", "bert", {"text": "sun", "label": "odd"}, "label 'odd' was not in the training data"),
    ("classify", "bert", {"text": "", "label": "a"}, "column 'text' is empty"),
    ("labels", "bert", {"text": "sun", "labels": ["odd"]}, "label 'odd' does not occur in the training rows"),
    ("regress", "bert", {"text": "sun", "score": "x"}, "column 'score' is 'x'"),
    ("embed", "bert", {"query": LONG, "positive": "sun"}, "longer than 24 tokens"),
    ("tag", "bert", {"words": ["a"], "tags": ["B-odd"]}, "tag 'B-odd' was not in the training data"),
    ("answer", "bert", {"question": "q?", "context": "a b", "answer": ""}, "it has no answer, and all training"),
    ("recommend", "new:8", {"user": "u0", "item": "i0", "time": 1}, "1 of 25 rows were learned from, so they"),
    ("image", "vit", {"image": "cut.png", "label": "a"}, "not a readable image"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "base", "bad", "why"), MEASURED, ids=names(MEASURED))
def test_an_evaluation_leaves_out_what_it_cannot_measure(place, bases, task, base, bad, why):
    files = write(place, "run", task, "", bad)
    made = bases[base]()
    run = lk.fit(made, read(task, files), task, max_steps=1, threads=1, out=place / f"run_{task}", overwrite=True)
    own = {} if base == "new:8" else {"base": made}
    clean = lk.evaluate(place / f"run_{task}", files["test"], **own)
    assert clean.skipped == ()
    bad_file = write(place, "odd", task, "test", bad, places=(3,))["test"]
    with pytest.raises(DataError, match=why) as refused:
        lk.evaluate(place / f"run_{task}", bad_file, **own)
    assert "row 4" in str(refused.value) and "leave it out with --skip-bad 1" in str(refused.value)
    found = lk.evaluate(place / f"run_{task}", bad_file, **own, skip_bad=1)
    assert [(one.source, one.row) for one in found.skipped] == [(str(bad_file), 4)]
    assert (found.metrics, found.n_rows) == (clean.metrics, clean.n_rows)
    assert run.metrics == pytest.approx(found.metrics, abs=2e-2)


def test_a_prediction_leaves_nothing_out(place, bases):
    files = write(place, "bad", "classify", "test", {"text": "", "label": "a"})
    lk.fit(bases["bert"](), place / "data.csv", max_steps=1, out=place / "plain", overwrite=True)
    with pytest.raises(DataError, match="row 4: column 'text' is empty") as refused:
        lk.predict(place / "plain", TASKS["classify"].read(files["test"], answers=False))
    assert "--skip-bad" not in str(refused.value)
    with pytest.raises(UsageError, match="takes no option 'skip_bad'"):
        lk.predict(place / "plain", ["sun"], skip_bad=1)


def test_the_command_line_counts_what_it_leaves_out(place, bases, capsys):
    files = write(place, "bad", "classify", "train", {"text": "", "label": "a"})
    with files["test"].open("a") as file:
        file.write(json.dumps({"text": LONG, "label": "a"}) + "\n")
    words = [
        "fit",
        str(place / "bert"),
        str(files["train"]),
        "--valid",
        str(files["valid"]),
        "--test",
        str(files["test"]),
    ]
    words += ["--max-steps", "2", "--threads", "1", "--out", str(place / "cli"), "--overwrite"]
    for n, code, told_ in (
        ("0", 1, "--skip-bad 2"),
        ("2", 1, "--skip-bad 3 (2 are too few, 2 were"),
        ("-1", 2, "0 or more"),
    ):
        assert main([*words, "--skip-bad", n]) == code
        assert told_ in capsys.readouterr().err
    assert main([*words, "--skip-bad", "3"]) == 0
    streams = capsys.readouterr()
    assert "note: 3 bad rows were left out: " in streams.err
    assert "3 bad rows were left out: " in streams.out and "bad_test.jsonl' row 25" in streams.out
    assert json.loads((place / "cli" / "summary.json").read_text())["skipped"]["rows"] == 3
    words = ["evaluate", str(place / "cli"), str(files["train"])]
    assert main([*words, "--skip-bad", "1"]) == 1
    assert main([*words, "--skip-bad", "-1"]) == 2
    capsys.readouterr()
    assert main([*words, "--skip-bad", "2"]) == 0
    assert "note: 2 bad rows were left out: " in capsys.readouterr().out
    assert main([*words, "--skip-bad", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"]["rows"] == 2
    assert main(["predict", str(place / "cli"), str(files["train"]), "--skip-bad", "2"]) == 2
    assert "--skip-bad" in capsys.readouterr().err


# ---------------------------------------------------------------- the bound itself


def test_a_bound_is_a_number_of_rows():
    for most in (-1, 1.5, True, "3"):
        with pytest.raises(UsageError, match="skip_bad is .*0 or more"), skipping(most):
            pass
    with pytest.raises(UsageError, match="skip_bad is -1; it must be 0 or more"):
        lk.fit("none", "none", skip_bad=-1)


def test_a_table_of_bad_rows_alone_is_refused_whatever_the_bound(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n,a\n,b\n")
    with pytest.raises(DataError, match="no other row is there"), skipping(9):
        load_rows(tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text("user,item,rating\n,a,5\nu,,5\n")
    for rating in (None, ">=4"):
        with pytest.raises(DataError, match="no other row is there"), skipping(9):
            load_interactions(tmp_path / "y.csv", rating=rating)
    (tmp_path / "y.csv").write_text("user,item,rating\n,a,5\nu,b,1\n")
    with pytest.raises(DataError, match="no row with rating >= 4"), skipping(9):
        load_interactions(tmp_path / "y.csv", rating=">=4")


@pytest.mark.parametrize("skip_bad", [0, 99])
def test_rows_that_are_all_bad_are_not_offered_to_be_left_out(place, bases, skip_bad):
    files = write(place, "allbad", "classify", "", {})
    data, made = read("classify", files), bases["bert"]()
    result = lk.fit(made, data, max_steps=1, threads=1)
    run = (result.adapter, TASKS["classify"].from_note(result.adapter.meta["task"]))
    odd = replace(data.test, labels=("odd",) * len(data.test))
    long = replace(data, valid=replace(data.valid, texts=(LONG,) * len(data.valid)))
    with pytest.raises(DataError, match=f"(?s)label 'odd' .*; no other row of '{odd.source}' is there$"):
        lk.evaluate(run, odd, base=made, skip_bad=skip_bad)
    with pytest.raises(DataError, match=f"are longer than 24 .*; no other row of '{data.valid.source}' is there$"):
        lk.fit(made, long, max_steps=1, threads=1, skip_bad=skip_bad)


def test_what_is_told_is_short():
    bad = [BadRow("x", k, "odd") for k in range(1, 8)]
    assert counted(bad)["rows"] == 7
    assert counted(bad)["first"][0] == {"source": "x", "row": 1, "reason": "odd"}
    assert told(bad) == [f"7 bad rows were left out: {'; '.join(islice(bad, 5))}; and 2 more"]
    assert told([]) == []
