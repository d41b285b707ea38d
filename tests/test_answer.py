"""Answers found in contexts: windows and their labels, loss against plain torch, the best span, a fit, the verbs."""

import gzip
import json
import random
from importlib import import_module

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.memory import in_memory
from lorakit.data.questions import load_questions, make_questions
from lorakit.errors import BadRowsError, DataError
from lorakit.fit.learner import scores_of
from lorakit.fit.settings import Settings
from lorakit.tasks.answer import Answer, best_spans
from lorakit.tasks.base import load_base
from lorakit.trunk import Trunk
from tiny_text import WORDS, tiny_bert

QUICK = {"epochs": 6, "batch_size": 4, "learning_rate": 1e-2, "threads": 1, "patience": 6}
OTHERS = [*WORDS["weather"], *WORDS["tools"]]


def squad(path, n_rows=160, longest=24, impossible=False):
    """Which food stands in the context? SQuAD's format; contexts of up to so many words."""
    draw, paragraphs = random.Random(0), []
    for k in range(n_rows):
        words = draw.choices(OTHERS, k=draw.randint(3, longest))
        entry = {"id": str(k), "question": "like very?", "answers": []}
        if impossible and k % 3 == 0:
            entry["is_impossible"] = True
        else:
            place = draw.randrange(len(words))
            words[place] = draw.choice(WORDS["food"])
            start = len(" ".join(words[:place])) + (place > 0)
            entry["answers"] = [{"text": words[place], "answer_start": start}]
        paragraphs.append({"context": " ".join(words), "qas": [entry]})
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "x", "paragraphs": paragraphs}]}))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    tiny_bert(folder / "base")
    squad(folder / "one.json")
    squad(folder / "two.json", impossible=True)
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


@pytest.fixture(scope="module")
def typed(place):
    """A base whose tokenizer gives token types, as BERT's does."""
    base = load_base(str(place / "base"))
    base.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return base


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "one.json", read=load_questions)


@pytest.fixture(scope="module")
def result(place, base, data):
    return lk.fit(base, data, "answer", out=place / "run", **QUICK)


# ---------------------------------------------------------------- data

