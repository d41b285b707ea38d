"""An adapter goes on learning: after a fit on other rows, after it was truncated, after it came from PEFT."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.cli import main
from lorakit.errors import FitError, UsageError
from lorakit.fit import use
from lorakit.moments import FILE, load_moments
from tiny_text import small_task

place, base, data = small_task(180)
QUICK = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "seed": 3}


def test_a_fit_leaves_moments_of_the_very_factors_of_its_adapter(place, base, data):
    result = lk.fit(base, data, out=place / "watched", **QUICK)
    found = load_moments(place / "watched" / FILE, lk.load(place / "watched" / "adapter"))
    assert found.keys() == result.adapter.layers.keys()
    for path, one in found.items():
        rank = result.adapter.layers[path].rank
        assert one.seen.shape == one.asked.shape == (rank, rank)
        assert float(torch.linalg.eigvalsh(one.seen.double()).min()) > -1e-6
        assert float(one.asked.trace()) > 0
    again = lk.fit(base, data, **QUICK)
    assert again.adapter == result.adapter
    small = lk.truncate(result.adapter, keep=0.3, moments=found)
    assert small.meta["truncated"]["nats"] > 0


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_what_has_no_lasting_pair_has_no_moments(method, place, base, data):
    plan = lk.plan(base.model, None if method == "ia3" else 4, method=method)
    lk.fit(base, data, plan=plan, out=place / method, **QUICK)
    assert not (place / method / FILE).exists()


def test_an_adapter_begins_where_it_ended(place, base, data):
    first = lk.fit(base, data, **QUICK)
    small = lk.truncate(first.adapter, rank=2)
    metrics = use.evaluate((small, use.task_of(first.adapter.meta["task"])), data.test, base=base)
    second = lk.fit(base, data, adapter=small, out=place / "second", **QUICK)
    assert second.before["loss"] == pytest.approx(metrics.metrics["loss"], rel=1e-4)
    assert {layer.rank for layer in second.adapter.layers.values()} == {2}
    assert second.metrics["loss"] < second.before["loss"]


def test_a_run_from_an_adapter_that_was_stopped_goes_on_from_the_same_one(place, base, data):
    first = lk.fit(base, data, **QUICK)
    small = lk.truncate(first.adapter, rank=2)
    whole = lk.fit(base, data, adapter=small, **QUICK)

    def watch(record, total):
        if record.kind == "valid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lk.fit(base, data, adapter=small, out=place / "stopped", watch=watch, **QUICK)
    with pytest.raises(FitError, match="adapter was"):
        lk.fit(base, data, adapter=first.adapter, out=place / "stopped", resume=True, **QUICK)
    again = lk.fit(base, data, adapter=small, out=place / "stopped", resume=True, **QUICK)
    assert again.adapter == whole.adapter


def test_a_head_for_other_labels_is_refused(base, data):
    first = lk.fit(base, data, **QUICK)
    rows = [{"text": "i like rain", "label": "wet"}, {"text": "i like sun", "label": "dry"}] * 20
    with pytest.raises(UsageError, match="trained for labels food, tools, weather, and the rows are for dry, wet"):
        lk.fit(base, rows, adapter=first.adapter, **QUICK)
    with pytest.raises(UsageError, match="give a plan or an adapter"):
        lk.fit(base, data, adapter=first.adapter, plan=lk.plan(base.model), **QUICK)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_truncate_and_recover_from_the_command_line(place, data, capsys):
    run, rows = place / "run", place / "data.csv"
    flags = ["--epochs", "2", "--batch-size", "8", "--lr", "0.005"]
    assert told(capsys, "fit", place / "base", rows, "--out", run, "--rank", "8", *flags)[0] == 0
    code, out, _ = told(capsys, "truncate", run, "--keep", "0.1", "--out", place / "small", "--json")
    values = json.loads(out)
    assert (code, values["nats"] > 0) == (0, True)
    code, out, _ = told(capsys, "truncate", run, "--keep", "0.1", "--by", "weights", "--out", place / "w", "--json")
    assert (code, "nats" in json.loads(out), json.loads(out)["error"] <= values["error"]) == (0, False, True)
    words = ["truncate", run, "--rank", "1", "--recover", rows, "--recover-steps", "12", "--out", place / "again"]
    code, out, err = told(capsys, *words, "--json")
    assert code == 0, err
    found = json.loads(out)["recovered"]
    assert found["test"]["loss"] < found["before"]["loss"]
    assert {layer.rank for layer in lk.load(place / "again" / "adapter").layers.values()} == {1}
    code, out, err = told(capsys, "fit", place / "base", rows, "--from", place / "small", "--out", place / "on", *flags)
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["truncate", "RUN/adapter", "--rank", "1", "--by", "loss", "--out", "OUT"], "holds no moments.safetensors"),
        (["truncate", "RUN/adapter", "--rank", "1", "--recover", "x.csv", "--out", "OUT"], "is no run of this lorakit"),
        (["truncate", "RUN", "--rank", "1", "--recover-steps", "9", "--out", "OUT"], "name the rows with --recover"),
        (["truncate", "RUN", "--rank", "1", "--keep", "0.5", "--out", "OUT"], "rank and keep are given"),
        (["fit", "BASE", "DATA", "--from", "RUN", "--rank", "4", "--out", "OUT"], "--rank would say it twice"),
        (["fit", "BASE", "DATA", "--from", "RUN", "--plan", "p", "--out", "OUT"], "--from would say it twice"),
    ],
)
def test_what_the_command_line_cannot_mean_is_said(words, reason, place, data, capsys):
    names = {"RUN": str(place / "run"), "OUT": str(place / "out"), "BASE": str(place / "base")}
    names["DATA"] = str(place / "data.csv")
    for name, path in names.items():
        words = [word.replace(name, path) if word.startswith(name) else word for word in words]
    code, _, err = told(capsys, *words)
    assert (code, reason in err) == (2, True), err
    assert not (place / "out").exists()
