"""Text classification: pooling, head, metrics, intervals, against independent computations."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorakit.data.batches import Tokens
from lorakit.data.rows import Rows
from lorakit.errors import LorakitError, UsageError
from lorakit.tasks.base import load_base
from lorakit.tasks.classify import Classify
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.pooled import mean_of_segments
from lorakit.trunk import Segments


def test_the_mean_is_taken_inside_each_text():
    hidden = torch.arange(18, dtype=torch.float32).reshape(6, 3)
    found = mean_of_segments(hidden, Segments.of([2, 1, 3]))
    assert torch.equal(found, torch.stack([hidden[:2].mean(0), hidden[2], hidden[3:].mean(0)]))


@pytest.mark.parametrize(("pool", "places"), [("cls", [0, 2]), ("last", [1, 4]), ("mean", None)])
def test_only_the_pooled_token_is_read(pool, places):
    def tokenizer(texts, **_):
        return {"input_ids": [list(range(len(text))) for text in texts]}

    tokenizer.pad_token_id = None
    rows = Rows(("ab", "abc"), ("x", "y"), "here", (2, 3))
    tokens = Classify(("x", "y"), pool).examples(rows, tokenizer, truncate=False)
    batch = tokens.gather([0, 1])
    assert batch.ids.tolist() == [0, 1, 0, 1, 2]
    assert (batch.reads.tolist() if batch.reads is not None else None) == places
    assert batch.labels.tolist() == [0, 1]


def test_metrics_equal_their_definition():
    task = Classify(("a", "b", "c"))
    logits = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 2, 0]])
    labels = torch.tensor([0, 1, 1, 1])
    tokens = Tokens(((1,),) * 4, tuple((int(k),) for k in labels), ((),) * 4, (1, 2, 3, 4), 0)
    found = task.metrics(logits, tokens)
    assert found["accuracy"] == 0.75
    # a: said 2, true 1, hit 1 -> 2/3; b: said 2, true 3, hit 2 -> 4/5; c never occurs and is never said
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


def test_the_head_begins_with_every_label_equally_probable():
    trunk = nn.Linear(2, 2)
    trunk.config = SimpleNamespace(hidden_size=5)
    Classify(("a", "b")).prepare(trunk)
    assert float(trunk.classifier.weight.detach().abs().max()) == 0
    Classify(("a", "b")).prepare(trunk)  # again: left as it is
    with pytest.raises(UsageError, match="is no head from 5 numbers to 3 outputs"):
        Classify(("a", "b", "c")).prepare(trunk)


def test_the_bootstrap_interval_has_about_the_width_of_the_normal_one():
    low, high = bootstrap([True] * 80 + [False] * 20)
    assert low < 0.8 < high
    # 2 * 1.96 * sqrt(0.8 * 0.2 / 100) = 0.157; the draws add a few per cent
    assert high - low == pytest.approx(0.157, rel=0.15)
    assert bootstrap([True] * 10) == (1.0, 1.0)


def test_a_base_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(LorakitError, match="without config.json"):
        load_base(str(tmp_path))


def test_accuracy_decides_and_the_lower_loss_between_equals():
    task = Classify(("a", "b"))
    assert task.better({"accuracy": 0.5, "loss": 1.0}, None)
    assert task.better({"accuracy": 0.5, "loss": 0.9}, {"accuracy": 0.5, "loss": 1.0})
    assert not task.better({"accuracy": 0.4, "loss": 0.1}, {"accuracy": 0.5, "loss": 1.0})
