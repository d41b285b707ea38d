"""Methods and starts as pure functions, each against its paper's formula on dense matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AttachError, PlanError
from lorakit.linalg import effective_rank
from lorakit.method import METHODS, STARTS, Factors, Held, layer_update
from lorakit.plan import LayerPlan
from lorakit.testing import perturb
from lorakit.update import AdaptedLayer, LayerSpec

OUT, IN, R = 7, 5, 2
SPECS = {
    "matrix": LayerSpec("x", "linear", (OUT, IN), (OUT, IN)),
    "experts": LayerSpec("x", "parameter", (3, OUT, IN), (OUT, IN), (3,)),
}


UNMEASURED = sorted(start.name for start in STARTS if not start.needs)  # the others: test_starts.py


def weight_of(spec: LayerSpec) -> Tensor:
    return torch.randn(*spec.batch, *spec.matrix, generator=torch.Generator().manual_seed(5))


def pair(start: str, spec: LayerSpec, scale: float = 1.5, rank: int = R, seed: int = 0) -> tuple[Tensor, Tensor]:
    weight = weight_of(spec)
    return STARTS[start].pair(spec, rank, scale, Held(weight), torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- starts


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("start", UNMEASURED)
def test_a_start_gives_float32_factors_of_the_right_shape_that_repeat_with_the_seed(
    start: str, spec: LayerSpec
) -> None:
    a, b = pair(start, spec)
    assert a.shape == (*spec.batch, R, IN)
    assert b.shape == (*spec.batch, OUT, R)
    assert a.dtype == b.dtype == torch.float32
    again = pair(start, spec)
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    if STARTS[start].zero:  # the others read the weight and draw nothing
        assert not torch.equal(a, pair(start, spec, seed=1)[0])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("start", UNMEASURED)
def test_a_start_that_says_zero_has_a_product_of_zero(start: str, spec: LayerSpec) -> None:
    a, b = pair(start, spec)
    size = float((b @ a).abs().max())
    assert (size < 1e-7) == STARTS[start].zero  # numbers of order 0.1, rounded once to float32
    assert float(a.abs().max()) > 0


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs() -> None:
    spec = LayerSpec("x", "linear", (10, 400), (10, 400))
    a, b = pair("kaiming", spec, rank=50)
    bound = 400**-0.5
    assert float(a.abs().max()) <= bound
    # 20 000 draws: the standard deviation bound / sqrt 3 is met within a few of its errors, about 0.5 %
    assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not b.any()


def test_gaussian_has_a_deviation_of_one_over_the_rank() -> None:
    a, b = pair("gaussian", LayerSpec("x", "linear", (50, 400), (50, 400)), rank=50)
    assert float(a.std()) == pytest.approx(1 / 50, rel=0.02)
    assert not b.any()


def test_orthogonal_lets_both_factors_learn_from_the_first_step() -> None:
    a, b = pair("orthogonal", SPECS["matrix"], rank=4)
    assert float(a.abs().min()) > 0
    assert float(b.abs().min()) > 0
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 2


@pytest.mark.parametrize("scale", [2.0, 0.5, -1.5])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_pissa_begins_at_the_best_approximation_of_the_weight(spec: LayerSpec, scale: float) -> None:
    a, b = pair("pissa", spec, scale)
    u, s, vh = torch.linalg.svd(weight_of(spec).double(), full_matrices=False)
    best = u[..., :R] @ torch.diag_embed(s[..., :R]) @ vh[..., :R, :]
    assert torch.allclose(scale * b.double() @ a.double(), best, atol=1e-5)
    assert torch.allclose(b.mT @ b, a @ a.mT, atol=1e-5)  # the singular values are shared evenly


@pytest.mark.parametrize("scale", [2.0, -1.5])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_milora_begins_at_the_least_singular_triples(spec: LayerSpec, scale: float) -> None:
    a, b = pair("milora", spec, scale)
    u, s, vh = torch.linalg.svd(weight_of(spec).double(), full_matrices=False)
    least = u[..., -R:] @ torch.diag_embed(s[..., -R:]) @ vh[..., -R:, :]
    assert torch.allclose(scale * b.double() @ a.double(), least, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_olora_begins_at_the_projection_on_the_first_columns(spec: LayerSpec) -> None:
    a, b = pair("olora", spec)
    weight = weight_of(spec).double()
    eye = torch.eye(R, dtype=torch.float64).expand(*spec.batch, R, R)
    assert torch.allclose(b.double().mT @ b.double(), eye, atol=1e-6)
    assert torch.allclose(b.double() @ a.double(), b.double() @ (b.double().mT @ weight), atol=1e-5)
    span = torch.linalg.lstsq(b.double(), weight[..., :R]).solution
    assert torch.allclose(b.double() @ span, weight[..., :R], atol=1e-5)  # the first columns of W lie in it


# ---------------------------------------------------------------- methods


def factors(method: str, spec: LayerSpec, start: str = "kaiming") -> Factors:
    """Fresh factors and noise, in float64."""
    entry = METHODS[method]
    plan = LayerPlan(method, R if entry.takes_rank else 0, 1.5, start if entry.takes_start else "")
    draw = torch.Generator().manual_seed(0)
    fresh = entry.common([spec], plan.rank, draw) | entry.init(spec, plan, Held(weight_of(spec)), draw)
    g = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(t.shape, generator=g, dtype=torch.float64) for name, t in fresh.items()}
    frozen = METHODS[method].frozen
    return {name: t.double() + (0 if name in frozen else 0.3) * noise[name] for name, t in fresh.items()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_lora_adds_the_scaled_product(spec: LayerSpec) -> None:
    f, weight = factors("lora", spec), weight_of(spec).double()
    changed = METHODS["lora"].update(f, 1.5, Held(weight)).weight(weight)
    assert torch.allclose(changed, weight + 1.5 * f["b"] @ f["a"], atol=1e-12)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_start_that_is_not_zero_is_subtracted(spec: LayerSpec) -> None:
    f, weight = factors("lora", spec, "pissa"), weight_of(spec).double()
    changed = METHODS["lora"].update(f, 1.5, Held(weight)).weight(weight)
    wanted = weight + 1.5 * (f["b"] @ f["a"] - f["b0"] @ f["a0"])
    assert torch.allclose(changed, wanted, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dora_sets_the_length_of_every_row(spec: LayerSpec) -> None:
    f, weight = factors("dora", spec), weight_of(spec).double()
    changed = METHODS["dora"].update(f, 1.5, Held(weight)).weight(weight)
    moved = weight + 1.5 * f["b"] @ f["a"]
    wanted = f["magnitude"].unsqueeze(-1) * moved / moved.norm(dim=-1, keepdim=True)
    assert torch.allclose(changed, wanted, atol=1e-12)
    assert torch.allclose(changed.norm(dim=-1), f["magnitude"].abs(), atol=1e-12)


def test_dora_leaves_a_row_of_zeros_at_zero_and_its_gradient_finite() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(3, IN)
    plain = model(x)
    for drive in ("hook", "fused", "weight"):
        lk.attach(model, lk.plan(model, rank=R, method="dora"), drive=drive)
        y = model(x)
        assert torch.allclose(y, plain, atol=1e-6)
        y.square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        lk.detach(model)


def test_dora_takes_the_length_as_a_constant_in_its_gradient() -> None:
    """Section 4.3 of the paper: dL/db is that of the numerator, times m over the length."""
    f, weight = factors("dora", SPECS["matrix"]), weight_of(SPECS["matrix"]).double()
    leaves = {name: t.clone().requires_grad_() for name, t in f.items()}
    METHODS["dora"].update(leaves, 1.5, Held(weight)).weight(weight).square().sum().backward()
    moved = weight + 1.5 * f["b"] @ f["a"]
    ratio = (f["magnitude"] / moved.norm(dim=-1)).unsqueeze(-1)
    upstream = 2 * ratio * moved  # d(sum of squares)/dW'
    assert torch.allclose(leaves["b"].grad, 1.5 * (ratio * upstream) @ f["a"].mT, atol=1e-10)
    assert torch.allclose(leaves["magnitude"].grad, 2 * f["magnitude"], atol=1e-10)


@pytest.mark.parametrize(("role", "side"), [("v", "gain"), ("down", "gain_in"), ("other", "gain")])
def test_ia3_scales_outputs_or_the_inputs_of_the_matrix_that_ends_an_mlp(role: str, side: str) -> None:
    spec = LayerSpec("x", "linear", (OUT, IN), (OUT, IN), role=role)
    f, weight, bias = factors("ia3", spec), weight_of(spec).double(), torch.randn(OUT, dtype=torch.float64)
    assert list(f) == [side]
    update = METHODS["ia3"].update(f, 1.0, Held(weight))
    gain = f[side]
    wanted = gain.unsqueeze(-1) * weight if side == "gain" else weight * gain
    assert torch.allclose(update.weight(weight), wanted)
    changed = update.changed_bias(bias)
    assert changed is not None
    assert torch.allclose(changed, gain * bias if side == "gain" else bias)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_bias_on_the_outer_factor_is_scaled_with_it(method: str) -> None:
    f, weight = factors(method, SPECS["matrix"]), weight_of(SPECS["matrix"]).double()
    bias = torch.randn(OUT, dtype=torch.float64)
    update = METHODS[method].update({**f, "bias": bias}, 1.5, Held(weight))
    assert update.bias is not None
    assert torch.allclose(update.bias, 1.5 * bias)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("method", METHODS.names())
def test_fresh_factors_change_nothing_and_have_the_declared_shapes_and_size(method: str, spec: LayerSpec) -> None:
    entry, weight = METHODS[method], weight_of(spec)
    rank = R if entry.takes_rank else 0
    plan = LayerPlan(method, rank, 1.5, "kaiming")
    if not entry.linear and spec.batch:
        assert "is read without a call" in entry.faults(spec, plan)[0]
        return
    if entry.faults(spec, plan):
        plan = replace(plan, rank=1)  # bone divides both sides by it, and 1 divides all
    rank, draw = plan.rank, torch.Generator()
    fresh = entry.common([spec], rank, draw) | entry.init(spec, plan, Held(weight), draw)
    assert {name: tuple(t.shape) for name, t in fresh.items()} == entry.shapes(spec, rank)
    assert entry.size(spec, rank) == sum(t.numel() for name, t in fresh.items() if name not in entry.frozen)
    derived = entry.derived(fresh, tuple(weight.shape))
    update = entry.update({**fresh, **derived}, 1.5, Held(weight))
    if not entry.linear:
        assert not update.b.any()  # type: ignore[union-attr]
        return
    changed = update.weight(weight)
    assert torch.allclose(changed, weight, rtol=1e-6)  # a length and its inverse: roundings of float32


def test_an_update_without_the_model_asks_for_it_only_where_it_needs_it() -> None:
    def layer(method: str) -> AdaptedLayer:
        return AdaptedLayer(method, "linear", (OUT, IN), factors(method, SPECS["matrix"]), R, 1.5)

    assert layer_update(layer("lora")).is_pair
    with pytest.raises(PlanError, match="method 'dora' needs the base weight to say its update; pass the model"):
        layer_update(layer("dora"))
    weight = weight_of(SPECS["matrix"]).double()
    assert layer_update(layer("dora"), Held(weight)).gain is not None


@pytest.mark.parametrize(("rank", "words"), [(0, "use a whole number, 1 or more"), (6, "use rank <= 5")])
def test_ranks_that_cannot_be_are_faults(rank: int, words: str) -> None:
    (fault,) = METHODS["lora"].faults(SPECS["matrix"], LayerPlan(rank=rank))
    assert words in fault
    assert METHODS["lora"].faults(SPECS["matrix"], LayerPlan(rank=5)) == []


@pytest.mark.parametrize("method", METHODS.names())
def test_inspect_tells_the_spectrum_of_every_method_and_without_the_model_where_that_can_be(method: str) -> None:
    if not METHODS[method].linear:
        return
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    before = [layer.weight.detach().clone() for layer in model]
    lk.attach(model, lk.plan(model, 2, method=method, scale=1.0))
    perturb(model.double(), 0.1)
    adapter = lk.collect(model)
    lk.merge(model)
    views = {True: lk.inspect(adapter, _restored(model, before), check_base=False), False: lk.inspect(adapter)}
    for path, weight in zip("01", before):
        exact = torch.linalg.svdvals(_merged(adapter, path, weight) - weight)
        for told in views.values():
            view = next(view for view in told.layers if view.path == path)
            if view.norm is not None:
                assert view.norm == pytest.approx(float(exact.square().sum().sqrt()), rel=1e-4)
                assert view.effective_rank == pytest.approx(effective_rank(exact), rel=1e-3)
    needs_model = METHODS[method].reads_weight or method in ("ia3", "ssf")
    assert all((view.norm is None) == needs_model for view in views[False].layers)
    assert all(view.norm is not None for view in views[True].layers)


def test_starts_that_are_not_zero_go_with_methods_that_can_keep_them() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    wanted = model(x)
    lk.attach(model, lk.plan(model, 2, method="lora-fa", start="milora"))
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert lk.collect(model).layers["0"].factors.keys() == {"a", "b", "a0", "b0"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (8 + 4)
    with pytest.raises(PlanError, match="hira multiplies W, so its pair must begin at zero; take start 'kaiming'"):
        lk.plan(nn.Sequential(nn.Linear(6, 8)), 2, method="hira", start="olora")


@pytest.mark.parametrize("method", ["bottleneck", "parallel"])
def test_a_network_behind_or_beside_a_layer_is_the_one_of_its_paper(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 7)).double()
    lk.attach(model, lk.plan(model, 2, method=method, scale=1.5))
    perturb(model.double(), 0.5)
    f, y = lk.collect(model).layers["0"].factors, nn.functional.linear(x, model[0].weight, model[0].bias)
    wanted = y + 1.5 * (f["a"] @ (y if method == "bottleneck" else x).T).relu().T @ f["b"].T
    assert torch.allclose(model(x), wanted, atol=1e-12)
    grid = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False)).double()
    lk.attach(model, lk.plan(model, 2, "all-conv", method=method))
    perturb(model.double(), 0.5)
    f = lk.collect(model).layers["0"].factors
    y = nn.functional.conv2d(grid, model[0].weight, stride=2)
    patches = nn.functional.unfold(grid, 3, stride=2)
    seen = y.flatten(2) if method == "bottleneck" else patches
    wanted = y + (f["b"] @ (f["a"] @ seen).relu()).view_as(y)
    assert torch.allclose(model(grid), wanted, atol=1e-12)


def test_what_changes_outputs_cannot_be_merged_nor_used_where_no_layer_is_called() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, lk.plan(model, 2, method="bottleneck"))
    with pytest.raises(
        AttachError, match="nothing was merged: method 'bottleneck' at '0' changes outputs, not the weight"
    ):
        lk.merge(model)
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(PlanError, match="the weight of 'out_proj' is read without a call"):
        lk.plan(attention, 2, ["out_proj"], method="parallel")


def _restored(model: nn.Sequential, weights: list[Tensor]) -> nn.Sequential:
    with torch.no_grad():
        for layer, weight in zip(model, weights):
            layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
    return model


def _merged(adapter: lk.Adapter, path: str, weight: Tensor) -> Tensor:
    return layer_update(adapter.layers[path], Held(weight)).weight(weight)
