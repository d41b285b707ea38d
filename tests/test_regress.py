"""A number for each text or pair: tables, loss and metrics against plain computations, units, use, errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import lorakit as lk
from lorakit.cli import main
from lorakit.data import Rated, Splits, load_rated, load_splits
from lorakit.data.batches import Tokens
from lorakit.errors import DataError
from lorakit.tasks.base import load_base
from lorakit.tasks.intervals import interval
from lorakit.tasks.regress import Regress, correlation, ranks
from lorakit.trunk import Trunk
from tiny_text import tiny_bert, told_topics

QUICK = {"epochs": 12, "batch_size": 16, "learning_rate": 1e-2, "threads": 1}
WORTH = {"weather": 900.0, "food": 1000.0, "tools": 1300.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The number of a pair is that of its first topic, and a tenth of its second."""
    folder = tmp_path_factory.mktemp("regress")
    tiny_bert(folder / "base")
    lines = [f"{a},{b},{WORTH[x] + WORTH[y] / 10}" for a, b, x, y in told_topics(200)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "pairs.csv", read=Regress.read)


@pytest.fixture(scope="module")
def run(place, base, data):
    result = lk.fit(base, data, "regress", out=place / "run", **QUICK)
    assert result.before["pearson"] == 0.0
    assert result.metrics["pearson"] > 0.9
    return result


def test_numbers_are_found_and_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,stars,price\nfine,4.5,1e3\npoor,-1,2\n", encoding="utf-8")
    rows = load_rated(tmp_path / "a.csv")
    assert rows.numbers == (4.5, -1.0)
    assert rows.others is None
    assert load_rated(tmp_path / "a.csv", number="price").numbers == (1000.0, 2.0)
    assert load_rated(tmp_path / "a.csv", answers=False).numbers is None
    assert "numbers -1 to 4.5, mean 1.75; first row: 'fine' -> 4.5" in rows.about()
    assert rows.digest() != rows.take([1, 0]).digest() != replace(rows, numbers=(4.5, 0.0)).digest()


@pytest.mark.parametrize("value", ['"4,5"', "high", "nan", "inf", '""'])
def test_what_is_no_number_is_named(tmp_path, value):
    (tmp_path / "a.csv").write_text(f"text,score\nx,1\ny,{value}\n", encoding="utf-8")
    with pytest.raises(DataError, match="a.csv': row 3: column 'score' is .*; it must be a number"):
        load_rated(tmp_path / "a.csv")


def test_null_truth_and_missing_columns_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": null}\n{"text": "y", "score": true}\n')
    with pytest.raises(DataError, match=r"(?s)row 1: column 'score' is empty.*row 2: column 'score' is True"):
        load_rated(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("text,price\nx,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column with a usual name for the number .*--number COLUMN"):
        load_rated(tmp_path / "b.csv")


def test_what_cannot_be_learned_is_refused(data):
    same = Rated(("a", "b"), (2.0, 2.0), "s", (1, 2))
    with pytest.raises(DataError, match="every training row has the number 2; nothing can be learned"):
        Splits(same, same, same).checked()
    with pytest.raises(DataError, match="has no numbers"):
        Splits(data.train, replace(data.valid, numbers=None), data.test).checked()


def test_correlations_and_ranks_equal_their_definition():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 40).astype(float), generator.normal(size=40)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    counted = [1 + sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]
    assert ranks(x).tolist() == counted
    rows = generator.normal(size=(3, 40))
    assert correlation(rows, rows[::-1])[0] == pytest.approx(np.corrcoef(rows[0], rows[2])[0, 1])
    assert correlation(np.full(7, 0.1), y[:7]) == 0.0


def labelled(tokens, labels):
    """The same texts with other labels."""
    return Tokens(tokens.ids, labels, tokens.reads, tokens.lines, tokens.pad)


