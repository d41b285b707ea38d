"""Laws on values and models, in float64 where numbers are compared."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter import Adapter, fingerprint, same_base
from lorakit.attach import base_fingerprint
from lorakit.method import METHODS, Held, layer_update
from lorakit.plan import LayerPlan
from lorakit.testing import perturb, snapshot
from lorakit.update import AdaptedLayer, LayerSpec

names = st.text("abc.0_é", min_size=1, max_size=6).filter(lambda name: not name.startswith(".") and ".." not in name)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Adapters of any mixture of methods, shapes and precisions on linear layers."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layers: dict[str, AdaptedLayer] = {}
    for path in draw(st.lists(names, max_size=4, unique=True)):
        method = METHODS[draw(st.sampled_from(METHODS.names()))]
        o, i = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        rank, dtype = draw(st.integers(1, 6)), draw(dtypes)
        spec = LayerSpec(path, "linear", (o, i), (o, i), has_bias=True)
        if method.faults(spec, LayerPlan(method.name, rank)):
            continue  # a rank that does not divide a side
        shapes = method.shapes(spec, rank)
        factors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
        if "seed" in factors:
            factors["seed"] = torch.tensor(draw(st.integers(0, 2**31)))
        rank = rank if method.takes_rank else 0
        scale, start = draw(st.floats(0.1, 8)) if rank else 1.0, "kaiming" if method.takes_start else ""
        layers[path] = AdaptedLayer(method.name, "linear", (o, i), factors, rank, scale, start)
    trained = {f"{name}.weight": torch.randn(3, generator=g) for name in draw(st.lists(names, max_size=2, unique=True))}
    return Adapter(layers, {} if set(trained) & {f"{path}.weight" for path in layers} else trained, {"seed": 3})


@given(adapter=adapters())
def test_load_of_save_is_the_adapter(tmp_path_factory: pytest.TempPathFactory, adapter: Adapter) -> None:
    if not adapter.layers and not adapter.trained:
        return
    place = tmp_path_factory.mktemp("law") / "adapter"
    adapter.save(place)
    loaded = lk.load(place)
    assert loaded == adapter
    assert dict(loaded.meta) == dict(adapter.meta)
    assert [layer.start for _, layer in sorted(loaded.layers.items())] == [
        layer.start for _, layer in sorted(adapter.layers.items())
    ]


# ---------------------------------------------------------------- fingerprints


MERGED = [method.name for method in METHODS if method.linear]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_recognised_in_another_precision(dtype: torch.dtype) -> None:
    made = base_fingerprint(net(), ["0", "2"])
    assert same_base(made, base_fingerprint(net().to(dtype), ["0", "2"]))
    assert same_base(base_fingerprint(net().to(dtype), ["0", "2"]), made)


def test_a_checkpoint_in_bfloat16_is_recognised_in_float16() -> None:
    small = net().bfloat16()
    with torch.no_grad():
        small[0].weight.mul_(1e-5)  # type: ignore[operator,union-attr]  # float16 has gaps of 6e-8 down there
    made = base_fingerprint(small, ["0", "2"])
    assert same_base(made, base_fingerprint(small.half(), ["0", "2"]))


def test_another_base_is_told_apart() -> None:
    made = base_fingerprint(net(), ["0", "2"])
    assert not same_base(made, base_fingerprint(net(1), ["0", "2"]))
    assert not same_base(made, base_fingerprint(net(), ["0"]))
    for path, place in [("2", (0, 0)), ("2", (3, 5)), ("2", (6, 29)), ("0", (15, 36))]:  # of 210 all, of 1200 every 4th
        nudged = net()
        with torch.no_grad():
            nudged.get_submodule(path).weight[place] += 0.01
        assert not same_base(made, base_fingerprint(nudged, ["0", "2"])), (path, place)


def test_fingerprint_depends_on_names_and_shapes_and_not_on_order() -> None:
    x, y = torch.arange(6.0), torch.arange(6.0, 12.0)
    assert fingerprint([("x", x), ("y", y)]) == fingerprint([("y", y), ("x", x)])
    assert not same_base(fingerprint([("x", x)]), fingerprint([("z", x)]))
    assert not same_base(fingerprint([("x", x)]), fingerprint([("x", x.reshape(2, 3))]))
    assert not same_base(fingerprint([("x", x), ("y", y)]), fingerprint([("x", y), ("y", x)]))


# ---------------------------------------------------------------- merging


def adapted(method: str, names: tuple[str, ...] = ("default",)) -> tuple[nn.Module, Tensor]:
    model = net().double()
    for seed, name in enumerate(names):
        plan = lk.plan(
            model, rank={"bone": 1, "oft": 2, "boft": 2}.get(method, 3), method=method
        )  # these must divide sides
        lk.attach(model, plan, name=name, seed=seed)
        model.double()
    perturb(model, 0.2)
    lk.activate(model, names)
    return model, torch.randn(5, 40, dtype=torch.float64)


@pytest.mark.parametrize("method", MERGED)
def test_merge_then_unmerge_is_exact(method: str) -> None:
    model, x = adapted(method)
    before, y = snapshot(model), model(x)
    lk.merge(model, keep=True)
    merged = model(x)
    assert torch.allclose(merged, y, atol=1e-12)
    assert snapshot(model) != before
    lk.unmerge(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("method", MERGED)
def test_active_adapters_add_up_to_the_sum_of_their_deltas(method: str) -> None:
    model, x = adapted(method, ("en", "law"))
    plain = net().double()
    y = model(x)
    deltas = {path: torch.zeros_like(plain.get_submodule(path).weight) for path in ("0", "2")}
    biases = {path: torch.zeros_like(plain.get_submodule(path).bias) for path in ("0", "2")}
    for name in ("en", "law"):
        for path, layer in lk.collect(model, name).layers.items():
            base = plain.get_submodule(path)
            update = layer_update(layer, Held(base.weight))  # type: ignore[misc]
            deltas[path] += update.weight(base.weight) - base.weight
            biases[path] += update.changed_bias(base.bias) - base.bias  # type: ignore[operator]
    with torch.no_grad():
        for path in deltas:
            plain.get_submodule(path).weight += deltas[path]
            plain.get_submodule(path).bias += biases[path]
    assert torch.allclose(y, plain(x), atol=1e-12)
    lk.merge(model)
    assert torch.allclose(model(x), plain(x), atol=1e-12)


def test_adding_an_adapter_does_not_depend_on_the_order_of_activation() -> None:
    model, x = adapted("lora", ("en", "law"))
    y = model(x)
    lk.activate(model, ["law", "en"])
    assert torch.allclose(model(x), y, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_half_precision_rounds_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(48, 33)).to(dtype)
    base = model[0].weight.detach().clone()
    lk.attach(model, lk.plan(model, rank=4))
    perturb(model)
    layer = lk.collect(model).layers["0"]
    exact = base.double() + layer.scale * layer.factors["b"].double() @ layer.factors["a"].double()
    lk.merge(model)
    # nearest number of the format, or its neighbour where float32 fell on the other side of a half: one unit at most
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert bool(((model[0].weight.double() - exact).abs() <= 0.5001 * unit).all())


def test_blocks_of_rows_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    whole, _ = adapted("dora", ("en", "law"))
    blocks, _ = adapted("dora", ("en", "law"))
    lk.merge(whole)
    monkeypatch.setattr(sys.modules["lorakit.attach.merge"], "_BLOCK_NUMBERS", 100)
    lk.merge(blocks)
    for path in ("0", "2"):  # a product of fewer rows may add up in another order: a rounding of float64
        assert torch.allclose(whole.get_submodule(path).weight, blocks.get_submodule(path).weight, atol=1e-14)
