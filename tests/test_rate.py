"""The learning rate that a run settles for itself: the rule's numbers, the range test's choice, all else as it was."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import NotFiniteError
from lorakit.fit import run as fit_run
from lorakit.fit import settle
from lorakit.fit.rate import default_rate, pick
from tiny_text import small_task

QUICK = {"epochs": 3, "batch_size": 8}

place, base, data = small_task(180)


def rule(width=384, trained=("classifier",), **how):
    """The rule's rate for a stack of two matrices with a head."""
    model = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8), "classifier": nn.Linear(8, 2)})
    plan = (
        lk.plan(model, layers=["up", "down"], trained=trained, **{"rank": 4, **how}) if how != {"layers": ()} else None
    )
    learner = SimpleNamespace(
        trunk=SimpleNamespace(width=width), task=SimpleNamespace(head="classifier", from_scratch=False), model=model
    )
    return default_rate(learner, plan or lk.Plan({}, trained)).value


def test_the_rule_goes_by_width_and_not_by_rank():
    assert rule(384) == pytest.approx(5e-4 * (2000 / 384) ** 0.781, rel=0.01)
    assert rule(2000) == 5e-4
    assert rule(rank=1) == rule(rank=8) == rule(384)
    assert rule(1) == 2e-2  # bounded


def test_the_rule_goes_by_what_learns():
    assert rule(method="dora") == rule()
    assert rule(method="ia3") == pytest.approx(4 * rule(), rel=0.02)
    assert rule(scale="256/r") == pytest.approx(rule() / 8, rel=0.03)
    assert rule(scale=64.0) == rule(scale="256/r")  # rank 4
    assert rule(scale="1/r") == pytest.approx(4 * rule(), rel=0.02)  # bounded
    assert rule(trained=("classifier", "up.bias")) == rule()
    assert rule(trained=("up",)) == pytest.approx(rule() / 10, rel=0.02)
    assert rule(layers=(), trained=("up", "classifier")) == pytest.approx(rule() / 10, rel=0.02)
    assert rule(layers=(), trained=("classifier",)) == pytest.approx(5 * rule(), rel=0.02)
    assert rule(layers=(), trained=("up.bias", "classifier")) == pytest.approx(2 * rule(), rel=0.02)
    assert rule(method="fourier", rank=2) == pytest.approx(30 * rule(), rel=0.02)


def descent(curvature, noise=0.0, low=1e-5, high=1e1, n=50):
    """Gradient descent on `curvature x^2 / 2` with rising rates: it breaks above the rate 2 / curvature."""
    generator, x, curve = torch.Generator().manual_seed(0), 1.0, []
    for k in range(n):
        rate = low * (high / low) ** (k / (n - 1))
        curve.append((rate, 1 + min(curvature * x * x / 2, 1e6) + noise * float(torch.randn((), generator=generator))))
        x -= rate * curvature * x
    return curve


@pytest.mark.parametrize("curvature", [1.0, 10.0, 100.0])
def test_the_pick_learns_and_keeps_away_from_where_it_breaks(curvature):
    rate, why = pick(descent(curvature))
    assert 0.02 / curvature < rate < 0.7 / curvature
    assert "by trial" in why


def test_noise_moves_the_pick_little():
    clean, noisy = pick(descent(10.0))[0], pick(descent(10.0, noise=0.1))[0]
    assert 1 / 4 < noisy / clean < 4


def test_a_loss_that_never_falls_gives_no_pick():
    assert pick([(10.0**k, 0.7) for k in range(-6, 2)] * 3) is None
    assert pick([(1e-5 * 2**k, 0.7 + 0.1 * k) for k in range(20)]) is None
    assert pick([(1e-5, 0.7)]) is None


def test_a_range_test_puts_back_all_that_learns_bit_for_bit(base, data, monkeypatch):
    copies = []

    def copy(learner):
        return {name: tensor.clone() for name, tensor in learner.memory().items()}

    def watched(learner, *rest):
        copies.append(copy(learner))
        found = settle.settle(learner, *rest)
        copies.append(copy(learner))
        assert not learner.flat.gradients.any()
        return found

    monkeypatch.setattr(fit_run, "settle", watched)
    auto = lk.fit(base, data, learning_rate="auto", ema=0.9, lora_plus=2.0, **QUICK)
    before, after = copies
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    rate = auto.summary["settled"]["learning_rate"]
    by_hand = lk.fit(base, data, learning_rate=rate, ema=0.9, lora_plus=2.0, **QUICK)
    assert by_hand.adapter == auto.adapter


@pytest.mark.slow
def test_the_summary_says_which_rate_why_and_what_was_tried(place, base, data):
    lk.fit(base, data, out=place / "auto", learning_rate="auto", **QUICK)
    settled = json.loads((place / "auto" / "summary.json").read_text())["settled"]
    note = settled["notes"]["learning_rate"]
    assert note["why"].startswith("by trial")
    rates = [rate for rate, _ in note["tried"]]
    assert rates == sorted(rates)
    assert rates[0] < settled["learning_rate"] < rates[-1]
    assert len(rates) <= 30
    settled = lk.fit(base, data, **QUICK).summary["settled"]
    assert settled["notes"]["learning_rate"] == {"why": "by rule: width 32", "tried": []}
    assert "learning_rate" not in lk.fit(base, data, learning_rate=1e-3, **QUICK).summary["settled"]


@pytest.mark.slow
def test_a_larger_scale_is_given_a_lower_rate(base, data):
    found = [
        lk.fit(base, data, learning_rate="auto", plan=lk.plan(base.model, scale=scale), **QUICK).summary["settled"]
        for scale in ("16/r", "512/r")
    ]
    assert found[1]["learning_rate"] < found[0]["learning_rate"] / 2


def test_where_no_rate_lowers_the_loss_the_rule_decides_and_says_so(base, data, monkeypatch):
    def stuck(learner, tokens, indices, rate):
        if rate > 1e-2:
            raise NotFiniteError("the loss is nan")
        return SimpleNamespace(loss=1.0)

    def settled(learner, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(type(learner), "step", stuck)
            return settle.settle(learner, *rest)

    monkeypatch.setattr(fit_run, "settle", settled)
    found = lk.fit(base, data, learning_rate="auto", **QUICK).summary["settled"]
    assert found["learning_rate"] == lk.fit(base, data, **QUICK).summary["settled"]["learning_rate"]
    assert "no rate that was tried lowered the loss by 5%" in found["notes"]["learning_rate"]["why"]
