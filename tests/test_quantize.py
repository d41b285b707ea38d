"""Bases in few bits: their error and size, the same numbers on every way through, training, merging, the verbs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapter import load
from lorakit.cli import main
from lorakit.describe import describe
from lorakit.errors import AttachError, BaseMismatchError, PlanError, UsageError
from lorakit.fit.use import load_base_of
from lorakit.quant import FORMATS, QuantEmbedding, Quantized, QuantLinear
from lorakit.quantize import forget, quantization_costs, quantized_as
from lorakit.tasks.base import load_base
from lorakit.testing import perturb
from lorakit.trunk import Segments, Trunk
from tiny import bert, gpt2, llama, t5
from tiny_text import table, tiny_bert

FORMS = FORMATS.names()


def noise(o: int, i: int, seed: int = 0) -> Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))


IDS = torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(("form", "most"), [("int8", 0.011), ("nf4", 0.088), ("int4", 0.098)])
def test_error_on_normal_weights(form: str, most: float) -> None:
    weight = noise(256, 384)
    found = FORMATS[form].unpack(FORMATS[form].pack(weight), 384, torch.float32)
    assert float((found - weight).norm() / weight.norm()) < most


@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_the_scale_is_better_than_the_largest_number_of_a_block(form: str) -> None:
    """What QLoRA and bitsandbytes take."""
    weight = noise(64, 640)
    table = FORMATS[form].values  # type: ignore[attr-defined]
    blocks = weight.view(64, -1, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    plain = table[(blocks / scale).unsqueeze(-1).sub(table).abs().argmin(-1)] * scale
    found = FORMATS[form].unpack(FORMATS[form].pack(weight), 640, torch.float32)
    assert float((found - weight).norm()) < 0.95 * float((plain.view(64, 640) - weight).norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 70), noise(3, 70) * 1e-30, noise(3, 70) * 1e30], ids=["0", "small", "large"]
)
def test_numbers_of_any_size(form: str, weight: Tensor) -> None:
    found = FORMATS[form].unpack(FORMATS[form].pack(weight), 70, torch.float32)
    assert bool(found.isfinite().all())
    assert float((found - weight).abs().max()) <= 0.25 * float(weight.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_packing_what_was_unpacked_changes_nothing(form: str) -> None:
    weight = noise(16, 96)
    once = FORMATS[form].unpack(FORMATS[form].pack(weight), 96, torch.float32)
    again = FORMATS[form].unpack(FORMATS[form].pack(once), 96, torch.float32)
    assert float((again - once).norm() / once.norm()) < 1e-2 * (form != "int8") + 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_bits_are_what_is_said(form: str) -> None:
    parts = FORMATS[form].pack(noise(64, 4096))
    bits = 8 * sum(part.numel() * part.element_size() for part in parts) / (64 * 4096)
    assert bits == pytest.approx(FORMATS[form].bits, rel=2e-3)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_computes_with_the_weight_that_it_shows(form: str) -> None:
    model = small()
    lk.quantize(model, form, embeddings=form)
    layer, table = model[1], model[0]
    assert isinstance(layer, QuantLinear)
    assert isinstance(table, QuantEmbedding)
    x = noise(7, 64).requires_grad_()
    y = layer(x)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(y, wanted, atol=1e-5)
    dy = noise(7, 128, 3)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.allclose(dx, dy @ layer.weight, atol=1e-4)
    assert torch.equal(table(IDS), table.weight[IDS])
    assert layer.weight.dtype == table.weight.dtype == torch.float32


def test_a_change_of_dtype_leaves_the_numbers_alone() -> None:
    model = small()
    lk.quantize(model, "int8")
    exact = model[1].weight
    model.to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    model.to(torch.float32)
    assert torch.equal(model[1].weight, exact)


def test_no_pass_keeps_the_float_weight() -> None:
    model = small()
    lk.quantize(model, "nf4")
    lk.attach(model, lk.plan(model))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(IDS).sum().backward()
    assert kept
    assert max(kept) < 64 * 128


def test_copies_have_their_own_codes() -> None:
    model = small()
    lk.quantize(model, "nf4", keep=True)
    twin = copy.deepcopy(model)
    assert twin[1].original is None  # which is of use where it was made
    with torch.no_grad():
        twin[1].write(noise(128, 64))
    assert not torch.equal(twin[1].weight, model[1].weight)
    state = model.state_dict()
    twin.load_state_dict(state)
    assert torch.equal(twin[1].weight, model[1].weight)


def test_a_file_of_codes_is_not_taken_for_one_of_weights() -> None:
    model = small()
    lk.quantize(model, "int8")
    with pytest.raises(RuntimeError, match=r'Missing key.* "0.weight", "1.weight"'):
        small().load_state_dict(model.state_dict())


def test_a_token_that_is_not_there() -> None:
    model = small()
    lk.quantize(model, "int8")
    with pytest.raises(IndexError, match="row 50 is asked for, and there are 50"):
        model(torch.tensor([[3, 50]]))


# ---------------------------------------------------------------- the verb


def test_quantize_says_what_it_costs() -> None:
    model = small()
    before, told = sum(p.numel() for p in model.parameters()) * 4, quantization_costs(small(), "nf4")
    costs = lk.quantize(model, "nf4")
    assert costs == told
    assert costs.before == before
    assert costs.after == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert [(cost.path, cost.form) for cost in costs.layers] == [("0", "int8"), ("1", "nf4"), ("3", "nf4")]
    plain = small()
    for cost in costs.layers:
        old, new = plain.get_submodule(cost.path).weight.detach(), model.get_submodule(cost.path).weight
        assert cost.error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
    assert costs.worst in costs.layers
    assert "3 layers" in str(costs)
    assert quantized_as(model) == {"form": "nf4", "layers": "all-linear", "embeddings": "int8"}


def test_dequantize_gives_float_layers_of_the_same_numbers() -> None:
    model = small()
    lk.quantize(model, "nf4")
    with torch.no_grad():
        wanted = model(IDS)
        assert lk.dequantize(model) == 3
        assert torch.allclose(model(IDS), wanted, atol=1e-6)
    assert [type(layer) for layer in model] == [nn.Embedding, nn.Linear, nn.ReLU, nn.Linear]
    assert list(model.state_dict()) == list(small().state_dict())
    assert quantized_as(model) == {}


@pytest.mark.parametrize("build", [bert, gpt2, llama, t5], ids=lambda build: build.__name__)
def test_models_keep_their_heads_and_what_is_shared(build: Callable[[], nn.Module]) -> None:
    model = build()
    specs = {spec.path: spec for spec in describe(model)}
    costs = lk.quantize(model, "int8")
    for path, spec in specs.items():
        module = model.get_submodule(path) if spec.kind != "parameter" else None
        if isinstance(module, Quantized):
            assert spec.role != "head"
            assert not spec.tied
    after = {spec.path: spec for spec in describe(model)}
    assert after.keys() == specs.keys()
    for cost in costs.layers:
        assert after[cost.path].matrix == specs[cost.path].matrix
        assert after[cost.path].role == specs[cost.path].role


def test_an_adapter_of_a_float_base_goes_on_the_quantized_one() -> None:
    """If that is meant: kinds and shapes are the same to it."""
    model = gpt2()
    lk.attach(model, lk.plan(model))
    perturb(model, 0.05)
    adapter = lk.collect(model)
    lk.detach(model)
    lk.quantize(model, "int8")
    with pytest.raises(
        BaseMismatchError, match=r"made on them in float, and this model has them in int8 .*quantize it"
    ):
        lk.attach(model, adapter)
    assert len(lk.attach(model, adapter, check_base=False)) == len(adapter.layers)


def test_faults_leave_the_model_alone() -> None:
    model = small()
    with pytest.raises(UsageError, match="unknown format 'nf5'; did you mean 'nf4'"):
        lk.quantize(model, "nf5")
    with pytest.raises(UsageError, match="can be quantized by layers='attention'"):
        lk.quantize(model, "nf4", layers="attention", embeddings="none")
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite numbers in the weights of '3'"):
        lk.quantize(model)
    assert not any(isinstance(module, Quantized) for module in model.modules())
    model = small()
    lk.attach(model, lk.plan(model))
    with pytest.raises(UsageError, match="quantize it first, and attach then"):
        lk.quantize(model)
    lk.detach(model)
    lk.quantize(model)
    with pytest.raises(UsageError, match="quantized already"):
        lk.quantize(model)
    with pytest.raises(PlanError, match="is not a floating-point parameter and cannot learn"):
        lk.plan(model, trained=("1",))


def test_keep_and_forget() -> None:
    model, plain = small(), small()
    lk.quantize(model, "nf4", keep=True)
    assert torch.equal(model[1].original, plain[1].weight)
    forget(model)
    assert model[1].original is None


# ---------------------------------------------------------------- merging


def merged_ready(form: str = "int8") -> tuple[nn.Module, Tensor]:
    model = small()
    lk.quantize(model, form)
    lk.attach(model, lk.plan(model, layers="all"))
    perturb(model, 0.05)
    with torch.no_grad():
        return model, model(IDS)


def test_merging_into_few_bits_is_refused_unless_it_is_meant() -> None:
    model, wanted = merged_ready()
    with pytest.raises(AttachError, match="3 layers, e.g. '0', keep their weights in few bits"):
        lk.merge(model)
    with torch.no_grad():
        assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_merging_into_few_bits_tells_what_rounding_costs(form: str) -> None:
    model, wanted = merged_ready(form)
    before = {path: model.get_submodule(path).weight for path in ("1", "3")}
    pairs = {path: layer.factors for path, layer in lk.collect(model).layers.items()}
    scale = lk.collect(model).layers["1"].scale
    told = lk.merge(model, keep=True, requantize=True)
    assert told.keys() == {"0", "1", "3"}
    for path in ("1", "3"):
        delta = scale * pairs[path]["b"] @ pairs[path]["a"]
        off = (model.get_submodule(path).weight - before[path] - delta).norm()
        assert told[path].of_weight == pytest.approx(float(off / (before[path] + delta).norm()), rel=1e-3)
        assert told[path].of_change == pytest.approx(float(off / delta.norm()), rel=1e-3)
    lk.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(IDS), wanted)
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in before.items())


def test_the_exact_way_is_to_dequantize() -> None:
    model, wanted = merged_ready("nf4")
    adapter = lk.collect(model)
    lk.detach(model)
    lk.dequantize(model)
    lk.attach(model, adapter, check_base=False)
    assert lk.merge(model) == {}
    with torch.no_grad():
        assert torch.allclose(model(IDS), wanted, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_a_pruned_base_stays_pruned(method: str) -> None:
    model = small()
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    zero = {path: model.get_submodule(path).weight == 0 for path in ("1", "3")}
    lk.attach(model, lk.plan(model, method=method))
    perturb(model)
    full = copy.deepcopy(model)
    lk.merge(full)
    lk.merge(model, zeros=True)
    for path, mask in zero.items():
        found = model.get_submodule(path).weight
        assert torch.equal(found == 0, mask)
        assert torch.equal(found[~mask], full.get_submodule(path).weight[~mask])


# ---------------------------------------------------------------- trained fast


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [bert, llama], ids=lambda build: build.__name__)
def test_the_trunk_gives_what_the_model_gives(build: Callable[[], Any], form: str) -> None:
    model = build().eval()
    lk.quantize(model, form)
    lk.attach(model, lk.plan(model, rank=2))
    perturb(model, 0.05)
    body = model.base_model if hasattr(model, "base_model") else model
    ids = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    wanted = body(input_ids=ids).last_hidden_state
    weights = torch.linspace(-1, 1, wanted.numel()).view_as(wanted)
    (wanted * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with Trunk(model, dtype="fp32") as trunk:
        assert trunk.groups is not None
        found = trunk.hidden(ids.flatten(), Segments.of([6, 6]))
        (found.view_as(wanted) * weights).sum().backward()
    assert torch.allclose(found.view_as(wanted), wanted, atol=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name], atol=1e-3, rtol=1e-3), name


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What a verb answers as JSON."""
    code = main([*map(str, words), "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    return json.loads(streams.out)


def test_fit_predict_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run remembers how its base was quantized."""
    base, rows, run = tiny_bert(tmp_path / "base"), table(tmp_path / "rows.csv"), tmp_path / "run"
    few = ["--epochs", 4, "--batch-size", 8, "--learning-rate", 0.01]
    fitted = told(capsys, "fit", base, rows, "--out", run, "--quantize", "nf4", *few)
    assert fitted["test"]["accuracy"] > 0.8
    adapter = load(run / "adapter")
    assert adapter.meta["quantized"]["form"] == "nf4"
    again = load_base_of(adapter)
    assert any(isinstance(module, QuantLinear) for module in again.model.modules())
    measured = told(capsys, "evaluate", run, rows)["metrics"]
    told(capsys, "merge", run, "--out", tmp_path / "merged")
    merged = told(capsys, "evaluate", tmp_path / "merged", rows)["metrics"]
    assert merged["accuracy"] == pytest.approx(measured["accuracy"], abs=0.03)  # bfloat16 on one side
    assert merged["loss"] == pytest.approx(measured["loss"], rel=0.1)
    plain = load_base(str(base))
    with pytest.raises(BaseMismatchError, match="made on them in nf4"):
        lk.predict(run, ["rain"], base=plain)


def test_the_verb_compares_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "quantize", tiny_bert(tmp_path / "base"))
    assert set(found) == set(FORMS)
    assert found["int8"]["error"] < found["nf4"]["error"] < found["int4"]["error"]
    assert found["nf4"]["bytes_after"] < found["int8"]["bytes_after"] < found["int8"]["bytes_before"]
