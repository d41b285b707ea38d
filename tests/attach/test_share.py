"""Factors that several layers share: one tensor that learns from all of them, in memory and on disk."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.describe import describe
from lorakit.errors import PlanError
from lorakit.method import trainable
from lorakit.testing import perturb, snapshot
from tiny import MODELS, batch


def shared(share: str = "a", method: str = "lora", **rules: object) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS["llama"]().eval()
    lk.attach(model, lk.plan(model, 2, ["q", "v", "down"], method=method, share=share, **rules))  # type: ignore[arg-type]
    perturb(model, 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(**batch("llama", torch.Generator().manual_seed(2), labels=False)).logits
    return result


@pytest.mark.parametrize(("share", "method"), [("a", "lora"), ("b", "lora"), ("a+b", "dora"), ("a1+b2", "loha")])
def test_layers_of_one_role_have_one_tensor_that_gets_the_sum_of_their_gradients(share: str, method: str) -> None:
    model = shared(share, method)
    adapter = lk.collect(model)
    for role in ("q_proj", "v_proj", "down_proj"):
        layers = [layer for path, layer in adapter.layers.items() if path.endswith(role)]
        assert len(layers) == 2
        for name in share.split("+"):
            assert layers[0].factors[name] is layers[1].factors[name]
        alone = next(name for name in layers[0].factors if name not in share.split("+"))
        assert layers[0].factors[alone] is not layers[1].factors[alone]
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plan = lk.plan(MODELS["llama"](), 2, ["q", "v", "down"], method=method, share=share)
    specs = {spec.path: spec for spec in describe(MODELS["llama"]())}
    assert trainable(specs, plan) == adapter.n_parameters == sum(p.numel() for p in learning.values())
    logits(model).square().sum().backward()
    apart = MODELS["llama"]().eval()
    apart.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    separate = {p: copy.deepcopy(layer) for p, layer in adapter.layers.items()}  # each with a tensor of its own
    lk.attach(apart, lk.Adapter(separate, {}, {}), trainable=True, check_base=False)
    assert torch.equal(logits(apart), logits(model))
    logits(apart).square().sum().backward()
    own = dict(apart.named_parameters())
    for name, parameter in learning.items():
        factor = name.rpartition(".")[2]
        parts = [own[name]]
        if factor in share.split("+"):
            parts = [own[other] for other in own if other.endswith(name.split("layers.")[1][1:])]
            assert len(parts) == 2
        wanted = sum((part.grad for part in parts), torch.zeros(()))  # type: ignore[misc]
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_copy_a_detached_model_and_a_saved_one(tmp_path: Path) -> None:
    model = shared()
    wanted = logits(model).detach()
    twin = copy.deepcopy(model)
    perturb(twin, 0.2)
    assert torch.equal(logits(model), wanted)
    layers = lk.collect(twin).layers
    assert len({id(layer.factors["a"]) for path, layer in layers.items() if path.endswith("q_proj")}) == 1
    model.save_pretrained(tmp_path / "model")  # no parameter stands twice
    lk.collect(model).save(tmp_path / "adapter")
    back = lk.load(tmp_path / "adapter")
    assert back == lk.collect(model)
    assert back.n_parameters == lk.collect(model).n_parameters
    other = MODELS["llama"]().eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    before = snapshot(other)
    lk.attach(other, back, check_base=False)
    assert torch.equal(logits(other), wanted)
    lk.merge(other, keep=True)
    assert torch.allclose(logits(other), wanted, atol=1e-5)
    lk.unmerge(other)
    lk.detach(other)
    assert snapshot(other) == before
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path / "adapter"))  # PEFT gets a copy for each layer
    assert torch.allclose(logits(theirs), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"share": "c"}, "share 'c' names no factor of 'lora'; it may name a, b"),
        ({"share": "+"}, "names no factor"),
        ({"share": "a", "start": "pissa"}, "start 'pissa' makes a and b for each other"),
        ({"share": "a", "start": "orthogonal"}, "start 'orthogonal' makes a and b for each other"),
        ({"share": "a", "method": "vera"}, "it may name lambda_b, lambda_d"),
    ],
)
def test_what_cannot_be_shared_is_refused(rules: dict[str, str], words: str) -> None:
    with pytest.raises(PlanError, match=words.replace("+", r"\+")):
        lk.plan(MODELS["llama"](), 2, ["q", "v"], **rules)  # type: ignore[arg-type]


def test_a_layer_that_has_nobody_to_share_with_is_named() -> None:
    model = MODELS["llama"]()
    plan = lk.plan(model, 2, ["q", "v"], share="a", blocks=[0])
    with pytest.raises(PlanError, match=r"'model.layers.0.self_attn.q_proj' shares a with no other layer"):
        lk.attach(model, plan)


def test_a_plan_file_says_what_is_shared() -> None:
    plan = lk.plan(MODELS["llama"](), 2, ["q", "v"], share="a")
    assert 'share = "a"' in plan.toml()
    assert lk.Plan.parse(plan.toml()) == plan