def test_metrics_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(50, generator=generator, dtype=torch.float64)
    scores = (true + torch.randn(50, generator=generator, dtype=torch.float64)).float()
    task = Regress(mean=10.0, deviation=3.0)
    tokens = Tokens(((1,),) * 50, tuple((x,) for x in true.tolist()), ((),) * 50, tuple(range(50)), 0)
    found = task.metrics(scores[:, None], tokens)
    said, right = 3 * scores.double() + 10, 3 * true + 10
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([said, right]))[0, 1]))
    order = torch.stack([x.argsort().argsort().double() for x in (said, right)])
    assert found["spearman"] == pytest.approx(float(torch.corrcoef(order)[0, 1]))
    assert found["mae"] == pytest.approx(float((said - right).abs().mean()))
    assert found["r2"] == pytest.approx(1 - float(((said - right) ** 2).sum() / ((right - right.mean()) ** 2).sum()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.mse_loss(scores.double(), true)))
    one = task.metrics(scores[:1, None], labelled(tokens, tokens.labels[:1]))
    assert (one["pearson"], one["spearman"], one["r2"]) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_correlation_has_about_the_width_of_fishers():
    generator = np.random.default_rng(3)
    x = generator.normal(size=400)
    y = 0.8 * x + 0.6 * generator.normal(size=400)
    low, high = interval(400, lambda draws: correlation(x[draws], y[draws]))
    centre = np.arctanh(correlation(x, y))
    fisher = np.tanh(centre + 1.96 / np.sqrt(397)) - np.tanh(centre - 1.96 / np.sqrt(397))
    assert low < correlation(x, y) < high
    assert high - low == pytest.approx(fisher, rel=0.2)


def test_the_loss_is_that_of_the_padded_model(base, data):
    rows = data.train.take(range(7))
    task = Regress.of(data, base)
    task.prepare(base.model)
    try:
        weight = base.model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        tokens = task.examples(rows, base.tokenizer, truncate=False)
        batch = tokens.gather(range(7))
        with torch.no_grad(), Trunk(base.model, head=task.head, pad=tokens.pad) as trunk:
            found = float(task.loss(base.model, batch.hidden(trunk), batch))
        texts = (list(rows.texts), list(rows.others))
        padded = base.tokenizer(*texts, padding=True, return_tensors="pt", return_token_type_ids=True)
        mask = padded["attention_mask"][..., None]
        with torch.no_grad():
            state = base.model(**padded).last_hidden_state
        said = ((state * mask).sum(1) / mask.sum(1)) @ weight[0]
    finally:
        del base.model._modules[task.head]
    numbers = torch.tensor(data.train.numbers)
    wanted = (torch.tensor(rows.numbers) - numbers.mean()) / numbers.std(correction=0)
    assert found == pytest.approx(float(((said - wanted) ** 2).sum()), rel=1e-4)


def test_predictions_come_back_in_the_units_of_the_data(place, base, data, run):
    low, high = (
        lk.predict(place / "run", [pair], base=base)[0]
        for pair in (("i like rain and snow and fog", "the fog"), ("i like saw and nail and glue", "the fog"))
    )
    assert low.number == pytest.approx(900 + 100, abs=80)
    assert high.number == pytest.approx(1300 + 100, abs=80)
    assert (low.text2, run.summary["mean"]) == ("the fog", pytest.approx(np.mean(data.train.numbers)))
    told = lk.evaluate(place / "run", data.test, base=base)
    assert told.metrics == run.metrics
    bounds = told.pearson_interval
    assert bounds[0] <= told.metrics["pearson"] <= bounds[1]
    assert told.metrics["mae"] < 80
    with pytest.raises(DataError, match="has no numbers to evaluate against"):
        lk.evaluate(place / "run", replace(data.test, numbers=None), base=base)
    single = replace(data.test, numbers=None, others=None)
    with pytest.raises(DataError, match="^2 faults:\n  - '.*' has single texts, and"):
        replace(data, valid=single, test=single).checked()
    with pytest.raises(DataError, match="single texts, and pairs of texts were learned"):
        lk.predict(place / "run", ["alone"], base=base)


def test_the_command_line_fits_merges_and_serves(place, tmp_path, capsys):
    words = [
        "fit",
        place / "base",
        place / "pairs.csv",
        "--task",
        "regress",
        "--out",
        tmp_path / "run",
        "--text",
        "sentence1",
    ]
    assert main([*map(str, words), "--epochs", "4", "--learning-rate", "0.02", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "held-out pearson" in out
    assert "standard deviation" in out
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    said = []
    for name in ("run", "merged"):
        assert main(["predict", str(tmp_path / name), "--say", "i like saw and nail and glue", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)[0]["number"])
        assert main(["evaluate", str(tmp_path / name), str(place / "pairs.csv"), "--text", "sentence1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"]["pearson"] > 0.7
    assert said[0] == pytest.approx(said[1], rel=1e-3)
    assert main(["predict", str(tmp_path / "run"), "--say", "i like saw and nail"]) == 0
    assert capsys.readouterr().out.endswith("  i like saw and nail\n")
