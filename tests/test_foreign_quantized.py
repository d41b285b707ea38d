"""Layers of bitsandbytes, torchao, quanto and hqq, made by them: read as they compute, adapted, merged, loaded."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.describe import describe, locate
from lorakit.errors import UsageError
from lorakit.testing import perturb
from lorakit.trunk import Segments, Trunk

APART = "PEFT and Transformers import it wherever it is, so it is installed apart; make test runs these by themselves"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes", reason=APART)
    ao = pytest.importorskip("torchao.quantization", reason=APART)
    quanto = pytest.importorskip("optimum.quanto", reason=APART)
    hqq = pytest.importorskip("hqq.core.quantize", reason=APART)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs are many
O, I = 96, 128  # noqa: E741


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(I, O).requires_grad_(False)


def four_bits(double: bool, kind: str) -> nn.Module:
    layer = bnb.nn.Linear4bit(I, O, quant_type=kind, compress_statistics=double)
    layer.load_state_dict(linear().state_dict())
    return layer.to("cpu")


def eight_bits() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(I, O, has_fp16_weights=False)
    layer.load_state_dict(linear().state_dict())
    return layer.to("cpu")


def by_torchao(config: Any) -> nn.Module:
    layer = linear()
    ao.quantize_(layer, config)
    return layer


def by_quanto(kind: Any) -> nn.Module:
    layer = quanto.nn.QLinear.from_module(linear(), weights=kind)
    layer.freeze()
    return layer


def by_hqq(bits: int) -> nn.Module:
    how = hqq.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    return hqq.HQQLinear(linear(), how, compute_dtype=torch.float32, device="cpu")


def nf4_of_torchao() -> nn.Module:
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig

    config = NF4WeightOnlyConfig()
    config.scaler_block_size = 32  # a small layer has few blocks
    return by_torchao(config)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bnb nf4": lambda: four_bits(False, "nf4"),
    "bnb nf4 double": lambda: four_bits(True, "nf4"),
    "bnb fp4": lambda: four_bits(True, "fp4"),
    "bnb int8": eight_bits,
    "torchao int8": lambda: by_torchao(ao.Int8WeightOnlyConfig()),
    "torchao int8 groups": lambda: by_torchao(ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32))),
    "torchao int4": lambda: by_torchao(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))),
    "torchao fp8": lambda: by_torchao(ao.Float8WeightOnlyConfig()),
    "torchao nf4": nf4_of_torchao,
    "quanto int8": lambda: by_quanto(quanto.qint8),
    "quanto int4": lambda: by_quanto(quanto.qint4),
    "quanto fp8": lambda: by_quanto(quanto.qfloat8),
    "hqq 8": lambda: by_hqq(8),
    "hqq 4": lambda: by_hqq(4),
    "hqq 2": lambda: by_hqq(2),
}
X = torch.randn(5, I, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return nn.Sequential(nn.Linear(I, I), LAYERS[request.param](), nn.ReLU(), nn.Linear(O, 3)).train()


def weight_of(model: nn.Module) -> Tensor:
    found = locate(model, "1")
    assert found is not None
    return found.kind.canonical(found.module, found.weight)


def test_the_weight_is_what_the_layer_computes_with(model: nn.Module) -> None:
    with torch.no_grad():
        wanted = model[1](X)
    assert torch.allclose(F.linear(X, weight_of(model), model[1].bias), wanted, atol=1e-5)
    (spec,) = [spec for spec in describe(model) if spec.path == "1"]
    assert (spec.kind, spec.matrix, spec.has_bias) == ("linear", (O, I), True)


@pytest.mark.parametrize("drive", ["fused", "hook"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_an_adapter_acts_as_on_the_weight_itself(model: nn.Module, method: str, drive: str) -> None:
    weight = weight_of(model).clone()
    plain = nn.Sequential(model[0], nn.Linear(I, O), nn.ReLU(), model[3])
    with torch.no_grad():
        plain[1].weight.copy_(weight)
        plain[1].bias.copy_(model[1].bias)
    wanted = copy.deepcopy(plain)
    plan = lk.plan(plain, rank=4, layers="1", method=method)
    for one in (model, wanted):
        lk.attach(one, plan, drive=drive if one is model else None)
        perturb(one, 0.1)
    found, expected = model(X), wanted(X)
    assert torch.allclose(found, expected, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    for mine, theirs in zip(learning, [p for p in wanted.parameters() if p.requires_grad]):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)
    others = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in others)
    lk.detach(model)
    with torch.no_grad():
        assert torch.equal(weight_of(model), weight)


def test_gradients_come_through_to_layers_before(model: nn.Module) -> None:
    lk.attach(model, lk.plan(model, rank=4, layers=["0", "1"]))
    perturb(model, 0.1)
    model(X).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model[0].adapters.default.parameters())


def test_merging_rounds_as_the_library_does_and_says_what_it_costs(model: nn.Module) -> None:
    before = weight_of(model).clone()
    lk.attach(model, lk.plan(model, rank=4, layers="1"))
    perturb(model, 0.1)
    (layer,) = lk.collect(model).layers.values()
    wanted = before + layer.scale * layer.factors["b"] @ layer.factors["a"]
    with pytest.raises(lk.LorakitError, match="keep their weights in few bits"):
        lk.merge(model)
    with pytest.raises(lk.LorakitError, match="keep=True cannot put back"):
        lk.merge(model, requantize=True, keep=True)
    told = lk.merge(model, requantize=True)
    found = weight_of(model)
    error = float((found - wanted).norm() / wanted.norm())
    assert told["1"].of_weight == pytest.approx(error, rel=1e-2, abs=1e-5)
    assert error < 0.4  # two bits
    with torch.no_grad():
        assert torch.allclose(model[1](X), F.linear(X, found, model[1].bias), atol=1e-5)
    assert not list(model[1].children())


def test_bitsandbytes_in_its_other_order() -> None:
    """Which it brings its codes into by itself, in eval mode, for good."""
    layer = four_bits(False, "nf4")
    model = nn.Sequential(layer)
    before = weight_of_first(model)
    with torch.no_grad():
        layer.eval()(X)
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no bfloat16 products, so that bitsandbytes keeps its order")
    after = weight_of_first(model)
    assert float((after - before).abs().max()) <= 2**-7 * float(before.abs().max())  # scales in bfloat16


def weight_of_first(model: nn.Module) -> Tensor:
    found = locate(model, "0")
    assert found is not None
    return found.kind.canonical(found.module, found.weight)


def test_what_gives_no_gradient_is_refused() -> None:
    model = nn.Sequential(by_torchao(ao.Int8DynamicActivationInt8WeightConfig()))
    with pytest.raises(UsageError, match="quantizes its inputs too, through which no gradient comes"):
        lk.plan(model)


def test_what_is_not_quantized_yet_is_refused() -> None:
    model = nn.Sequential(quanto.nn.QLinear.from_module(linear(), weights=quanto.qint8))
    with pytest.raises(UsageError, match="is not frozen yet: call quanto's freeze"):
        lk.plan(model)


# ---------------------------------------------------------------- whole models, as Transformers loads them


def saved_llama(place: Path) -> Path:
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=64)).save_pretrained(place)
    return place


def configs() -> dict[str, Any]:
    import transformers as tf

    return {
        "bnb nf4": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bnb int8": tf.BitsAndBytesConfig(load_in_8bit=True),
        "quanto": tf.QuantoConfig(weights="int8"),
        "torchao": tf.TorchAoConfig(ao.Int8WeightOnlyConfig()),
    }


@pytest.mark.parametrize("name", ["bnb nf4", "bnb int8", "torchao", "quanto"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers as tf

    place = saved_llama(tmp_path)
    model = tf.LlamaForCausalLM.from_pretrained(place, quantization_config=configs()[name], dtype=torch.float32)
    paths = lk.attach(model, lk.plan(model, rank=4))
    assert len(paths) == 14
    perturb(model, 0.02)
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    model.train()  # LLM.int8 rounds its inputs in eval mode
    wanted = model.model(input_ids=ids).last_hidden_state
    with Trunk(model, dtype="fp32") as trunk:
        assert trunk.groups is not None
        assert len(trunk.groups.groups) == 8  # q k v, o, gate up, down
        found = trunk.hidden(ids.flatten(), Segments.of([6, 6])).view_as(wanted)
        found.sum().backward()
    assert torch.allclose(found, wanted, atol=2e-3)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_peft_reads_an_adapter_of_a_bitsandbytes_base(tmp_path: Path) -> None:
    import peft
    import transformers as tf

    place = saved_llama(tmp_path / "base")
    config = configs()["bnb nf4"]
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    model = tf.LlamaForCausalLM.from_pretrained(place, quantization_config=config, dtype=torch.float32).train()
    lk.attach(model, lk.plan(model, rank=4))
    perturb(model, 0.02)
    wanted = model(input_ids=ids).logits
    lk.collect(model).save(tmp_path / "adapter")
    theirs = tf.LlamaForCausalLM.from_pretrained(place, quantization_config=config, dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).train()(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
