"""Text classification: pooling, head, metrics, intervals, against independent computations."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorakit.errors import LorakitError, UsageError
from lorakit.tasks.base import load_base, pooled
from lorakit.tasks.classify import Classify, bootstrap


def test_pooling_reads_only_real_tokens():
    hidden = torch.arange(24, dtype=torch.float64).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pooled(hidden, mask, "mean")[0], hidden[0, :2].mean(0))
    assert torch.equal(pooled(hidden, mask, "cls"), hidden[:, 0])
    assert torch.equal(pooled(hidden, mask, "last"), torch.stack([hidden[0, 1], hidden[1, 3]]))


def test_last_token_pooling_works_with_left_padding():
    hidden = torch.randn(1, 4, 3)
    assert torch.equal(pooled(hidden, torch.tensor([[0, 0, 1, 1]]), "last"), hidden[:, 3])


def test_metrics_equal_their_definition():
    task = Classify(("a", "b", "c"))
    logits = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 2, 0]])
    labels = torch.tensor([0, 1, 1, 1])
    found = task.metrics(logits, labels)
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
    with pytest.raises(UsageError, match="does not give 3 labels"):
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
