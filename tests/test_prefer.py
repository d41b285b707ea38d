"""Preference tuning: losses and gradients against a plain padded model in float64, its forms of rows, its whole way."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.preferences import Preferences, load_preferences
from lorakit.errors import DataError, FitError, UsageError
from lorakit.fit.use import open_run
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.prefer import VARIANTS, Prefer
from lorakit.trunk import Trunk
from tiny_chat import CHATML, causal, pairs, tiny_causal, tokenizer

QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "dtype": "fp32"}


def preferences(n_rows=240):
    """The answer of `pairs`, and its words the other way round or another word in it."""
    rows = []
    for prompt, good in pairs(n_rows):
        first, _, second = good.split()
        bad = f"{second} then {first}" if first != second else f"{first} so {first} again"
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefer")
    tiny_causal(folder / "base", "llama", CHATML)
    written(folder / "data.jsonl", preferences())
    return folder


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "data.jsonl", read=load_preferences)


@pytest.fixture(scope="module")
def run(place, data):
    return lk.fit(str(place / "base"), data, "prefer", out=place / "run", beta=0.2, **QUICK)


def adapted(name, template):
    """A base with an adapter that changes much, and the same in float64."""
    base = Base(causal(name), tokenizer(template), name, "last", 64, template)
    lk.attach(base.model, lk.plan(base.model, rank=4), seed=0)
    with torch.no_grad():
        for path, parameter in base.model.named_parameters():
            if parameter.requires_grad and path.endswith(".b"):
                parameter.normal_(0, 0.3)
    return base, copy.deepcopy(base.model).double()


def plain_margin(model, pairs_, pad):
    """Log-probabilities of both answers, padded, all logits at once: `(pairs, 2)`."""
    longest = max(map(len, pairs_.ids))
    ids = torch.tensor([[*entry, *[pad] * (longest - len(entry))] for entry in pairs_.ids])
    mask = torch.tensor([[1] * len(entry) + [0] * (longest - len(entry)) for entry in pairs_.ids])
    chances = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    sums = [
        sum(chances[row, place, token] for place, token in zip(reads, labels))
        for row, (reads, labels) in enumerate(zip(pairs_.reads, pairs_.labels))
    ]
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("variant", ["sigmoid", "smoothed", "ipo"])
@pytest.mark.parametrize(("name", "template"), [("llama", CHATML), ("llama", ""), ("gemma2", "")])
def test_loss_and_gradients_are_those_of_a_plain_padded_model(data, name, template, variant):
    base, exact = adapted(name, template)
    smoothing = 0.2 if variant == "smoothed" else 0.0
    task = replace(Prefer.of(data, base), beta=0.3, label_smoothing=smoothing)
    task = replace(task, variant="ipo") if variant == "ipo" else task
    found = task.examples(data.test, base.tokenizer, truncate=False)
    with torch.no_grad(), lk.disabled(exact):
        reference = plain_margin(exact, found, 0)
    gaps = plain_margin(exact, found, 0) - reference
    counts = torch.tensor([len(own) for own in found.labels]).view(-1, 2)
    margin = 0.3 * (gaps[:, 0] - gaps[:, 1])
    wanted = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    if variant == "ipo":
        each = gaps / counts
        wanted = (each[:, 0] - each[:, 1] - 1 / 0.6) ** 2
    wanted.sum().backward()
    with Trunk(base.model, pad=found.pad) as trunk:

        @torch.no_grad()
        def scores(examples):
            batch = examples.gather(range(len(examples)))
            return task.scores(base.model, batch.hidden(trunk), batch)

        known = task.informed(base.model, found, scores)
        assert torch.allclose(known.reference.double(), reference, rtol=1e-5)
        batch = known.gather(range(len(known)))
        loss = task.loss(base.model, batch.hidden(trunk), batch)
        loss.backward()
        metrics = task.metrics(scores(known), known)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach().sum()), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(wanted.detach().mean()), rel=1e-4)
    if variant != "ipo":
        assert metrics["margin"] == pytest.approx(float(margin.detach().mean()), rel=1e-3, abs=1e-5)
        assert metrics["reward_accuracy"] == pytest.approx(float((margin > 0).double().mean()))
    gradients = {path: p.grad for path, p in exact.named_parameters() if p.requires_grad}
    assert len(gradients) > 20
    for path, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            size = float(gradients[path].abs().max())
            assert size > 0
            assert float((parameter.grad.double() - gradients[path]).abs().max()) < 1e-3 * size, path


def test_before_training_nothing_is_preferred_and_then_the_chosen_answers_are(run, place, data):
    assert run.before == {"reward_accuracy": 0.5, "margin": 0.0, "loss": pytest.approx(0.693147, abs=1e-6)}
    assert run.records[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert run.metrics["reward_accuracy"] > 0.8
    assert run.metrics["margin"] > 0.2
    assert open_run(place / "run")[1].beta == 0.2
    assert run.summary["beta"] == 0.2
    found = lk.evaluate(place / "run", data.test)
    assert found.metrics == pytest.approx(run.metrics, rel=0.02)  # perhaps in bf16
    low, high = found.reward_accuracy_interval
    assert low <= found.metrics["reward_accuracy"] <= high
    assert "reward accuracy" in str(found)


def test_a_tie_counts_half_in_the_metric_and_in_its_interval(data, place, monkeypatch):
    base = load_base(str(place / "base"), head="causal")
    goal, ten = Prefer.of(data, base), data.test.take(range(10))
    monkeypatch.setattr(Prefer, "informed", lambda self, model, pairs, scores: replace_reference(pairs))

    def replace_reference(pairs):
        pairs.reference = torch.zeros(len(pairs), 2)
        return pairs

    found = goal.evaluate(ten, base, lambda pairs: torch.ones(len(pairs), 2), truncate=False)
    assert (found.metrics["reward_accuracy"], found.reward_accuracy_interval) == (0.5, (0.5, 0.5))


def test_the_base_is_asked_once_for_each_text(place, data, monkeypatch):
    asked = []
    plain = Prefer.scores

    def counted(self, model, hidden, batch):
        if not torch.is_grad_enabled():
            asked.extend(batch.examples)
        return plain(self, model, hidden, batch)

    monkeypatch.setattr(Prefer, "scores", counted)
    base = load_base(str(place / "base"), head="causal")
    lk.fit(base, data, "prefer", **{**QUICK, "epochs": 3, "learning_rate": 1e-3, "tokens_per_pass": 512})
    held_out = 3 * len(data.valid) + 2 * len(data.test)  # evaluated: each epoch; before and after
    measured = len(asked) - len(data.train) - len(data.valid) - len(data.test) - held_out
    assert 0 <= measured <= 100  # a few passes that measure memory


def test_answers_are_written_as_generate_writes_them(run, place):
    adapter, task = open_run(place / "run")
    found = lk.predict(place / "run", ["sort rain and soup"], max_new_tokens=8)
    assert found == lk.predict((adapter, task.writer), ["sort rain and soup"], max_new_tokens=8)
    rows = load_preferences(place / "data.jsonl", answers=False).take([0, 1])
    assert [one.text for one in lk.predict(place / "run", rows, max_new_tokens=2)] == list(rows.inputs)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened_and_not_with_another_beta(run, place, data):
    def stop(record, total):
        if record.kind == "step" and record.step == 20:
            raise KeyboardInterrupt

    out, words = place / "stopped", {**QUICK, "checkpoint_steps": 4, "beta": 0.2}
    with pytest.raises(KeyboardInterrupt):
        lk.fit(str(place / "base"), data, "prefer", out=out, watch=stop, **words)
    with pytest.raises(FitError, match=r"beta was 0\.2, now 0\.4"):
        lk.fit(str(place / "base"), data, "prefer", out=out, resume=True, **{**words, "beta": 0.4})
    again = lk.fit(str(place / "base"), data, "prefer", out=out, resume=True, **words)
    assert again.adapter == run.adapter
    assert again.metrics == run.metrics


FORMS = {
    "system": [
        {"system": "be brief", "question": "sort rain", "chosen": "weather", "rejected": "food"},
    ],
    "messages": [
        {
            "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort rain"}],
            "chosen": [{"role": "assistant", "content": "weather"}],
            "rejected": [{"role": "assistant", "content": "food"}],
        }
    ],
    "implicit": [
        {
            "prompt": "sort rain",
            **{
                side: [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "sort rain"},
                    {"role": "assistant", "content": answer},
                ]
                for side, answer in (("chosen", "weather"), ("rejected", "food"))
            },
        }
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_rows_are_one(tmp_path, form):
    rows = load_preferences(written(tmp_path / "rows.jsonl", FORMS[form]))
    assert rows.inputs == ("be brief\nsort rain",)
    assert (rows.chosen, rows.rejected) == (("weather",), ("food",))
    as_json = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in FORMS[form]]
    again = load_preferences(written(tmp_path / "text.jsonl", as_json))
    assert again.digest() == rows.digest()
    asked = load_preferences(tmp_path / "rows.jsonl", answers=False)
    assert (asked.turns, asked.chosen) == (rows.turns, None)


def test_dialogues_in_one_text_are_read(tmp_path):
    talk = "\n\nHuman: sort rain\n\nAssistant: what?\n\nHuman: rain, I said: now\n\nAssistant: "
    path = written(tmp_path / "hh.jsonl", [{"chosen": f"{talk}weather", "rejected": f"{talk}food"}])
    rows = load_preferences(path)
    assert [turn.role for turn in rows.turns[0]] == ["user", "assistant", "user"]
    assert rows.turns[0][-1].content == "rain, I said: now"
    assert (rows.chosen, rows.rejected) == (("weather",), ("food",))


def test_faulty_rows_are_named(tmp_path):
    good = {"prompt": "sort rain", "chosen": "weather", "rejected": "food"}
    for fault, bad in {
        "row 2: column 'rejected' is empty": {**good, "rejected": " "},
        "row 2: the chosen and the rejected answer are the same": {**good, "rejected": "weather"},
        "row 2: column 'chosen' is None": {**good, "chosen": None},
        "row 2: the chosen and the rejected dialogue differ before": {
            "prompt": "x",
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
        },
    }.items():
        with pytest.raises(DataError, match=fault):
            load_preferences(written(tmp_path / "bad.jsonl", [good, bad]))
    path = written(tmp_path / "bad.jsonl", [{"prompt": "x", "good": "a", "bad": "b"}])
    with pytest.raises(DataError, match=r"needs a column with chosen.* prompt, good, bad: name them with --chosen"):
        load_preferences(path)
    assert load_preferences(path, chosen="good", rejected="bad").chosen == ("a",)
    with pytest.raises(DataError, match="no column with the prompt; name it with --prompt"):
        load_preferences(written(tmp_path / "bad.jsonl", [{"q": "x", "chosen": "a", "rejected": "b"}]))
    with pytest.raises(DataError, match="has no column 'qq'; did you mean 'q'"):
        load_preferences(tmp_path / "bad.jsonl", prompt="qq")


def test_both_texts_of_a_pair_are_cut_alike(data):
    base = Base(causal("llama"), tokenizer(), "llama", "last", 64)
    rows = Preferences(
        data.train.turns[:1], ("weather then food",), ("food then weather and tools again",), "here", (7,)
    )
    task = replace(Prefer.of(data, base), max_length=8)
    with pytest.raises(DataError, match=r"2 of 2 texts are longer than 8 tokens, the longest in row 7 with 12"):
        task.examples(rows, base.tokenizer, truncate=False)
    first, second = task.examples(rows, base.tokenizer, truncate=True).ids
    assert len(second) == 8
    unknown = replace(rows, chosen=("weather zzz",), rejected=("weather yyy",))
    with pytest.raises(DataError, match="'here': row 7: both answers are the same tokens to this base"):
        task.examples(unknown, base.tokenizer, truncate=True)
    assert first[:2] == second[:2]
    long = replace(task, max_length=64).examples(rows, base.tokenizer, truncate=False)
    assert first[2:] == long.ids[0][-4:]  # the short answer is whole, its end too
    assert task.examples(rows, base.tokenizer, truncate=True).reads[0][0] == 1


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"beta": 0}, "beta is 0; it must be a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"variant": "dpp"}, "one of sigmoid, ipo"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "the variant ipo knows no label_smoothing"),
    ],
)
def test_choices_without_sense_are_refused(place, data, wish, told):
    with pytest.raises(UsageError, match=told):
        lk.fit(str(place / "base"), data, "prefer", **wish)
    assert set(VARIANTS) == {"sigmoid", "ipo"}


def told(capsys, *words):
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_the_command_line_fits_predicts_evaluates_and_merges(place, capsys, tmp_path):
    words = ["fit", place / "base", place / "data.jsonl", "--task", "prefer", "--out", tmp_path / "run"]
    code, out, err = told(capsys, *words, "--epochs", "1", "--beta", "0.3", "--variant", "ipo", "--rank", "2")
    assert code == 0, err
    assert "held-out reward_accuracy" in out
    assert "50.0% ->" in out
    assert "pairs of answers; first row: 'sort" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["beta"], summary["variant"]) == (0.3, "ipo")
    code, out, err = told(capsys, "predict", tmp_path / "run", "--say", "sort rain", "--json", "--max-new-tokens", "2")
    assert code == 0, err
    assert json.loads(out)[0]["text"] == "sort rain"
    code, out, _ = told(capsys, "evaluate", tmp_path / "run", place / "data.jsonl", "--json")
    assert json.loads(out)["metrics"].keys() == {"reward_accuracy", "margin", "loss"}
    assert told(capsys, "merge", tmp_path / "run", "--out", tmp_path / "merged")[0] == 0
    assert told(capsys, "predict", tmp_path / "merged", "--say", "sort rain")[0] == 0
    code, _, err = told(capsys, "evaluate", tmp_path / "merged", place / "data.jsonl")
    assert code != 0
    assert "of a merged model the base is no longer known" in err
    code, _, err = told(capsys, "fit", place / "base", place / "data.jsonl", "--out", tmp_path / "x", "--beta", "1")
    assert code == 2
    assert "task 'classify' takes no --beta" in err
