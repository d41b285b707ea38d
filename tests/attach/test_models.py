"""Real Transformers models from tiny configurations: attached, they run wherever the plain ones do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
import tiny
from lorakit.errors import AttachError
from lorakit.method import METHODS
from lorakit.testing import perturb, snapshot

NAMES = list(tiny.MODELS)


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return tiny.MODELS[name]().to(dtype)


MERGED = [m.name for m in METHODS if m.linear and m.name != "ssf"]  # which wants a bias everywhere


def layers_for(name: str, method: str) -> dict[str, object]:
    """Rules that leave out what the method cannot adapt: adalora gives a layer one rank, whatever its experts."""
    return {"layers": "attention"} if (name, method) == ("mixtral", "adalora") else {}


def adapted(name: str, method: str = "lora", dtype: torch.dtype = torch.float32, **rules: object) -> nn.Module:
    model = base(name, dtype)
    rules = {**layers_for(name, method), **rules}
    lk.attach(model, lk.plan(model, rank=2, method=method, scale=1.0, **rules))  # type: ignore[arg-type]
    perturb(model, 0.1)
    return model


def inputs(name: str, **options: object) -> dict[str, Tensor]:
    return tiny.batch(name, torch.Generator().manual_seed(3), **options)  # type: ignore[arg-type]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**batch).logits
    return result


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_runs_and_the_merged_model_answers_the_same(name: str, method: str, mode: str) -> None:
    model, batch = adapted(name, method), inputs(name)
    model.train(mode == "train")
    plain = base(name).train(mode == "train")
    assert lk.probe(model, batch) == ()
    with torch.no_grad():
        before = logits(plain, batch)
        with lk.disabled(model):
            assert torch.equal(logits(model, batch), before)
        moved = logits(model, batch)
        assert float((moved - before).abs().max()) > 1e-4
        lk.merge(model)
        # float32 through a few layers of a model whose numbers are of order one
        assert torch.allclose(logits(model, batch), moved, atol=2e-5)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("name", NAMES)
def test_detaching_restores_the_model(name: str, method: str) -> None:
    model = base(name)
    before = snapshot(model)
    trained = ["classifier"] if name in ("bert", "vit") else ["lm_head"]
    rules = layers_for(name, method)
    lk.attach(model, lk.plan(model, rank=2, method=method, trained=trained, bias="none", **rules))  # type: ignore[arg-type]
    model(**inputs(name)).loss.backward()
    lk.detach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_weights_by_the_chain_rule(name: str) -> None:
    """dL/da = scale b^T (dL/dW) and dL/db = scale (dL/dW) a^T, with dL/dW from the merged plain model."""
    model, batch = adapted(name, dtype=torch.float64).double(), inputs(name)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    batch = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    model(**batch).loss.backward()
    adapter = lk.collect(model)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    lk.merge(model)
    model.requires_grad_(True).zero_grad()
    model(**batch).loss.backward()
    checked = 0
    for path, layer in adapter.layers.items():
        module, parameter = (path, "weight") if layer.kind != "parameter" else path.rpartition(".")[::2]
        gradient = model.get_submodule(module)._parameters[parameter].grad  # type: ignore[union-attr]
        assert gradient is not None
        if layer.kind == "hf_conv1d":
            gradient = gradient.mT
        slot = f"{module}.adapters.default" if parameter == "weight" else f"{module}.adapters_{parameter}.default"
        a, b = layer.factors["a"], layer.factors["b"]
        assert torch.allclose(found[f"{slot}.a"], layer.scale * b.mT @ gradient, atol=1e-10)
        assert torch.allclose(found[f"{slot}.b"], layer.scale * gradient @ a.mT, atol=1e-10)
        checked += 1
    assert checked == len(adapter.layers) > 0
    assert len(found) == 2 * checked, "something besides the factors got a gradient"


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_generation_gives_the_tokens_of_the_merged_model(name: str, method: str) -> None:
    model, batch = adapted(name, method).eval(), inputs(name, labels=False)

    def tokens() -> Tensor:
        result: Tensor = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return result

    found = tokens()
    lk.merge(model)
    assert torch.equal(tokens(), found)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, method: str, reentrant: bool) -> None:
    batch = inputs(name)
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name, method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant and name == "vit":  # that needs an input that requires gradients
                batch = {**batch, "pixel_values": batch["pixel_values"].requires_grad_()}
            elif reentrant:
                model.enable_input_require_grads()
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert gradient is not None
        assert gradients[1][key] is not None, f"'{key}' got no gradient under checkpointing"
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_model_learns_with_float32_factors(name: str) -> None:
    model, batch = base(name, torch.bfloat16), inputs(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    lk.attach(model, lk.plan(model, rank=2))
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    optimizer = torch.optim.SGD(learning, lr=1e-2)
    losses = []
    for _ in range(12):
        result = model(**batch)
        assert result.logits.dtype == torch.bfloat16
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    assert losses[-1] < losses[0]
    assert {p.dtype for n, p in model.named_parameters() if "adapters" not in n} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_keeps_every_base_key_and_the_class_reads_it_back(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name).eval(), inputs(name)
    plain = base(name).eval()
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in again.state_dict().items())
    lk.attach(again, lk.collect(model))
    with torch.no_grad():
        assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("name", NAMES)
def test_merged_and_saved_it_is_a_plain_model(name: str, tmp_path: Path) -> None:
    model, batch = adapted(name).eval(), inputs(name)
    with torch.no_grad():
        wanted = logits(model, batch)
    lk.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(logits(again, batch), wanted, atol=2e-5)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.t5], ids=["gpt2", "t5"])
def test_a_tied_head_is_refused_by_merge_unless_it_is_meant(build: Callable[[], nn.Module]) -> None:
    model = build()
    embedding = "transformer.wte" if hasattr(model, "transformer") else "shared"
    lk.attach(model, lk.plan(model, rank=2, layers=["lm_head", "attention"]))
    perturb(model)
    before = snapshot(model)
    with pytest.raises(AttachError, match=rf"'lm_head' shares its weight with '{embedding}\.weight'"):
        lk.merge(model)
    assert snapshot(model) == before
    lk.merge(model, tied=True)
    assert model.lm_head.weight is model.get_parameter(f"{embedding}.weight")


def test_layers_beside_a_tied_head_are_merged_without_asking() -> None:
    model = adapted("gpt2")
    lk.merge(model)
    assert torch.equal(model.lm_head.weight, base("gpt2").lm_head.weight)


def test_a_head_of_its_own_trained_whole_survives_save_pretrained_beside_the_base(tmp_path: Path) -> None:
    model = adapted("bert", trained=["classifier"])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.classifier.weight, base("bert").classifier.weight)


def test_t5_reads_the_dtype_of_a_weight_while_its_layer_is_adapted() -> None:
    """T5 asks for `wo.weight.dtype` in its forward: the base's, not that of the factors."""
    model = adapted("t5", dtype=torch.bfloat16, layers=["wo"])
    assert logits(model, inputs("t5")).dtype == torch.bfloat16
    by_weight = base("t5")
    lk.attach(by_weight, lk.plan(by_weight, rank=2, layers=["wo"]), drive="weight")
    assert lk.probe(by_weight, inputs("t5")) == ()


def test_router_of_experts_can_be_adapted_by_name() -> None:
    model, batch = adapted("mixtral", layers=["mlp.gate.weight"]), inputs("mixtral")
    assert lk.probe(model, batch) == ()
    wanted = logits(model, batch)
    lk.merge(model)
    assert torch.allclose(logits(model, batch), wanted, atol=2e-5)


def test_embeddings_of_a_model_with_padding_learn_but_the_padding_does_not() -> None:
    model = base("bert")
    lk.attach(model, lk.plan(model, rank=2, layers=["word_embeddings"]))
    perturb(model)
    model(input_ids=torch.tensor([[5, 6, 0, 0]])).logits.sum().backward()
    a = model.get_parameter("bert.embeddings.word_embeddings.adapters.default.a").grad
    assert a is not None
    assert a[:, [5, 6]].abs().min() > 0
    assert a[:, 0].abs().max() == 0