CONTEXT = "Ann came. Bob came too."
ROW = {"question": "Who came?", "context": CONTEXT}
FORMS = [
    ("a.json", json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": [
        {"question": "Who came?", "answers": [{"text": "Bob", "answer_start": 10}]}]}]}]})),
    ("a.jsonl", json.dumps({**ROW, "answers": {"text": ["Bob"], "answer_start": [10]}})),
    ("b.jsonl", json.dumps({**ROW, "answers": [{"text": "Bob", "answer_start": 10}]})),
    ("d.jsonl", json.dumps({**ROW, "answers": [["Bob", 10]]})),
    ("c.jsonl", json.dumps({**ROW, "answer": "Bob", "start": 10})),
    ("a.csv", f"question,context,answer\nWho came?,{CONTEXT},Bob\n"),
    ("c.csv", f"question,context,answers\nWho came?,{CONTEXT},\"[[\"\"Bob\"\", 10]]\"\n"),
    ("b.csv", f"question,context,answers\nWho came?,{CONTEXT},\"{{\"\"text\"\": [\"\"Bob\"\"]}}\"\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), FORMS, ids=[name for name, _ in FORMS])
def test_every_form_gives_the_same_question(tmp_path, name, text):
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    found = load_questions(tmp_path / f"{name}.gz")
    assert (found.questions, found.contexts, found.answers) == (("Who came?",), (CONTEXT,), ((("Bob", 10),),))
    assert load_questions(tmp_path / f"{name}.gz", answers=False).answers is None


def test_no_answer_is_an_answer_too(place):
    assert load_questions(in_memory([{**ROW, "answer": ""}])).answers == ((),)
    assert load_questions(place / "two.json").n_empty == 54
    one, two = (load_questions(place / name) for name in ("one.json", "two.json"))
    assert "row 1: it has no answer, and all training rows have one" in one.faults(two, two)[0]
    assert "nothing to learn" in two.take([0]).faults(one, one)[0]


def test_questions_on_one_context_stay_together():
    rows = [{"question": f"q{k}?", "context": f"c{k // 5}", "answer": f"c{k // 5}"} for k in range(100)]
    data = load_splits(rows, read=load_questions)
    assert len(data.test) == 10
    assert not set(data.train.contexts) & set(data.test.contexts)


BAD = [
    ({**ROW, "answer": "Eve"}, ["row 1: the answer 'Eve' does not stand in the context"]),
    ({**ROW, "answer": "Bob", "start": 9}, ["'Bob' does not stand at character 9", "it first stands at 10"]),
    ({**ROW, "answer": "Bob", "start": "x"}, ["does not stand at character x"]),
    ({**ROW, "answer": 5}, ["an answer is 5"]),
    ({**ROW, "question": " ", "answer": "Bob"}, ["row 1: the question is empty"]),
    ({**ROW, "context": "", "answer": "Bob"}, ["row 1: the context is empty"]),
    ({"question": "Who?", "answer": "Bob"}, ["usual name for the context", "--context COLUMN"]),
]


@pytest.mark.parametrize(("row", "parts"), BAD, ids=[parts[0][:30] for _, parts in BAD])
def test_rows_that_cannot_be_used_are_named(row, parts):
    with pytest.raises(DataError) as caught:
        load_questions(in_memory([row]))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_files_that_cannot_be_used_are_named(tmp_path):
    for text, part in (("{", "not valid JSON"), ('{"x": 1}', "as SQuAD is"), ('{"data": [{}]}', "'paragraphs'")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=part):
            load_questions(tmp_path / "a.json")
    with pytest.raises(DataError, match="row 1: 'no question' is not a question up to"):
        make_questions(["no question"])


# ---------------------------------------------------------------- windows


def test_windows_overlap_and_hold_every_token_of_the_context(typed, data):
    task = Answer.of(data, typed)
    found = task.examples(data.train, typed.tokenizer, truncate=False)
    seen = {}
    for k, owner in enumerate(found.owners):
        assert len(found.ids[k]) <= 24
        assert [found.types[k][place] for place in found.reads[k][1:]] == [1] * (len(found.reads[k]) - 1)
        seen.setdefault(owner, []).append(k)
    assert max(map(len, seen.values())) > 1
    for owner, own in seen.items():
        (answer,) = data.train.answers[owner]
        ends = {place for k in own for place in found.places[k][1:]}
        assert len(ends) == len(data.train.contexts[owner].split())
        held = [k for k in own if (answer.start, answer.start + len(answer.text)) in found.places[k]]
        assert held
        for k in own:
            begin, end = found.labels[k]
            if k in held:
                assert found.places[k][begin][0] == answer.start
                assert found.places[k][end][1] == answer.start + len(answer.text)
            else:
                assert (begin, end) == (0, 0)


def test_loss_and_scores_are_those_of_plain_torch(typed, data):
    task = Answer.of(data, typed)
    windows = task.examples(data.test, typed.tokenizer, truncate=False)
    task.prepare(typed.model)
    torch.manual_seed(1)
    nn.init.normal_(typed.model.qa_outputs.weight)
    try:
        batch = windows.gather(range(len(windows)))
        with torch.no_grad(), Trunk(typed.model, head="qa_outputs") as trunk:
            hidden = batch.hidden(trunk)
            loss, scores = task.loss(typed.model, hidden, batch), task.scores(typed.model, hidden, batch)
            in_passes = scores_of(typed.model, task, trunk, windows, Settings(tokens_per_pass=48))
        assert torch.allclose(scores, in_passes, atol=1e-4)
        total = 0.0
        for k in range(len(windows)):
            ids, types = torch.tensor([windows.ids[k]]), torch.tensor([windows.types[k]])
            with torch.no_grad():
                states = typed.model(ids, token_type_ids=types).last_hidden_state[0]
                begins, ends = typed.model.qa_outputs(states)[list(windows.reads[k])].log_softmax(0).T
            begin, end = windows.labels[k]
            total -= float(begins[begin] + ends[end])
            n = len(begins)
            best = max((float(begins[i] + ends[j]), i, j) for i in range(1, n) for j in range(i, min(n, i + 30)))
            assert scores[k, 1:].tolist() == pytest.approx([best[0], float(begins[0] + ends[0]), *best[1:]], rel=1e-4)
        assert float(loss) == pytest.approx(total, rel=1e-5)
        assert task.metrics(scores, windows)["loss"] == pytest.approx(total / 2 / len(windows), rel=1e-5)
    finally:
        del typed.model._modules["qa_outputs"]


def test_a_span_is_in_order_and_not_too_long():
    begins, ends = torch.tensor([[0.0, 9, 0, 0, 5]]), torch.tensor([[7.0, 0, 0, 8, 0]])
    best, at = best_spans(begins, ends, longest=3)
    assert (float(best), at.tolist()) == (17.0, [[1, 3]])
    best, at = best_spans(begins, ends, longest=2)
    assert float(best) == 9.0


# ---------------------------------------------------------------- fit and use


def test_it_learns_and_a_run_serves_predict_and_evaluate(place, data, result):
    assert result.before["f1"] < 0.4
    assert result.metrics["f1"] > 0.8
    found = lk.evaluate(place / "run", data.test)
    assert found.metrics == result.metrics and found.n_rows == len(data.test)
    assert found.f1_interval[0] <= found.metrics["f1"] <= found.f1_interval[1]
    context = f"{' '.join(OTHERS)} honey {' '.join(OTHERS)}"
    asked = ["like very? rain soup saw", ("like very?", context), {"question": "like very?", "context": "hail bean"}]
    first, second, third = lk.predict(place / "run", asked)
    assert (first.answer, first.start) == ("soup", 6)
    assert (second.answer, second.start) == ("honey", context.index("honey"))
    assert third.answer == "bean" and 0.2 < third.probability <= 1


@pytest.mark.slow
def test_it_learns_that_there_is_no_answer(place, base):
    data = load_splits(place / "two.json", read=load_questions)
    result = lk.fit(base, data, "answer", out=place / "none", **{**QUICK, "epochs": 12})
    found = lk.evaluate(place / "none", data.test)
    assert found.metrics == result.metrics
    assert min(values["f1"] for values in found.per_kind.values()) > 0.5
    assert "without an answer: F1" in str(found)
    (one,) = lk.predict(place / "none", ["like very? rain saw"])
    assert (one.answer, one.start) == ("", -1)
    assert "(no answer)" in str(one)


def test_what_cannot_be_used_is_told(place, base, data, result):
    with pytest.raises(DataError, match="row 1: it has no answer, and all training rows had one"):
        lk.evaluate(place / "run", place / "two.json")
    with pytest.raises(DataError, match="no answers to evaluate"):
        lk.evaluate(place / "run", make_questions(["like? rain"]))
    long = [(f"{'like ' * 30}?", "rain soup")]
    half = "12 are the most, half of the 24 that the base reads"
    told = f"1 of 1 questions are longer than 12 tokens, the longest in row 1 with 31; {half}"
    with pytest.raises(DataError, match=told):
        lk.predict(place / "run", long)
    both = make_questions([*long, ("like?", "rain soup")])
    with pytest.raises(BadRowsError) as refused:
        Answer.from_note(result.adapter.meta["task"]).examples(both, base.tokenizer, truncate=False)
    assert refused.value.rows[0].reason == f"the question has 31 tokens, and {half}"
    assert lk.predict(place / "run", long, truncate=True)[0].answer in ("rain", "soup", "rain soup")


def test_the_verbs(place, data, result, capsys, tmp_path, monkeypatch):
    def told(*words):
        code = main([str(word) for word in words])
        streams = capsys.readouterr()
        assert code == 0, streams.err
        return streams.out

    words = ["fit", place / "base", place / "one.json", "--task", "answer", "--out", tmp_path / "run", "--epochs", "1"]
    out = told(*words)
    assert "held-out f1" in out and "exact match" in out
    assert told("predict", place / "run", "--say", "like very? rain soup saw").endswith("%  soup\n")
    assert len(json.loads(told("predict", place / "run", place / "one.json", "--json"))) == 160
    rows = [{"question": "like very?", "context": "rain soup saw " * 20}] * 3
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as often:
        often.setattr(import_module("lorakit.cli.common"), "_PAUSE_S", 0.0)
        assert main(["predict", str(place / "run"), str(tmp_path / "long.jsonl")]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "3 of 3 rows"  # of which each has many windows
    metrics = json.loads(told("evaluate", place / "run", place / "one.json", "--json"))
    told("merge", place / "run", "--out", tmp_path / "merged")
    merged = json.loads(told("evaluate", tmp_path / "merged", place / "one.json", "--json"))
    assert merged["metrics"]["f1"] == pytest.approx(metrics["metrics"]["f1"], abs=0.03)  # bf16 meanwhile
