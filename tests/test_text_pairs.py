"""Pairs of texts: how tables hold them, how they become tokens, and that a model learns which text is which."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.cli import main
from lorakit.data import Rows, Splits, load_rows, load_splits
from lorakit.errors import DataError
from lorakit.fit.use import open_run
from lorakit.tasks.base import load_base
from lorakit.tasks.classify import Classify
from lorakit.tasks.pooled import used
from lorakit.trunk import Trunk
from tiny_text import tiny_bert, told_topics

QUICK = {"epochs": 12, "batch_size": 16, "learning_rate": 1e-2, "threads": 1}

TASTY = "the soup and bread and plum"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny_bert(folder / "base")
    lines = [f"{text},{other},{topic}" for text, other, _, topic in told_topics(200)]
    (folder / "pairs.csv").write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


@pytest.fixture(scope="module")
def run(place, base):
    """The label is the topic of the second text, so the model must know which is which."""
    result = lk.fit(base, place / "pairs.csv", out=place / "run", **QUICK)
    assert result.before["accuracy"] < 0.6
    assert result.metrics["accuracy"] > 0.8  # of 20; one text read for the other would give a third
    return place / "run"


@pytest.mark.parametrize("names", ["text,text2", "sentence1,sentence2", "premise,Hypothesis", "question1,question2"])
def test_pairs_are_found_by_their_usual_names(tmp_path, names):
    (tmp_path / "a.csv").write_text(f"id,{names},label\n1,a cat,an animal,yes\n", encoding="utf-8")
    rows = load_rows(tmp_path / "a.csv")
    assert (rows.texts, rows.others, rows.labels) == (("a cat",), ("an animal",), ("yes",))
    assert rows.inputs == ("a cat\nan animal",)
    assert "'a cat' and 'an animal' -> yes" in rows.about()


def test_named_columns_say_whether_they_are_pairs(tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,query,label\na,b,c,x\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"'premise' and 'hypothesis', and 'query' too; name one with --text COLUMN, or"
    ):
        load_rows(tmp_path / "a.csv")
    assert load_rows(tmp_path / "a.csv", text="premise").others is None
    assert load_rows(tmp_path / "a.csv", text="hypothesis", text2="query").others == ("c",)
    assert load_rows(tmp_path / "a.csv", text2="premise").texts == ("c",)
    with pytest.raises(DataError, match="are both 'query'"):
        load_rows(tmp_path / "a.csv", text="query", text2="query")
    with pytest.raises(DataError, match="no column 'premis'; did you mean 'premise'"):
        load_rows(tmp_path / "a.csv", text="query", text2="premis")
    with pytest.raises(DataError, match="text2 and label are both 'label'; give each a column of its own"):
        Classify.read(tmp_path / "a.csv", text="query", text2="label", label="label")
    (tmp_path / "b.csv").write_text("text,text2,label\na,b,x\na,,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 3: column 'text2' is empty"):
        load_rows(tmp_path / "b.csv")


def test_the_second_text_is_part_of_what_is_learned_and_of_what_is_the_same():
    rows = Rows(("a", "a"), ("x", "y"), "s", (1, 2), ("b", "c"))
    assert rows.digest() != Rows(("a", "a"), ("x", "y"), "s", (1, 2), ("b", "d")).digest()
    assert rows.digest() != Rows(("a", "a"), ("x", "y"), "s", (1, 2)).digest()
    assert rows.take([1]).others == ("c",)
    single = Rows(("a", "a"), ("x", "y"), "t", (1, 2))
    other = Rows(("a",), ("z",), "u", (1,))  # nor does it have a label of the training rows
    told = "^2 faults:.*'t' has single texts, and 's' has pairs of texts;.*'u' has single texts, .* alike in both$"
    with pytest.raises(DataError, match=f"(?s){told}"):
        Splits(rows, single, other).checked()


def test_scores_of_pairs_equal_those_of_the_padded_model_with_token_types(place, base):
    rows = load_rows(place / "pairs.csv").take(range(8))
    task = Classify(("a", "b", "c"), **used(base, rows))
    assert task.types
    task.prepare(base.model)
    generator = torch.Generator().manual_seed(0)
    try:
        weight = base.model.classifier.weight.data.normal_(generator=generator)
        tokens = task.examples(rows, base.tokenizer, truncate=False)
        batch = tokens.gather(range(8))
        padded = base.tokenizer(
            list(rows.texts), list(rows.others), padding=True, return_tensors="pt", return_token_type_ids=True
        )
        assert int(padded["token_type_ids"].sum()) > 0
        with torch.no_grad():
            state = base.model(**padded).last_hidden_state
            mask = padded["attention_mask"][..., None]
            wanted = (state * mask).sum(1) / mask.sum(1) @ weight.T
            with Trunk(base.model, head=task.head, pad=tokens.pad) as trunk:
                assert not trunk.why_padded
                found = task.scores(base.model, batch.hidden(trunk), batch)
        assert torch.allclose(found, wanted, atol=1e-4)
        assert float(wanted.std()) > 0.1
        types = padded.pop("token_type_ids")
        with torch.no_grad():
            state = base.model(**padded, token_type_ids=0 * types).last_hidden_state
        assert not torch.allclose((state * mask).sum(1) / mask.sum(1) @ weight.T, wanted, atol=1e-2)
    finally:
        del base.model._modules[task.head]


def test_a_tokenizer_that_puts_nothing_between_gets_a_line_break():
    class Bare:
        pad_token_id = 0

        def num_special_tokens_to_add(self, pair):
            return 1

        def __call__(self, texts, others, **_):
            return {"input_ids": [[1, *map(ord, text + other)] for text, other in zip(texts, others)]}

    rows = Rows(("ab",), ("x",), "here", (1,), ("cd",))
    tokens = Classify(("x",), "last", pairs=True).examples(rows, Bare(), truncate=False)
    assert list(tokens.ids) == [(1, *map(ord, "ab\ncd"))]
    assert list(tokens.reads) == [(5,)]


def test_a_fitted_pair_model_predicts_evaluates_and_says_what_it_wants(place, run, base):
    rows = load_rows(place / "pairs.csv")
    found = lk.predict(run, list(zip(rows.texts, rows.others)), base=base)
    right = [one.label == label for one, label in zip(found, rows.labels)]
    told = lk.evaluate(run, place / "pairs.csv", base=base)
    assert told.metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert sum(right) > 0.8 * len(right)
    assert (found[0].text, found[0].text2) == (rows.texts[0], rows.others[0])
    for given, words in (
        ([None], r"row 1 is None; it must be a text"),
        (["i like rain"], "'texts' has single texts, and pairs of texts were learned; give each a second one"),
        ([("a", "b"), "c"], r"row 2 is 'c'; it must be a pair of texts"),
        ([("a", "b", "c")], "it must be a pair of texts"),
        ([("a", " ")], "a text of row 1 is empty"),
        (["rain \ud83d"], r"row 1 has '\\ud83d' at character 5, half of a character"),
        (["a", ("b", "c")], "row 2 is .*; it must be a text"),
        ([("rain " * 30, "snow")], r"1 of 1 texts are longer than 24 tokens"),
    ):
        with pytest.raises(DataError, match=words):
            lk.predict(run, given, base=base)
    adapter, task = open_run(run)
    long = task.asked([("i like " + "rain " * 30, TASTY * 9)])
    (types,) = task.examples(long, base.tokenizer, truncate=True).types
    assert len(types) == 24
    assert 8 < sum(types) < 16  # both texts are cut, not the second away
    assert adapter.meta["task"]["types"]


def test_pairs_from_the_command_line_and_merged(place, run, tmp_path, capsys):
    words = ["--say", "i like rain and snow and fog", "--say2", TASTY]
    assert main(["predict", str(run), *words]) == 0
    (wanted,) = lk.predict(run, [("i like rain and snow and fog", TASTY)])
    assert capsys.readouterr().out.startswith(f"{wanted.label}  ")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert main(["predict", str(tmp_path / "merged"), *words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.split("\n", 1)[1])  # behind what merge said
    assert (found["label"], found["text2"]) == (wanted.label, TASTY)
    assert found["probability"] == pytest.approx(wanted.probability, abs=1e-3)
    assert main(["predict", str(run), "--say", "a", "--say2", "b", "--say2", "c"]) == 2
    assert "1 --say and 2 --say2" in capsys.readouterr().err


def test_a_model_of_single_texts_refuses_pairs(place, base):
    data = load_splits(place / "pairs.csv", text="hypothesis")
    result = lk.fit(base, data, **{**QUICK, "epochs": 1})
    task = Classify.from_note(result.adapter.meta["task"])
    assert not task.pairs
    with pytest.raises(DataError, match="has pairs of texts, and single texts were learned; give each text alone"):
        lk.predict((result.adapter, task), [("a", "b")], base=base)
    odd = replace(data.test, others=data.test.texts, labels=("odd",) * len(data.test))
    with pytest.raises(DataError, match="has pairs of texts, and single texts were learned; name the column of the"):
        lk.evaluate((result.adapter, task), odd, base=base)


def test_the_loss_of_pairs_is_the_cross_entropy_of_the_padded_model(place, base):
    rows = load_rows(place / "pairs.csv").take(range(5))
    task = Classify(("food", "tools", "weather"), **used(base, rows))
    task.prepare(base.model)
    try:
        base.model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        tokens = task.examples(rows, base.tokenizer, truncate=False)
        batch = tokens.gather(range(5))
        with torch.no_grad(), Trunk(base.model, head=task.head, pad=tokens.pad) as trunk:
            hidden = batch.hidden(trunk)
            loss, scores = task.loss(base.model, hidden, batch), task.scores(base.model, hidden, batch)
        index = torch.tensor([task.labels.index(label) for label in rows.labels])
        assert float(loss) == pytest.approx(float(F.cross_entropy(scores, index, reduction="sum")), rel=1e-5)
    finally:
        del base.model._modules[task.head]
