"""The verbs with tables of users and items."""

import json

import pytest

from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.interactions import load_interactions
from tiny_taste import draw_taste, taste_table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    taste_table(folder / "first.csv", draw_taste())
    taste_table(folder / "second.csv", draw_taste(1, shift=1))
    taste_table(folder / "strangers.csv", draw_taste(2, users=70))
    assert main(fit_words("new:16", folder / "first.csv", folder / "run")) == 0
    assert main(["merge", str(folder / "run"), "--out", str(folder / "base")]) == 0
    return folder


def fit_words(base, data, out, *more):
    words = ["fit", str(base), str(data), "--task", "recommend", "--out", str(out), "--batch-size", "128"]
    return [*words, "--epochs", "4", *more]


def told(capsys, *words):
    """Exit code, stdout, stderr."""
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_fit_predict_evaluate_and_plan(place, capsys):
    code, out, err = told(capsys, *fit_words(place / "base", place / "second.csv", place / "two", "--rank", "4"))
    assert code == 0, err
    assert "held-out ndcg@10" in out
    assert "popular ndcg@10" in out
    assert "60 users, 80 items" in err
    code, out, err = told(capsys, "predict", place / "two", "--say", "u3", "--say", "nobody", "--k", "4")
    assert (code, err) == (0, "")
    known, unknown = out.splitlines()
    assert known.startswith("u3: i") and known.count(",") == 3
    assert unknown.endswith("(not seen in training: the popular ones)")
    code, out, _ = told(capsys, "predict", place / "two", place / "second.csv", "--json")
    assert len(json.loads(out)) == 60
    assert len(json.loads(out)[0]["items"]) == 10
    held = load_splits(place / "second.csv", read=load_interactions).test
    taste_table(place / "held.csv", [*zip(held.users, held.items, held.times)])
    code, out, _ = told(capsys, "evaluate", place / "two", place / "held.csv", "--json")
    assert code == 0
    summary = json.loads((place / "two" / "summary.json").read_text())
    assert json.loads(out)["metrics"] == pytest.approx(summary["test"])
    code, out, _ = told(capsys, "plan", place / "base", "--task", "recommend", "--rank", "2")
    assert code == 0
    assert 'trained = ["bias"]' in out and "users = {}" in out.replace('"', "")


def test_what_does_not_go_together_is_said(place, capsys, tmp_path):
    for words, said in (
        (fit_words("new:x", place / "first.csv", tmp_path / "a"), "width 'x'; write new:64"),
        (fit_words("new:8", place / "first.csv", tmp_path / "a", "--rank", "4"), "learn fully; leave rank out"),
        (fit_words("minilm", place / "first.csv", tmp_path / "a"), "no directory of tables"),
        (fit_words(place / "base", place / "strangers.csv", tmp_path / "a"), "user 'u6"),
        (fit_words(place / "base", place / "first.csv", tmp_path / "a", "--rating", "stars>=2"), "no column 'stars'"),
        (fit_words(place / "base", place / "first.csv", tmp_path / "a", "--text", "x"), "takes no --text"),
        (["plan", "new:8", "--task", "recommend"], "the users and items of its data"),
        (["predict", str(place / "run"), "--say", "u1", "--k", "0"], "k is 0"),
        (["evaluate", str(place / "run"), str(place / "first.csv")], "rows were learned from, so they prove nothing"),
    ):
        code, _, err = told(capsys, *words)
        assert code in (1, 2)
        assert said in err, (said, err)
