"""Every registered method, with every start, on every layer under every drive: the contract of lorakit.testing."""

import sys
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor, nn

from lorakit.method import METHODS, STARTS
from lorakit.testing import CASES, CHECKS, Trial, checks, compiles, contract, refused, run, trials
from lorakit.update import Update

OF_STARTS = {  # what depends on how factors begin: all else is tried with one start
    "fresh_changes_nothing",
    "drive_equals_changed_weight",
    "merged_gives_same_output",
    "saves_and_loads",
    "update_is_what_it_says",
    "refused",
}


def _every_check() -> Iterator[object]:
    for method in METHODS.names():
        starts = [start.name for start in STARTS if not start.needs] if method == "lora" else ["kaiming"]
        for start in starts:
            for trial in trials(method, start=start):
                for check in checks(trial):
                    if start != "kaiming" and check.__name__ not in OF_STARTS:
                        continue
                    name = "-".join([method, trial.start, trial.case.name, trial.drive, check.__name__])
                    # a compiler sees the same code for all methods and starts but for a few products: one for every day
                    again = check is compiles and method != "lora"
                    marks = [pytest.mark.slow] if again else []
                    yield pytest.param(trial, check, id=name.replace(" ", "_"), marks=marks)


@pytest.mark.parametrize(("trial", "check"), _every_check())
def test_contract(trial: Trial, check: Callable[[Trial], None]) -> None:
    run(trial, check)


def test_every_kind_is_in_the_contract() -> None:
    from lorakit.kinds import KINDS

    assert {case.kind for case in CASES} == {
        kind.name for kind in KINDS if not kind.library
    }  # test_foreign_quantized.py


def test_what_a_method_cannot_do_is_refused_not_skipped() -> None:
    impossible = [trial for trial in trials("ia3") if trial.faults]
    assert {trial.case.name for trial in impossible} == {"conv2d that ends an MLP"}
    assert all(checks(trial) == (refused,) for trial in impossible)
    assert all(checks(trial) == CHECKS for trial in trials("lora"))


# ---------------------------------------------------------------- the contract itself can fail


class _Wrong(type(METHODS["lora"])):  # type: ignore[misc]
    """LoRA with one thing wrong, under LoRA's name so that the registry holds it."""


def _registered(monkeypatch: pytest.MonkeyPatch, **changes: object) -> type:
    cls = type("Wrong", (_Wrong,), {"name": "wrong", **changes})
    monkeypatch.setitem(METHODS._entries, "wrong", cls())
    return cls


def _noisy(self: object, spec: object, plan: object, weight: object, generator: object) -> dict[str, Tensor]:
    factors = METHODS["lora"].init(spec, plan, weight, generator)  # type: ignore[arg-type]
    return {**factors, "b": factors["b"] + 1}


def _cut(self: object, factors: dict[str, Tensor], scale: float, weight: object) -> Update:
    return Update(a=factors["a"].detach(), b=factors["b"], scale=scale)


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"init": _noisy}, "A fresh adapter leaves the output as it was"),
        ({"update": _cut}, "The trainable factors get a gradient, nothing else does"),
        ({"size": lambda self, spec, rank: 1}, "`size` is the count of trainable numbers"),
        ({"reads_weight": True}, "`exact_pair` and `reads_weight` are true of the update"),
        ({"exact_pair": False}, "`exact_pair` and `reads_weight` are true of the update"),
        ({"faults": lambda self, spec, plan: ["never"], "takes_rank": True}, "attaching refuses in the same words"),
        ({"shapes": lambda self, spec, rank: {"a": (1, 1)}}, "factor 'a' is (2, 6); it must be (1, 1)"),
    ],
    ids=["init", "update", "size", "reads_weight", "exact_pair", "faults", "shapes"],
)
def test_a_broken_promise_is_named_with_method_kind_and_drive(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], promise: str
) -> None:
    cls = _registered(monkeypatch, **changes)
    if promise.startswith("attaching"):  # `faults` is said, but attach is made deaf to it
        monkeypatch.setattr(sys.modules["lorakit.attach.fresh"], "check_plan", lambda specs, layers: [])
    with pytest.raises(AssertionError) as caught:
        contract(cls, kinds=["linear"])
    message = str(caught.value)
    assert promise in message
    assert "method 'wrong'" in message
    assert "kind linear" in message
    assert "by drive 'hook'" in message


def test_contract_takes_name_class_or_instance_and_counts_what_held() -> None:
    lora = METHODS["lora"]
    held = contract("lora", kinds=["embedding"])
    assert held == 2 * len(CHECKS)
    assert held == contract(type(lora), kinds=["embedding"]) == contract(lora, kinds=["embedding"])


def test_contract_refuses_what_is_not_registered() -> None:
    class Stranger(_Wrong):
        name = "stranger"

    class Impostor(_Wrong):
        name = "lora"

    with pytest.raises(AssertionError, match="'stranger' is not registered"):
        contract(Stranger)
    with pytest.raises(AssertionError, match="another method is registered under the name 'lora'"):
        contract(Impostor)
    with pytest.raises(AssertionError, match="no such kind in the contract: matrix"):
        contract("lora", kinds=["matrix"])


@pytest.mark.slow
def test_a_method_of_another_package_keeps_the_contract_as_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new method is one class: a gain under a pair, written here in full."""
    monkeypatch.setitem(METHODS._entries, "scaled-pair", _ScaledPair())
    assert contract(_ScaledPair, kinds=["linear", "conv2d"]) > 0


class _ScaledPair(_Wrong):
    """`W' = gain * (W + scale b a)` with a bias of its own factor left alone."""

    name = "scaled-pair"
    exact_pair = False

    def shapes(self, spec, rank):  # type: ignore[no-untyped-def]
        return {**METHODS["lora"].shapes(spec, rank), "gain": (*spec.batch, spec.matrix[0])}

    def init(self, spec, plan, weight, generator):  # type: ignore[no-untyped-def]
        fresh = METHODS["lora"].init(spec, plan, weight, generator)
        return {**fresh, "gain": fresh["a"].new_ones(self.shapes(spec, plan.rank)["gain"])}

    def update(self, factors, scale, weight):  # type: ignore[no-untyped-def]
        return Update(a=factors["a"], b=factors["b"], scale=scale, gain=factors["gain"])

    def to_peft(self, layer):  # type: ignore[no-untyped-def]
        return None


def test_snapshot_sees_a_changed_bit_a_hook_and_an_attribute() -> None:
    from lorakit.testing import snapshot

    model = nn.Sequential(nn.Linear(2, 2))
    before = snapshot(model)
    assert snapshot(model) == before
    model[0].register_forward_hook(lambda *_: None)
    assert snapshot(model) != before
    model = nn.Sequential(nn.Linear(2, 2))
    before = snapshot(model)
    model[0].weight.data[0, 0] += 1e-7
    assert snapshot(model) != before
    before = snapshot(model)
    model.extra = "left behind"
    assert snapshot(model) != before
