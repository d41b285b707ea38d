"""Starts that look at data or at what a quantizer lost: what is measured, what the pair is, what a run keeps of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter import load
from lorakit.describe import describe
from lorakit.errors import PlanError, UsageError
from lorakit.measure import redistributed
from lorakit.method import STARTS, Measured
from lorakit.plan import LayerPlan, Plan
from lorakit.testing import Conv1D
from tiny import bert
from tiny_text import small_task

place, base, data = small_task(180)
MEASURED = ["corda", "corda-kpm", "eva", "lora-ga"]
ALL = sorted(start.name for start in STARTS if start.needs)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), Conv1D(16, 20), nn.Tanh(), nn.Linear(16, 8, bias=False))


def coloured(n: int = 64) -> Tensor:
    """Inputs that vary more in some directions, around a mean that is not zero."""
    return noise(n, 12) @ torch.diag(torch.linspace(0.1, 2, 12)) @ noise(12, 12, seed=1) + 1


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).square().sum()


def measured_of(model: nn.Module, plan: Plan, batches: list[Any]) -> dict[str, Measured]:
    return lk.measure(model, batches, plan, loss=loss)


# ---------------------------------------------------------------- what is measured


def test_inputs_are_counted_row_by_row() -> None:
    model, x = net(), coloured()
    found = measured_of(model, lk.plan(model, rank=2, start="eva"), [x[:24].view(2, 12, 12), x[24:]])
    with torch.no_grad():
        seen = {"0": x, "2": model[1](model[0](x)), "4": model[3](model[2](model[1](model[0](x))))}
    for path, rows in seen.items():
        assert torch.allclose(found[path].inputs, rows.T @ rows / len(rows), atol=1e-4)
        assert torch.allclose(found[path].mean, rows.mean(0), atol=1e-5)
        assert found[path].gradient is None


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 4), noise(3, 2, 5)),
        (Conv1D(4, 5), noise(3, 5)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), noise(2, 3, 7, 7)),
    ],
    ids=["linear", "hf_conv1d", "conv2d"],
)
def test_gradients_are_those_of_autograd(layer: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    plan = Plan({"1": LayerPlan(rank=1, start="lora-ga")})
    twice = measured_of(copy.deepcopy(model).requires_grad_(False), plan, [x, 2 * x])["1"].gradient
    assert twice is not None
    for batch in (x, 2 * x):
        loss(model(batch)).backward()
    found = layer.weight.grad / 2
    wanted = found.T if isinstance(layer, Conv1D) else found.flatten(1)
    assert torch.allclose(twice, wanted, atol=1e-4, rtol=1e-4)


def test_patches_of_a_convolution_are_its_inputs() -> None:
    layer, x = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, bias=False), noise(2, 3, 7, 6)
    model = nn.Sequential(layer)
    found = measured_of(model, Plan({"0": LayerPlan(rank=2, start="eva")}), [x])["0"]
    with torch.no_grad():
        y = layer(x)
    energy = torch.einsum("oi,ij,oj->o", layer.weight.flatten(1), found.inputs, layer.weight.flatten(1))
    assert torch.allclose(energy, y.square().mean((0, 2, 3)), rtol=1e-4)


def test_measuring_leaves_no_trace() -> None:
    model = bert().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(1, 40, (2, 6))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
    found = lk.measure(model, [batch], lk.plan(model, rank=2, start="lora-ga"))
    assert all(one.gradient is not None for one in found.values())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_faults() -> None:
    model = net()
    plan = lk.plan(model, rank=2, start="eva")
    with pytest.raises(
        PlanError, match="begins from data: it needs the inputs of '0' and 2 more layers, which were not"
    ):
        lk.attach(model, plan)
    with pytest.raises(PlanError, match="nothing ran through '0' while it was measured"):
        lk.measure(model, [], plan)
    with pytest.raises(UsageError, match="no start of this plan needs to be measured"):
        lk.measure(model, [coloured()], lk.plan(model, rank=2))
    with pytest.raises(UsageError, match="needs gradients, and the model gives no loss; pass loss="):
        lk.measure(model, [coloured()], lk.plan(model, rank=2, start="lora-ga"))
    with pytest.raises(PlanError, match=r"takes 2 x rank 5 directions of '4', which has 8; use rank <= 4"):
        lk.plan(model, rank=5, layers="4", start="lora-ga")
    with pytest.raises(PlanError, match="start 'loftq' makes up for a quantizer's error, and of '0' no weight"):
        lk.attach(model, lk.plan(model, rank=2, start="loftq"))
    with pytest.raises(
        PlanError, match=r"start 'eva' looks at what layers see, which cannot be told of '0' \(embedding"
    ):
        lk.plan(nn.Sequential(nn.Embedding(9, 4)), rank=2, layers="all", start="eva")


# ---------------------------------------------------------------- what the pair is


@pytest.mark.parametrize("start", MEASURED)
def test_a_fresh_adapter_changes_nothing_and_exports_to_a_plain_pair(start: str, tmp_path: Path) -> None:
    model, x = bert().eval(), {"input_ids": torch.randint(1, 40, (2, 6)), "labels": torch.tensor([0, 1])}
    plan = lk.plan(model, rank=2, start=start)
    with torch.no_grad():
        wanted = model(**x).logits
    found = lk.measure(model, [x], plan)
    lk.attach(model, plan, measured=found)
    assert torch.allclose(model(**x).logits, wanted, atol=1e-5)
    model(**x).loss.backward()
    before = model(**x).loss
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p -= 0.05 * p.grad
    assert float(model(**x).loss.detach()) < float(before.detach())
    moved = model(**x).logits.detach()
    lk.collect(model).save(tmp_path)
    import peft

    plain = bert()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    theirs = peft.PeftModel.from_pretrained(plain.eval(), str(tmp_path)).eval()
    assert torch.allclose(theirs(**x).logits, moved, atol=1e-5)


def test_eva_takes_the_principal_components() -> None:
    model, x = net(), coloured(400)
    plan = lk.plan(model, rank=3, layers="0", start="eva")
    lk.attach(model, plan, measured=measured_of(model, plan, [x]))
    a = model[0].adapters.default.a.detach()
    _, _, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert torch.allclose((a @ vh[:3].T).abs(), torch.eye(3), atol=1e-3)
    assert not model[0].adapters.default.b.any()


def test_eva_moves_rank_to_where_more_is_explained_and_keeps_the_number_that_multiplies() -> None:
    model = net()
    plan = lk.plan(model, rank=3, start="eva")
    flat, steep = torch.eye(20), torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0] + [0.0] * 8))
    mid = torch.diag(torch.tensor([5.0] + [1.0] * 15))
    found = {path: Measured(c, torch.zeros(len(c))) for path, c in (("0", steep), ("2", flat), ("4", mid))}
    new = redistributed(plan, {spec.path: spec for spec in describe(model)}, found)
    # shares: 9/16 4/16 2/16 1/16 0 0 | 1/20 x 6 | 5/20 1/20 x 5; the nine largest, the first of equal ones
    assert {path: layer.rank for path, layer in new.layers.items()} == {"0": 4, "2": 4, "4": 1}
    assert all(layer.scale_value == pytest.approx(16 / 3) for layer in new.layers.values())
    none = {**found, "2": Measured(torch.zeros(20, 20), torch.zeros(20))}
    assert "2" not in redistributed(plan, {spec.path: spec for spec in describe(model)}, none).layers


@pytest.mark.parametrize(("start", "mode"), [("corda", "ipm"), ("corda-kpm", "kpm")])
def test_corda_is_that_of_peft(start: str, mode: str) -> None:
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, x = nn.Sequential(nn.Linear(12, 20)), coloured(200)
    plan = lk.plan(model, rank=3, start=start, scale=2.0)
    theirs = copy.deepcopy(model)
    lk.attach(model, plan, measured=measured_of(model, plan, [x]))
    own = model[0].adapters.default
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(theirs, config, run_model=lambda: theirs(x))
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    found = layer.lora_B.default.weight @ layer.lora_A.default.weight
    mine = own.b @ own.a
    assert torch.allclose(mine, found, atol=2e-2 * float(found.detach().abs().max()))  # they invert C in float32


def test_lora_ga_takes_directions_of_the_gradient() -> None:
    model, x = net(), coloured()
    plan = lk.plan(model, rank=2, layers="0", start="lora-ga")
    found = measured_of(model, plan, [x])
    lk.attach(model, plan, measured=found)
    factors = model[0].adapters.default
    u, _, vh = torch.linalg.svd(found["0"].gradient)
    size = 20**0.25 / 4
    assert torch.allclose((factors.a.detach() @ vh.T / size).abs(), torch.eye(2, 12), atol=1e-3)
    assert torch.allclose((u.T @ factors.b.detach() / size).abs(), torch.eye(20)[:, 2:4], atol=1e-3)


# ---------------------------------------------------------------- what a quantizer lost


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("rule", ["16/r", -0.5])
def test_loftq_is_the_best_part_of_the_error(rule: float | str, method: str) -> None:
    plain = net()
    model = copy.deepcopy(plain)
    lk.quantize(model, "int4", keep=True)
    q = model[0].weight
    lk.attach(model, lk.plan(model, rank=3, layers="0", start="loftq", scale=rule, method=method))
    (layer,) = lk.collect(model).layers.values()
    assert not {"a0", "b0"} & layer.factors.keys()
    lost = (plain[0].weight - q).detach()
    u, s, vh = torch.linalg.svd(lost, full_matrices=False)
    found = layer.scale * layer.factors["b"] @ layer.factors["a"]
    assert torch.allclose(found, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], atol=1e-5)
    x = coloured()
    with torch.no_grad():
        assert torch.allclose(model[0](x), F.linear(x, q + found, model[0].bias), atol=1e-4)


def test_eora_loses_less_of_the_outputs_than_loftq_and_loftq_less_than_nothing() -> None:
    plain, x = net(), coloured(300)
    with torch.no_grad():
        wanted = plain[0](x)
    errors = {}
    for start in ("kaiming", "loftq", "eora"):
        model = copy.deepcopy(plain)
        lk.quantize(model, "int4", keep=True)
        plan = lk.plan(model, rank=2, layers="0", start=start)
        found = lk.measure(model, [x], plan) if start == "eora" else None
        lk.attach(model, plan, measured=found)
        with torch.no_grad():
            errors[start] = float((model[0](x) - wanted).norm())
    assert errors["eora"] < 0.95 * errors["loftq"] < 0.95 * errors["kaiming"]


# ---------------------------------------------------------------- in a fit


QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "threads": 1}


@pytest.mark.parametrize("start", MEASURED)
def test_fit_measures_what_a_start_wants(start: str, base: Any, data: Any) -> None:
    plan = lk.plan(base.model, rank=4, start=start)
    result = lk.fit(base, data, plan=plan, **QUICK)
    assert result.metrics["accuracy"] > 0.6
    assert all(layer.start == start for layer in result.adapter.layers.values())
    assert sum(layer.rank for layer in result.adapter.layers.values()) == sum(x.rank for x in plan.layers.values())
    assert not hasattr(base.model, "classifier")


@pytest.mark.parametrize("start", ["eva", "lora-ga"])
def test_a_run_goes_on_with_what_was_measured(start: str, base: Any, data: Any, tmp_path: Path) -> None:
    plan = lk.plan(base.model, rank=4, start=start)
    wanted = lk.fit(base, data, plan=plan, out=tmp_path / "whole", **QUICK)
    assert not (tmp_path / "whole" / "start").exists()

    def interrupt(record: Any, total: int) -> None:
        if record.step == 20 and record.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lk.fit(base, data, plan=plan, out=tmp_path / "run", watch=interrupt, **QUICK)
    assert load(tmp_path / "run" / "start").layers.keys() <= plan.layers.keys()
    found = lk.fit(base, data, plan=plan, out=tmp_path / "run", resume=True, **QUICK)
    assert found.adapter == wanted.adapter
    assert not (tmp_path / "run" / "start").exists()


@pytest.mark.parametrize("start", ["loftq", "eora"])
def test_fit_on_a_quantized_base(start: str, place: Path, data: Any) -> None:
    from lorakit.tasks.base import load_base

    base = load_base(str(place / "base"))
    lk.quantize(base.model, "int4", keep=True)
    result = lk.fit(base, data, plan=lk.plan(base.model, rank=4, start=start), **QUICK)
    assert result.metrics["accuracy"] > 0.6
    assert all(getattr(module, "original", None) is None for module in base.model.modules())
