"""The memory of a run: told before it starts, near what it takes; where it is short, passes are small."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import lorakit as lk
from lorakit.errors import FitError
from lorakit.fit import budget as budget_module
from lorakit.fit.budget import Line, _peak
from tiny_text import small_task

place, base, data = small_task(120, max_length=64)


QUICK = {"epochs": 1, "batch_size": 32, "learning_rate": 5e-3, "dtype": "fp32"}


def test_what_is_alive_is_counted_until_it_is_gone():
    x = torch.zeros(1000)  # there before

    def run():
        a = x + 1  # 4000 bytes
        b = a.view(10, 100)[2:] * 2  # 3200 more; a view is nothing new
        del a, b
        c = torch.cat([x, x])  # 8000, the others are gone
        c += 1

    assert _peak(run) == 8000


def test_what_the_backward_needs_is_counted():
    x = torch.zeros(1000, requires_grad=True)
    x.grad = torch.zeros(1000)

    def run():
        x.exp().exp().sum().backward()  # each exp keeps its result, the backward holds one gradient or two beside

    assert 8000 < _peak(run) <= 8000 + 3 * 4000 + 16


def test_a_line_goes_through_both_counts_and_never_falls():
    line = Line.through((100, 1500), (400, 4500))
    assert (line.fixed, line.each) == (500, 10)
    assert Line.through((400, 4000), (500, 4500)) == Line(0, 9)  # too near
    assert Line.through((100, 1000), (400, 4800)) == Line(0, 12)  # convex: nothing is fixed


def with_free(monkeypatch, n_bytes):
    monkeypatch.setattr(budget_module, "available_memory", lambda *_: n_bytes)


def lives(monkeypatch):
    """Peaks of what is alive in every pass of training, and its tokens."""
    from lorakit.fit.learner import Learner

    seen, inner = [], Learner.loss

    def loss(self, batch, tokens):
        seen.append(batch.n_tokens)
        return inner(self, batch, tokens)

    monkeypatch.setattr(Learner, "loss", loss)
    return seen


@pytest.mark.slow
def test_little_memory_makes_small_passes_and_the_same_steps(base, data, monkeypatch):
    ample = lk.fit(base, data, **QUICK)
    assert ample.summary["memory"]["tokens_per_pass"] == 4096
    each = _bytes_of_a_token(ample.summary["memory"], base, data)
    seen = lives(monkeypatch)
    with_free(monkeypatch, int((budget_module._BESIDE + 60 * each) / 0.8))
    short = lk.fit(base, data, **QUICK)
    most = short.summary["memory"]["tokens_per_pass"]
    assert 13 <= most < 100
    assert short.summary["settled"]["tokens_per_pass"] == most
    assert max(seen[3:]) <= most  # after the trials
    added = [run.summary["memory"]["estimated_bytes"] - run.summary["memory"]["start_bytes"] for run in (ample, short)]
    assert added[1] < added[0]
    losses = [[r["loss"] for r in run.records] for run in (ample, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _bytes_of_a_token(memory, base, data):
    tokens = [len(base.tokenizer(text)["input_ids"]) for text in data.train.texts]
    added = memory["estimated_bytes"] - memory["start_bytes"] - budget_module._BESIDE
    return added / (QUICK["batch_size"] * sum(tokens) / len(tokens))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit and the count of addresses are Linux's; runs there")
def test_a_limit_of_the_process_counts_as_what_is_free():
    script = (
        "import resource, sys, torch; from lorakit.trunk.memory import available_memory\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (50 << 20),) * 2)\n"
        "print(available_memory())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 40 << 20 < int(done.stdout) <= 50 << 20


def test_passes_that_do_not_fit_are_refused(base, data, monkeypatch):
    told = lk.fit(base, data, tokens_per_pass=512, **QUICK).summary["memory"]
    needed = told["estimated_bytes"] - told["start_bytes"]
    monkeypatch.setattr(budget_module, "available_memory", lambda *_: needed - (1 << 20))
    with pytest.raises(FitError, match=r"passes of 512 tokens need \d+ MiB, and \d+ MiB are free; leave --tokens-per"):
        lk.fit(base, data, tokens_per_pass=512, **QUICK)
    monkeypatch.setattr(budget_module.Budget, "tokens_per_pass", lambda _: 512)  # as settled when more was free
    with pytest.raises(FitError, match=r"are free; lower them with --tokens-per-pass, or free memory"):
        lk.fit(base, data, **QUICK)


def test_a_text_that_does_not_fit_is_refused_before_anything_is_trained(base, data, monkeypatch):
    texts = ("i like rain " * 20, *data.train.texts[1:])
    long = replace(data, train=replace(data.train, texts=texts))
    seen = lives(monkeypatch)
    with_free(monkeypatch, budget_module._BESIDE)
    wanted = rf"row {data.train.lines[0]} with 62 tokens needs \d+ MiB .* 64 MiB are free.*--truncate"
    with pytest.raises(FitError, match=wanted):
        lk.fit(base, long, **QUICK)
    assert len(seen) == 1  # the trial of a few short texts
    assert not hasattr(base.model, "classifier")


def test_a_watcher_is_told_before_the_first_step(base, data):
    seen = []
    result = lk.fit(base, data, watch=lambda record, total: seen.append(record), **QUICK)
    assert [record.kind for record in seen[:2]] == ["start", "step"]
    told = seen[0].values
    assert told["estimated_bytes"] > told["start_bytes"] > 0
    assert told.pop("seen").startswith("[CLS] i like")
    assert result.summary["memory"] == {**told, "peak_bytes": result.summary["memory"]["peak_bytes"]}
    assert all(record["kind"] != "start" for record in result.records)


CHILD = """
import json, random, sys
import torch
from transformers import BertConfig, BertModel
import lorakit as lk
from lorakit.data.rows import Rows, split
from lorakit.tasks.base import Base, load_base
from lorakit.fit import budget
torch.set_num_threads(1)
if int(sys.argv[2]):
    budget.available_memory = lambda *_: int(sys.argv[2]) << 20
tokenizer = load_base(sys.argv[1]).tokenizer
torch.manual_seed(0)
model = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                             num_attention_heads=8), add_pooling_layer=False).eval()
draw = random.Random(0)
words = [word for word in tokenizer.get_vocab() if word.isalpha()]
texts = tuple(" ".join(draw.choices(words, k=draw.randint(20, 100))) for _ in range(400))
rows = Rows(texts, tuple(str(k % 2) for k in range(400)), "texts", tuple(range(400)))
run = lk.fit(Base(model, tokenizer, "bert", "mean", 512), split(rows), epochs=2, batch_size=64, learning_rate=1e-3,
             dtype="fp32")
print(json.dumps(run.summary["memory"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 160])  # MiB; 0: what there is
def test_the_estimate_is_near_the_measured_peak(place, free):
    """In a process of its own; benchmarks/memory.py has the models of real size."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(place / "base"), str(free)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["estimated_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.25)
    grown = memory["peak_bytes"] - memory["start_bytes"]
    if free:
        assert grown < free << 20
        assert memory["tokens_per_pass"] < 4096
    else:
        assert grown > 200 << 20
