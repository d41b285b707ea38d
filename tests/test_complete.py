"""Raw text end to end: every token once, losses by plain torch, intervals, continuations, resume, the command line."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import lorakit as lk
from lorakit.cli import main
from lorakit.data import Documents, Splits, load_documents
from lorakit.errors import DataError, LorakitError, UsageError
from lorakit.fit.talk import Talk
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.complete import Complete, windows
from lorakit.tasks.task import task_of
from lorakit.trunk import Trunk
from tiny_chat import causal, tiny_causal, tokenizer
from tiny_text import WORDS

QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 1e-2}


def documents(n, seed=0):
    """ "rain is weather and saw is tools and ...": what follows "is" can be learned."""
    draw = random.Random(seed)
    topics = list(WORDS)

    def one():
        return " and ".join(
            f"{draw.choice(WORDS[topic])} is {topic}" for topic in draw.choices(topics, k=draw.randint(2, 30))
        )

    return Documents(tuple(one() for _ in range(n)), "here", tuple(range(1, n + 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    tiny_causal(folder / "base", "llama", bos=True)
    (folder / "data.txt").write_text("\n<|endoftext|>\n".join(documents(80).texts) + "\n")
    assert main(fit_words(folder, folder / "run")) == 0
    return folder


def fit_words(folder, out, *more):
    words = ["fit", folder / "base", folder / "data.txt", "--task", "complete", "--out", out, "--epochs", 16]
    return [str(word) for word in (*words, "--learning-rate", 0.01, "--window", 32, "--batch-size", 16, *more)]


@pytest.mark.parametrize("overlap", [0, 1, 5])
@pytest.mark.parametrize("head", [(), (7,)], ids=["", "bos"])
@pytest.mark.parametrize("n", [1, 8, 9, 10, 40])
def test_every_token_is_learned_once_from_those_before_it(n, head, overlap):
    tokens = list(range(100, 100 + n))
    found = list(windows(tokens, 7, head, 12, overlap))
    assert [label for window in found for label in window.labels] == tokens
    for number, window in enumerate(found):
        assert len(window.ids) <= 12
        assert len(window.ids) == window.seen + len(window.labels)
        for given, label in zip(window.ids[window.seen :], window.labels):
            assert given == (label - 1 if label > 100 else 7)
        if number:
            assert window.ids[: len(head)] == head
            assert window.seen == len(head) + overlap
            assert window.ids[len(head)] == window.labels[0] - 1 - overlap


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("overlap", [0, 6])
@pytest.mark.parametrize("bos", [False, True])
def test_losses_and_bits_are_those_of_plain_torch(name, overlap, bos):
    rows = documents(12)
    base = Base(causal(name), tokenizer(bos=bos), name, "last", 64)
    goal = Complete.of(Splits(rows, rows, rows), base).chosen({"window": 32, "overlap": overlap})
    tokens = goal.examples(rows, base.tokenizer, truncate=False)
    batch = tokens.gather(range(len(tokens)))
    with torch.no_grad(), Trunk(base.model, pad=tokens.pad) as trunk:
        hidden = batch.hidden(trunk)
        loss, scores = goal.loss(base.model, hidden, batch), goal.scores(base.model, hidden, batch)
    nats = count = right = 0
    for text in rows.texts:
        ids = [*base.tokenizer(text, add_special_tokens=False)["input_ids"], 3]
        x = [2 if bos else 3, *ids]
        done = 0
        while done < len(ids):
            lead = [2] if bos and done else []
            begin = max(0, done - overlap) if done else 0
            end = min(len(ids), begin + 32 - len(lead))
            with torch.no_grad():
                logits = base.model(torch.tensor([lead + x[begin:end]])).logits[0].float()[-(end - done) :]
            wanted = torch.tensor(ids[done:end])
            nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            count, done = count + end - done, end
    metrics = goal.metrics(scores, tokens)
    assert float(loss) == pytest.approx(nats, rel=1e-4)
    assert metrics["loss"] == pytest.approx(nats / count, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-3)
    assert metrics["token_accuracy"] == pytest.approx(right / count, abs=2 / count)  # ties
    assert metrics["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in rows.texts)
    )


def test_a_stretch_that_goes_on_does_not_learn_to_end():
    rows = documents(3)
    goal = Complete(64, True, 64)
    tokens = goal.examples(Documents(rows.texts, "x", (1, 2, 3), frozenset({1, 3})), tokenizer(), truncate=False)
    last = {line: labels[-1] for line, labels in zip(tokens.lines, tokens.labels)}
    assert [last[line] == 3 for line in (1, 2, 3)] == [False, True, False]


def test_fit_learns_and_the_run_serves_evaluate_and_predict(place, capsys):
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert (summary["task"], summary["window"], summary["overlap"]) == ("complete", 32, 0)
    assert summary["test"]["loss"] < 2 < 4 < summary["before"]["loss"]
    assert summary["test"].keys() == {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    assert summary["example"].keys() == {"prompt", "answer", "expected"}
    assert "goes on" in "".join(word for word, _ in Complete.told(summary))
    text = "rain is weather and saw is"
    (found,) = lk.predict(place / "run", [text], max_new_tokens=4)
    assert found.text == text
    assert found.continuation.startswith(" tools")
    assert str(found) == text + found.continuation
    capsys.readouterr()
    words = ["predict", str(place / "run"), "--say", text, "--max-new-tokens", "4"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert out.out == f"{found}\n"
    assert "--max-new-tokens N moves it" in out.err
    draw = [lk.predict(place / "run", [text] * 2, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    long = "rain is weather and " * 30
    with pytest.raises(DataError, match="longer than 63 tokens"):
        lk.predict(place / "run", [long])
    assert len(lk.predict(place / "run", [long], truncate=True, max_new_tokens=3)[0].continuation.split()) <= 3
    assert lk.predict(place / "run", [""], max_new_tokens=2)[0].text == ""


def test_intervals_are_over_documents_or_over_windows_of_few(place, capsys):
    found = lk.evaluate(place / "run", place / "data.txt")
    assert "over documents" in found.kind
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = found.intervals[name]
        assert low < found.metrics[name] < high
    rows = load_documents(place / "data.txt")
    assert (found.n_rows, found.n_tokens) == (80, sum(len(text.split()) + 1 for text in rows.texts) + 80)
    few = lk.evaluate(place / "run", rows.take(range(4)))
    assert "over windows" in few.kind
    assert "bits_per_byte" not in few.intervals
    assert few.intervals["loss"][0] < few.metrics["loss"] < few.intervals["loss"][1]
    assert main(["evaluate", str(place / "run"), str(place / "data.txt")]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_the_interval_of_the_loss_is_that_of_resampled_documents(place):
    rows = load_documents(place / "data.txt")
    found = lk.evaluate(place / "run", rows)
    each = [lk.evaluate(place / "run", rows.take([i])) for i in range(0, len(rows), 4)]
    nats, count = ([one.metrics["loss"] * one.n_tokens for one in each], [one.n_tokens for one in each])
    draw = random.Random(0)
    means = []
    for _ in range(500):
        picked = draw.choices(range(len(each)), k=len(rows))
        means.append(sum(nats[i] for i in picked) / sum(count[i] for i in picked))
    spread = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).diff()
    low, high = found.intervals["loss"]
    assert high - low == pytest.approx(float(spread), rel=0.6)  # of a quarter of the documents


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_the_uninterrupted_one(place):
    def stop(record, total):
        if record.kind == "step" and record.step == 20:
            raise KeyboardInterrupt

    settings = {**QUICK, "epochs": 3, "window": 24, "overlap": 4}
    data = place / "data.txt"
    whole = lk.fit(str(place / "base"), data, "complete", out=place / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(str(place / "base"), data, "complete", out=place / "broken", watch=stop, **settings)
    resumed = lk.fit(str(place / "base"), data, "complete", out=place / "broken", resume=True, **settings)
    assert resumed.adapter == whole.adapter
    assert resumed.metrics == whole.metrics


def test_a_merged_model_and_peft_say_the_same(place, tmp_path):
    from peft import PeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(place / "run"), "--out", str(tmp_path / "merged")]) == 0
    text = "rain is weather and saw is"
    assert lk.predict(tmp_path / "merged", [text], max_new_tokens=4) == lk.predict(
        place / "run", [text], max_new_tokens=4
    )
    theirs = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    theirs = PeftModelForCausalLM.from_pretrained(theirs, str(place / "run" / "adapter")).eval()
    ours = load_base(str(place / "base"), head="causal").model
    lk.attach(ours, lk.load(place / "run" / "adapter"))
    ids = torch.tensor([[2, 7, 9, 11, 13]])
    with torch.no_grad():
        assert float((theirs(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max()) < 1e-4


def test_rows_in_memory_and_a_single_text_are_learned_from(place):
    base = load_base(str(place / "base"), head="causal")
    rows = [{"text": text} for text in documents(40).texts]
    assert lk.fit(base, rows, "complete", **{**QUICK, "epochs": 1}).metrics["loss"] > 0
    (place / "one.txt").write_text("\n".join(documents(200).texts))
    result = lk.fit(base, place / "one.txt", "complete", **{**QUICK, "epochs": 1})
    assert result.summary["rows"]["test"] == result.summary["rows"]["valid"] > 0


def test_what_makes_no_sense_is_refused(place):
    base, data = str(place / "base"), place / "data.txt"
    with pytest.raises(UsageError, match="window is 65; it must be from 4 to 64"):
        lk.fit(base, data, "complete", window=65)
    with pytest.raises(UsageError, match="overlap is 61; it must be from 0 to 60"):
        lk.fit(base, data, "complete", window=64, overlap=61)
    with pytest.raises(DataError, match="row 2: the tokenizer finds no token in it"):
        Complete(64, True, 64).examples(Documents(("rain", " \t"), "x", (1, 2)), tokenizer(), truncate=False)
    mute = tokenizer()
    mute.eos_token = None
    with pytest.raises(LorakitError, match="no end-of-text token"):
        Complete(64, True, 64).examples(documents(2), mute, truncate=False)
    with pytest.raises(UsageError, match="'run' was fitted to complete, which does not talk"):
        Talk({"run": place / "run"})
    assert main(["chat", str(place / "run")]) == 2
    with pytest.raises(UsageError, match="takes no option 'write'"):
        lk.evaluate(place / "run", data, write=True)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        lk.predict(place / "run", ["rain"], max_new_tokens=0)
    adapter = lk.load(place / "run" / "adapter")
    assert task_of(adapter.meta["task"]).note() == adapter.meta["task"]
