"""AdaLoRA: importance and budget as its paper has them, ranks that truly change, layers of rank 0, PEFT's files."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.fit.courses import courses_of, finished
from lorakit.method import METHODS
from peft_cases import base, close, output, stir, tensors_of
from tiny_text import small_task

place, text_base, data = small_task(180)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),  # as peft says of its own
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:.*DeepSpeed"),
    pytest.mark.filterwarnings("ignore:.*zero-element"),  # torch, of a rank of 0
]


def layers(n: int = 2, r: int = 3) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    made = {
        f"l{k}": {"a": torch.randn(r, 5, generator=g), "b": torch.randn(4, r, generator=g), "lambda": torch.ones(r)}
        for k in range(n)
    }
    return {path: {name: x.requires_grad_() for name, x in one.items()} for path, one in made.items()}


def course_over(held: dict[str, dict[str, Tensor]], n_steps: int) -> Any:
    return METHODS["adalora"].course(held, n_steps)


def test_the_least_important_triplets_are_cut_as_the_budget_falls() -> None:
    """Six triplets over 20 steps: cut from step 3 on, 4 remain from step 12. Written out by hand beside it."""
    held = layers()
    course = course_over(held, 20)
    g = torch.Generator().manual_seed(1)
    means = {(path, name): torch.zeros_like(x) for path, one in held.items() for name, x in one.items()}
    spreads = {key: x.clone() for key, x in means.items()}
    for step in range(1, 21):
        for one in held.values():
            for x in one.values():
                x.grad = torch.randn(x.shape, generator=g)
        before = {(path, name): x.detach().clone() for path, one in held.items() for name, x in one.items()}
        course.before(step)
        for path, one in held.items():
            for name, x in one.items():
                assert x.grad is not None
                felt = (before[path, name] * x.grad).abs()
                if step <= 12:
                    means[path, name] = 0.85 * means[path, name] + 0.15 * felt
                    spreads[path, name] = 0.85 * spreads[path, name] + 0.15 * (felt - means[path, name]).abs()
        with torch.no_grad():
            for one in held.values():  # masks last for a step: the optimizer would move lambda
                one["lambda"].fill_(1)
        course.after(step)
        kept = [bool(x) for one in held.values() for x in one["lambda"] != 0]
        if step <= 2:
            assert all(kept)
            continue
        if step <= 12:
            budget = int((6 - 4) * (1 - (step - 2) / 10) ** 3 + 4)
            scores = []
            for path in held:
                felt = {name: means[path, name] * spreads[path, name] for name in ("a", "b", "lambda")}
                scores += [float(felt["lambda"][k] + felt["a"][k].mean() + felt["b"][:, k].mean()) for k in range(3)]
            wanted = [score >= sorted(scores, reverse=True)[budget - 1] for score in scores]
        assert kept == wanted
        assert course.is_done(step) == (step >= 12)
    assert sum(kept) == 4


def test_the_penalty_pulls_factors_towards_orthonormal_ones() -> None:
    held = layers(1)
    course = course_over(held, 10)
    one = held["l0"]
    eye = torch.eye(3)
    wanted = 0.1 / 2 * (torch.linalg.norm(one["a"] @ one["a"].T - eye) + torch.linalg.norm(one["b"].T @ one["b"] - eye))
    wanted.backward()
    gradients = {name: one[name].grad.clone() for name in ("a", "b")}  # type: ignore[union-attr]
    for x in one.values():
        x.grad = torch.zeros_like(x)
    course.before(1)
    for name, gradient in gradients.items():
        assert torch.allclose(one[name].grad, gradient, atol=1e-6)  # type: ignore[arg-type]


def test_ranks_truly_change_and_the_output_does_not() -> None:
    model = base("llama")
    lk.attach(model, lk.plan(model, 4, method="adalora"))
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.1)
    (course,) = courses_of(model, 10).values()
    assert course.memory().keys() == {
        "keep",
        *(f"{w}.{k}.{name}" for w in ("mean", "spread") for k in range(21) for name in ("a", "b", "lambda")),
    }
    first = next(iter(lk.collect(model).layers))
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.rand_like(p) if p.requires_grad else None
        for step in range(1, 11):
            course.before(step)
            course.after(step)
        model.get_submodule(first).adapters.default._parameters["lambda"].zero_()  # one with nothing left
    wanted, adapter = output("llama", model), finished(lk.collect(model))
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    assert ranks[first] == 0
    assert sum(ranks.values()) <= round(21 * 4 * 2 / 3)
    assert all(layer.factors["a"].shape[0] == ranks[path] for path, layer in adapter.layers.items())
    other = base("llama")
    lk.attach(other, adapter)
    assert close(output("llama", other), wanted)
    for drive in ("hook", "fused", "weight"):
        other = base("llama")
        lk.attach(other, adapter, drive=drive)
        assert close(output("llama", other), wanted)
    lk.merge(other)
    assert close(output("llama", other), wanted)


def test_peft_reads_layers_of_rank_0(tmp_path: Path) -> None:
    model = base("llama")
    lk.attach(model, lk.plan(model, 4, method="adalora"))
    stir((p for p in model.parameters() if p.requires_grad), 1, 0.3)
    with torch.no_grad():
        for k, path in enumerate(lk.collect(model).layers):
            model.get_submodule(path).adapters.default._parameters["lambda"][: k % 5] = 0
    wanted, adapter = output("llama", model), finished(lk.collect(model))
    assert {layer.rank for layer in adapter.layers.values()} == {0, 1, 2, 3, 4}
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path)).eval()  # a second load_adapter it cannot take
    assert close(output("llama", theirs), wanted)
    assert lk.load(tmp_path) == adapter


def test_what_peft_has_cut_comes_back(tmp_path: Path) -> None:
    """Trained by PEFT over its whole schedule."""
    model = base("llama")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["q_proj", "up_proj", "down_proj"]
    )
    theirs = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD((p for p in theirs.parameters() if p.requires_grad), lr=0.5)
    ids = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(0))
    for step in range(1, 9):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=ids).logits
    adapter = lk.load(tmp_path)
    assert len({layer.rank for layer in adapter.layers.values()}) > 1
    ours = base("llama")
    lk.attach(ours, adapter)
    with torch.no_grad():
        assert close(ours(input_ids=ids).logits, wanted)
    adapter.save(tmp_path / "again")
    mine = tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, mine[key]) for key, tensor in tensors_of(tmp_path).items())


QUICK: dict[str, Any] = {"epochs": 5, "batch_size": 8, "learning_rate": 1e-2, "threads": 1}


def test_a_fit_ends_with_two_thirds_of_the_ranks_and_goes_on_after_a_stop(
    text_base: Any, data: Any, tmp_path: Path
) -> None:
    plan = lk.plan(text_base.model, rank=6, method="adalora")
    wanted = lk.fit(text_base, data, plan=plan, out=tmp_path / "whole", **QUICK)
    assert sum(layer.rank for layer in wanted.adapter.layers.values()) == round(12 * 6 * 2 / 3)
    assert len({layer.rank for layer in wanted.adapter.layers.values()}) > 1
    assert wanted.metrics["accuracy"] > 0.8
    assert wanted.summary["best_epoch"] >= 3  # before, nothing has its final form

    def interrupt(record: Any, total: int) -> None:
        if record.step == 40 and record.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lk.fit(text_base, data, plan=plan, out=tmp_path / "run", watch=interrupt, **QUICK)
    found = lk.fit(text_base, data, plan=plan, out=tmp_path / "run", resume=True, **QUICK)
    assert found.adapter == wanted.adapter


def test_what_cannot_be_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(lk.LorakitError, match="method 'adalora' cuts '0' by itself, so it can share no factor"):
        lk.plan(model, rank=2, method="adalora", share="a")
