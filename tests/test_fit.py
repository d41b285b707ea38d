"""The fit: it learns, repeats itself, says what it was given that it cannot use, and leaves the base alone."""

import json
import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import lorakit as lk
from lorakit.attach import active
from lorakit.data import load_rows
from lorakit.errors import DataError, FitError, LorakitError, NoEffectError, PlanError, UsageError
from lorakit.fit.loop import learning_rate
from lorakit.fit.settings import Settings, make_settings
from lorakit.method import METHODS
from lorakit.tasks.base import load_base
from lorakit.tasks.task import task_of
from tiny_text import small_task, tiny_bert

place, base, data = small_task(180)


RATES = {"ia3": 5e-2, "fourier": 5e-2, "vera": 5e-2, "randlora": 5e-3}  # of those far from 1e-2
QUICK = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3}


@pytest.mark.slow
def test_it_learns_and_leaves_the_base_as_it_was(base, data):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in base.model.named_parameters()}
    result = lk.fit(base, data, **QUICK)
    assert result.before["accuracy"] <= 0.5
    assert result.metrics["accuracy"] >= 0.8  # of 18 rows
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert flags == {name: p.requires_grad for name, p in base.model.named_parameters()}


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(base, data):
    short = {**QUICK, "epochs": 2}
    first, again = lk.fit(base, data, **short), lk.fit(base, data, **short)
    assert first.adapter == again.adapter
    assert first.metrics == again.metrics
    assert lk.fit(base, data, **{**short, "seed": 1}).adapter != first.adapter


