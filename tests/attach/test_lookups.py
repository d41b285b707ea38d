"""Rows of an embedding in their parts: the same as the layer gives, and whole where anything else acts on it."""

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.attach import activate, attach
from lorakit.attach.lookups import looked_up

PLACES = torch.tensor([3, 0, 3, 8])


def adapted(method="lora", name="one", model=None, **words):
    """A model of one embedding with a method on it, moved away from its start."""
    model = nn.ModuleDict({"table": nn.Embedding(9, 6, **words)}) if model is None else model
    attach(model, lk.plan(model, 2, "embeddings", method=method, scale=0.5), name=name, seed=3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


def test_its_parts_give_what_the_layer_gives_with_the_same_gradients():
    model = adapted()
    rows = looked_up(model["table"], PLACES)
    assert rows.s is not None and not rows.w.requires_grad
    wanted, learning = model["table"](PLACES), [p for p in model.parameters() if p.requires_grad]
    assert torch.allclose(rows.whole(), wanted, atol=1e-6)
    pull = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    found, right = (torch.autograd.grad(rows_, learning, pull) for rows_ in (rows.whole(), wanted))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, right))


def two():
    model = adapted(name="two", model=adapted())
    activate(model, ["one", "two"])
    return model


def hooked():
    model = adapted()
    model["table"].register_forward_hook(lambda module, args, output: output * 2)
    return model


def fully_trained():
    model = nn.ModuleDict({"table": nn.Embedding(9, 6)})
    attach(model, lk.plan(model, layers={}, trained=("*",)))
    return model


@pytest.mark.parametrize(
    "made",
    [
        two,
        hooked,
        fully_trained,
        lambda: adapted("dora"),
        lambda: adapted(padding_idx=3),
        lambda: adapted(max_norm=0.5),
    ],
)
def test_it_is_whole_where_more_than_a_pair_acts(made):
    layer = made()["table"]
    rows = looked_up(layer, PLACES)
    assert rows.s is None
    assert torch.equal(rows.w, layer(PLACES))


def test_a_plain_or_switched_off_layer_is_whole():
    model = adapted()
    activate(model, [])
    for layer in (model["table"], nn.Embedding(9, 6)):
        rows = looked_up(layer, PLACES)
        assert rows.s is None and torch.equal(rows.w, layer.weight[PLACES])