@pytest.mark.slow
def test_the_run_directory_has_everything_and_serves_predict_and_evaluate(place, base, data):
    out = place / "run"
    result = lk.fit(base, data, out=out, **QUICK)
    for name in ("plan.toml", "adapter", "records.jsonl", "curve.png", "summary.json"):
        assert (out / name).exists(), name
    assert not (out / "checkpoint").exists()
    assert lk.Plan.load(out / "plan.toml").layers
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "valid" for record in records) == result.summary["epochs"]
    assert json.loads((out / "summary.json").read_text())["test"] == result.metrics
    found = lk.evaluate(out, data.test)
    assert found.metrics["accuracy"] == result.metrics["accuracy"]
    guesses = lk.predict(out, ["i like rain and snow", "i like soup and rice"])
    assert [guess.label for guess in guesses] == ["weather", "food"]
    seen = []
    lk.predict(out, ["i like rain and snow", "i like soup and rice"], watch=lambda *done: seen.append(done))
    assert seen[-1] == (2, 2)
    assert sum(guesses[0].probabilities.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_the_adapter_of_a_run_gives_the_same_logits_in_peft(place, base, data):
    from peft import PeftModel

    from lorakit.fit.use import open_run
    from lorakit.trunk import Trunk

    out = place / "for_peft"
    lk.fit(base, data, out=out, **QUICK)
    adapter, task = open_run(out)
    tokens = task.examples(data.test, base.tokenizer, truncate=False)
    batch = tokens.gather(range(len(tokens)))
    ours = load_base(str(place / "base"))
    task.prepare(ours.model)
    lk.attach(ours.model, adapter)
    theirs = load_base(str(place / "base"))
    task.prepare(theirs.model)
    peft_model = PeftModel.from_pretrained(theirs.model, str(out / "adapter")).eval()
    ids, mask = batch.segments.padded(batch.ids, tokens.pad)
    with torch.no_grad(), Trunk(ours.model, head="classifier") as trunk:
        expected = task.scores(ours.model, trunk.hidden(batch.ids, batch.segments, batch.reads), batch)
        hidden = peft_model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        pool = hidden[:, 0] if task.pool == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        found = peft_model.base_model.model.classifier(pool)
    assert float((expected - found).abs().max()) < 1e-5  # fp32, another order of the same sums
    assert float(expected.std()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_fits(base, data, method):
    plan = lk.plan(base.model, method=method, rank=4)
    result = lk.fit(base, data, plan=plan, **{**QUICK, "learning_rate": RATES.get(method, 1e-2), "epochs": 8})
    assert result.metrics["accuracy"] > 0.6


@pytest.mark.slow
def test_biases_and_an_unfrozen_base_are_carried_by_the_adapter(place, base, data):
    plan = lk.plan(base.model, rank=2, bias="all", trained=("encoder.layer.1",))
    result = lk.fit(base, data, plan=plan, out=place / "wide", **QUICK)
    assert "encoder.layer.1.output.dense.weight" in result.adapter.trained
    assert "encoder.layer.0.output.dense.bias" in result.adapter.trained
    assert lk.evaluate(place / "wide", data.test).metrics == result.metrics


@pytest.mark.slow
def test_the_whole_base_can_learn_beside_its_low_rank_updates(place, base, data):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    plan = lk.plan(base.model, rank=2, trained=("*",))
    result = lk.fit(base, data, plan=plan, out=place / "all", **{**QUICK, "learning_rate": 2e-3})
    moved = [n for n, tensor in result.adapter.trained.items() if n in before and not torch.equal(tensor, before[n])]
    assert {"embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"} <= set(moved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert lk.evaluate(place / "all", data.test).metrics == result.metrics


def test_freezing_by_blocks_trains_only_the_others(base, data):
    plan = lk.plan(base.model, rank=2, blocks="last 1")
    result = lk.fit(base, data, plan=plan, **{**QUICK, "epochs": 1})
    assert all(path.startswith("encoder.layer.1.") for path in result.adapter.layers)


def test_a_layer_that_does_not_reach_the_loss_is_refused(base, data):
    trunk = base.model
    trunk.unused = torch.nn.Linear(32, 32)
    try:
        with pytest.raises(NoEffectError, match="'unused'"):
            lk.fit(base, data, plan=lk.plan(trunk, layers=["unused"], rank=2), **QUICK)
    finally:
        del trunk.unused
    assert not hasattr(trunk, "classifier")


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(base, data):
    texts = ("unheard", *data.train.texts[1:])  # the only word that the vocabulary does not have
    broken = replace(data, train=replace(data.train, texts=texts))
    row = base.model.embeddings.word_embeddings.weight.data[base.tokenizer.unk_token_id]
    before = row.clone()
    row.fill_(float("nan"))
    try:
        with pytest.raises(FitError, match=f"row {data.train.lines[0]} alone at step .*; the weight '.*word_emb"):
            lk.fit(base, broken, **QUICK)
    finally:
        row.copy_(before)


def test_the_schedule_warms_up_and_ends_at_zero():
    settings = Settings(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(x >= y for x, y in pairwise(rates[10:]))


def test_settings_name_every_fault():
    with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
        make_settings({"learning_rat": 1e-3})
    with pytest.raises(UsageError) as caught:
        make_settings({"epochs": "three", "clip": True})
    assert "epochs" in str(caught.value)
    assert "clip" in str(caught.value)
    with pytest.raises(UsageError, match="at least 1"):
        make_settings({"batch_size": 0})
    assert make_settings({"learning_rate": 1}).learning_rate == 1.0


def test_texts_longer_than_the_model_are_refused_unless_cut(place, base, data):
    texts = ("i like rain " * 30, *data.train.texts[1:])
    long = replace(data, train=replace(data.train, texts=texts))
    with pytest.raises(DataError, match=r"1 of \d+ texts are longer than 24 tokens.*--truncate"):
        lk.fit(base, long, **QUICK)
    lk.fit(base, long, truncate=True, **{**QUICK, "epochs": 1})


def test_a_used_run_directory_is_not_overwritten_unasked(place, base, data):
    out = place / "used"
    quick = {**QUICK, "epochs": 1}
    lk.fit(base, data, out=out, **quick)
    with pytest.raises(UsageError, match="not empty"):
        lk.fit(base, data, out=out, **quick)
    with pytest.raises(
        UsageError, match="holds a finished run; there is nothing to resume; replace it with --overwrite"
    ):
        lk.fit(base, data, out=out, resume=True, **quick)
    lk.fit(base, data, out=out, overwrite=True, **quick)
    foreign = place / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no run"):
        lk.fit(base, data, out=foreign, overwrite=True, **quick)
    assert (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="it holds no run of lorakit; name another directory"):
        lk.fit(base, data, out=foreign, **quick)


def test_evaluating_an_unknown_label_names_the_row(place, base, data):
    out = place / "labels"
    lk.fit(base, data, out=out, **{**QUICK, "epochs": 1})
    rows = replace(data.test, labels=("music", *data.test.labels[1:]))
    with pytest.raises(DataError, match="label 'music' was not in the training data"):
        lk.evaluate(out, rows)
    with pytest.raises(DataError, match="empty"):
        lk.predict(out, ["  "])


def test_an_adapter_for_another_base_is_refused(place, base, data):
    out = place / "other"
    lk.fit(base, data, out=out, **{**QUICK, "epochs": 1})
    stranger = load_base(str(tiny_bert(place / "stranger", seed=5)))
    with pytest.raises(LorakitError, match="other weights"):
        lk.predict(out, ["i like rain"], base=stranger)


def test_a_plan_that_does_not_fit_says_every_fault(base, data):
    plan = lk.Plan({"encoder.layer.7.output.dense": lk.plan(base.model, rank=2).layers["encoder.layer.0.output.dense"]})
    with pytest.raises(PlanError, match=r"no layer 'encoder.layer.7.output.dense'"):
        lk.fit(base, data, plan=plan, **QUICK)


@pytest.mark.slow
def test_a_loss_that_rises_and_too_many_threads_are_noted(base, data):
    found = lk.fit(base, data, **{**QUICK, "epochs": 3, "learning_rate": 1.0}).summary["notes"]
    assert len(found) == 2
    assert "the training loss rose from" in found[0]
    assert "learning rate 1 may be too high" in found[0]
    assert "it did not help there" in found[1]
    assert lk.fit(base, data, **{**QUICK, "epochs": 3}).summary["notes"] == []
    found = lk.fit(base, data, **{**QUICK, "epochs": 1, "learning_rate": 1e-30}).summary["notes"]
    assert found == ["the held-out loss is what it was: nothing was learned; a higher learning rate may"]
    found = lk.fit(base, data, **{**QUICK, "epochs": 1, "threads": 64}).summary["notes"]
    assert len(found) == 1
    assert found[0].startswith("64 threads share")


def test_what_is_no_base_no_data_or_no_setting_is_refused(base, data):
    for model, rows, words in (
        (3, data, "the model is 3; give the name"),
        (base.model, data, "takes a Base, not a bare BertModel"),
        (base, None, "the data is NoneType None; give a file"),
        (base, 3.5, r"the data is float 3\.5; give a file"),
    ):
        with pytest.raises(UsageError, match=words):
            lk.fit(model, rows, **QUICK)
    with pytest.raises(UsageError, match=r"unknown setting 'lr'; it is called 'learning_rate'"):
        lk.fit(base, data, lr=0.1)
    with pytest.raises(UsageError, match=r"unknown setting 'rank'; it belongs to the plan: plan=lorakit\.plan"):
        lk.fit(base, data, rank=4)


def test_rows_can_come_from_parquet(place, base):
    import pyarrow
    import pyarrow.parquet

    rows = load_rows(place / "data.csv")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows.texts, "label": rows.labels}), place / "data.parquet")
    result = lk.fit(base, place / "data.parquet", **{**QUICK, "epochs": 1})
    assert result.summary["rows"]["train"] == 144
    assert result.summary["learned_parameters"] == result.adapter.n_parameters


@pytest.mark.slow
def test_a_cached_prefix_gives_the_run_without_one(place, base, data):
    plan = lk.plan(base.model, rank=2, blocks="last 1")
    plain = lk.fit(base, data, plan=plan, prefix="off", **{**QUICK, "epochs": 3, "dtype": "fp32"})
    assert plain.summary["prefix"] == "off"
    for where in ("memory", "file"):
        cached = lk.fit(
            base, data, plan=plan, prefix=where, out=place / f"pre_{where}", **QUICK | {"epochs": 3, "dtype": "fp32"}
        )
        assert cached.summary["prefix"].startswith("1 of 2 blocks")
        assert not list((place / f"pre_{where}").glob("prefix_*"))
        losses = [[r["loss"] for r in run.records] for run in (plain, cached)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_prefix_that_finds_no_room_is_left_out_and_said(place, base, data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    plan = lk.plan(base.model, rank=2, blocks="last 1")
    run = lk.fit(base, data, plan=plan, prefix="file", out=place / "full", **{**QUICK, "epochs": 2})
    assert "No space left" in run.summary["prefix"]
    assert not list((place / "full").glob("prefix_*"))


@pytest.mark.slow
def test_passes_of_any_size_make_the_same_step(base, data):
    runs = [lk.fit(base, data, tokens_per_pass=n, **{**QUICK, "epochs": 2, "dtype": "fp32"}) for n in (1, 20, 4096)]
    losses = [[r["loss"] for r in run.records] for run in runs]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [{"ema": 0.9}, {"lora_plus": 4.0}, {"schedule": "linear"}, {"schedule": "constant"}]
)
def test_other_ways_to_learn_learn(base, data, setting):
    found = lk.fit(base, data, **QUICK, **setting)
    assert found.metrics["accuracy"] > 0.6


def test_a_base_that_is_consumed_gives_the_same_run_and_keeps_half_precision(place, data):
    settings = {**QUICK, "epochs": 2, "dtype": "bf16"}
    kept, consumed = load_base(str(place / "base")), load_base(str(place / "base"))
    one = lk.fit(kept, data, **settings)
    other = lk.fit(consumed, data, consume=True, **settings)
    assert one.adapter == other.adapter
    assert one.summary["base_bytes"] == other.summary["base_bytes"]
    assert one.summary["base_parameters"] == sum(p.numel() for p in kept.model.parameters())
    assert {p.dtype for p in kept.model.parameters()} == {torch.float32}
    assert {p.dtype for p in consumed.model.parameters()} == {torch.bfloat16}


def test_a_seed_must_be_one():
    with pytest.raises(UsageError, match="seed is 9223372036854775808; it must be 0 to 2147483647"):
        make_settings({"seed": 2**63})


def test_a_base_that_has_an_adapter_on_is_not_fitted_and_used_as_it_is(base, data, tmp_path):
    opened = lk.fit(base, data, max_steps=2, **{**QUICK, "epochs": 1})
    opened = opened.adapter, task_of(opened.adapter.meta["task"])
    lk.attach(base.model, lk.plan(base.model, rank=2), name="law", trainable=False)
    try:
        with pytest.raises(UsageError, match=r"has adapters attached already \(law\); detach them, or merge them"):
            lk.fit(base, data, out=tmp_path / "run", max_steps=2)
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
        found = lk.predict(opened, ["i like rain"], base=base)
        assert active(base.model) == ("law",)
    finally:
        lk.detach(base.model)
    with torch.inference_mode():
        assert lk.predict(opened, ["i like rain"], base=base) == found
