"""truncate: exact by the weights, best for the loss by moments, under one budget over all layers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
import tiny
from lorakit.adapter import Adapter
from lorakit.algebra import spectra
from lorakit.algebra.budget import Offer, within_loss, within_size
from lorakit.errors import AdapterError, AttachError, BaseMismatchError, PlanError, UsageError
from lorakit.method import layer_update
from lorakit.moments import Moments, load_moments, save_moments

Batch = tuple[Tensor, Tensor]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def learned(model: nn.Module, rank: int = 4, **rules: object) -> Adapter:
    """An adapter whose factors are anything but fresh."""
    lk.attach(model, lk.plan(model, rank=rank, scale=1.5, **rules), seed=1)
    adapter = lk.collect(model)
    lk.detach(model)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter.layers.values():
        for factor in layer.factors.values():
            factor.add_(0.4 * torch.randn(factor.shape, generator=generator))
    return adapter.to(dtype=torch.float64)


def delta(adapter: Adapter, path: str) -> Tensor:
    if path not in adapter.layers:
        return torch.zeros((), dtype=torch.float64)
    update = layer_update(adapter.layers[path])
    return update.scale * (update.b @ update.a)


# ---------------------------------------------------------------- budgets


def test_within_a_size_the_ranks_are_worth_as_much_as_any():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        offers = {
            name: Offer(torch.rand(3, generator=generator).sort(descending=True).values, cost, least)
            for name, cost, least in (("x", 2, 0), ("y", 3, 1), ("z", 4, 0))
        }
        for size in range(3, 30):
            found = within_size(offers, size)
            spent = sum(found[name] * offer.cost for name, offer in offers.items())
            assert spent <= size
            assert found["y"] >= 1
            assert all(spent + offer.cost > size or found[name] == 3 for name, offer in offers.items())
        for loss in (0.1, 0.5, 2.0):
            ranks = within_loss(offers, loss)
            assert sum(float(offer.worth[ranks[name] :].sum()) for name, offer in offers.items()) <= loss
    even = {name: Offer(offer.worth, 2, 0) for name, offer in offers.items()}  # alike in cost: then it is the best
    for n in range(10):
        found = within_size(even, 2 * n)
        best = max(
            sum(float(offer.worth[:k].sum()) for offer, k in zip(even.values(), ranks))
            for ranks in itertools.product(range(4), repeat=3)
            if sum(ranks) <= n
        )
        assert sum(float(even[name].worth[:k].sum()) for name, k in found.items()) == pytest.approx(best)


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.8}, {"error": 0.3}, {"budget": 150}, {"keep": 0.4}])
def test_every_delta_is_its_best_approximation_of_the_rank_it_gets(how):
    adapter = learned(net())
    small = lk.truncate(adapter, **how)
    lost = total = 0.0
    for path in adapter.layers:
        u, s, vh = torch.linalg.svd(delta(adapter, path))
        rank = small.layers[path].rank if path in small.layers else 0
        best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        torch.testing.assert_close(delta(small, path).expand_as(best), best)
        lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
        if "energy" in how:
            assert float(s[:rank].square().sum()) >= 0.8 * float(s.square().sum())
    assert small.meta["truncated"]["error"] == pytest.approx(math.sqrt(lost / total))
    numbers = sum(layer.rank * sum(layer.matrix) for layer in small.layers.values())
    assert numbers <= {"budget": 150, "keep": 0.4 * sum(4 * sum(x.matrix) for x in adapter.layers.values())}.get(
        next(iter(how)), 10**6
    )
    if "error" in how:
        assert small.meta["truncated"]["error"] <= 0.3


def test_one_budget_gives_the_directions_that_are_worth_most_for_their_numbers():
    adapter = learned(net())
    small = lk.truncate(adapter, keep=0.5)
    prices: dict[str, list[float]] = {}
    for path, layer in adapter.layers.items():
        prices[path] = (torch.linalg.svdvals(delta(adapter, path))[:4].square() / sum(layer.matrix)).tolist()
    kept = [price for path, layer in small.layers.items() for price in prices[path][: layer.rank]]
    best = sorted((price for own in prices.values() for price in own), reverse=True)
    assert sorted(kept, reverse=True)[:-1] == best[: len(kept) - 1]  # the last may be one that still fitted


def test_nothing_is_changed_where_all_of_it_fits():
    adapter = learned(net())
    assert lk.truncate(adapter, keep=1.0) == adapter
    assert lk.truncate(adapter, error=0.0) == adapter
    assert lk.truncate(adapter, rank=4) == adapter


def test_fresh_factors_which_change_nothing_can_be_truncated():
    model = net()
    lk.attach(model, lk.plan(model, rank=4))
    adapter = lk.collect(model)
    small = lk.truncate(adapter, keep=0.5)
    assert small.meta["truncated"]["error"] == 0
    assert small.layers
    with pytest.raises(UsageError, match="hold no direction"):
        lk.truncate(adapter, budget=3)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "give one of rank, energy"),
        ({"rank": 2, "keep": 0.5}, "rank and keep are given"),
        ({"rank": 0}, "rank is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"error": -0.1}, "error is -0.1"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"rank": 1.5}, "rank is 1.5"),
    ],
)
def test_what_cannot_be_asked_for_is_said(how, words):
    with pytest.raises(UsageError, match=words):
        lk.truncate(learned(net()), **how)


# ---------------------------------------------------------------- layers that fall out


def test_an_adapter_without_some_of_its_layers_still_knows_its_base(tmp_path):
    model = net()
    lk.attach(model, lk.plan(model, rank=4), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(std=0.01 if name.startswith("0.") else 1.0)
    adapter = lk.collect(model)
    lk.detach(model)
    small = lk.truncate(adapter, error=0.1)
    assert "0" not in small.layers
    small.save(tmp_path / "small")
    again = lk.load(tmp_path / "small")
    assert again == small
    for one in (small, again, lk.truncate(again, rank=1)):
        lk.attach(net(), one)
        lk.inspect(one, net())
        with pytest.raises(BaseMismatchError):
            lk.attach(net(1), one)
        with pytest.raises(BaseMismatchError):
            lk.inspect(one, net(1))
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(2)  # where the adapter has no layer any more
    with pytest.raises(BaseMismatchError):
        lk.attach(other, again)


# ---------------------------------------------------------------- moments


def data(n: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(16, 12, generator=generator).double(), torch.randint(0, 5, (16,), generator=generator))
        for _ in range(n)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def dense_moments(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Second moments of a linear layer's inputs and of the gradients of its outputs, whole."""
    layer, seen, asked, n = model.get_submodule(path), 0.0, 0.0, 0
    for batch in data():
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, y, kept=kept: kept.extend((args[0], y)))
        value = loss(model, batch)
        handle.remove()
        x, y = kept
        (dy,) = torch.autograd.grad(value, y)
        seen, asked, n = seen + x.mT @ x, asked + dy.mT @ dy, n + len(x)
    return (seen / n).detach(), (asked / len(data())).detach()


@pytest.mark.parametrize("trainable", [True, False])
def test_moments_are_those_of_whole_inputs_and_gradients_seen_through_the_factors(trainable):
    model = net()
    adapter = learned(model)
    lk.attach(model, adapter, trainable=trainable)
    found = lk.moments(model, data(), loss)
    asks = {name for name, p in model.named_parameters() if p.requires_grad}
    assert asks == {name for name, p in model.named_parameters() if trainable == ("adapters" in name)} or not trainable
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    for path in adapter.layers:
        update, (seen, asked) = layer_update(adapter.layers[path]), dense_moments(model, path)
        torch.testing.assert_close(found[path].seen.double(), update.a @ seen @ update.a.mT, rtol=1e-5, atol=1e-9)
        wanted = update.scale**2 * update.b.mT @ asked @ update.b
        torch.testing.assert_close(found[path].asked.double(), wanted, rtol=1e-5, atol=1e-12)


def test_by_moments_each_layer_is_the_best_of_its_rank_in_the_norm_of_inputs_and_gradients(monkeypatch):
    monkeypatch.setattr(spectra, "_MIXED", 0.0)
    monkeypatch.setattr(spectra, "_FLOOR", 1e-12)
    model = net()
    adapter = learned(model)
    lk.attach(model, adapter, trainable=True)
    found = {path: Moments(*(x.double() for x in one)) for path, one in lk.moments(model, data(), loss).items()}
    model.requires_grad_(True)
    whole = {path: dense_moments(model, path) for path in adapter.layers}
    small = lk.truncate(adapter, rank=2, moments=found)
    nats = 0.0
    for path, (seen, asked) in whole.items():
        left, right = (torch.linalg.cholesky(x + 1e-13 * torch.eye(len(x))) for x in (asked, seen))
        s = torch.linalg.svdvals(left.mT @ delta(adapter, path) @ right)
        lost = torch.linalg.matrix_norm(left.mT @ (delta(adapter, path) - delta(small, path)) @ right)
        assert float(lost) == pytest.approx(float(s[2:].square().sum().sqrt()), rel=1e-3)
        nats += float(lost.square()) / 2
    assert small.meta["truncated"]["nats"] == pytest.approx(nats, rel=1e-3)
    assert small.meta["truncated"]["error"] > lk.truncate(adapter, rank=2).meta["truncated"]["error"]


def test_moments_that_say_nothing_leave_what_the_weights_say():
    adapter = learned(net())
    plain = {}
    for path, layer in adapter.layers.items():
        update = layer_update(layer)
        plain[path] = Moments(update.a @ update.a.mT, update.scale**2 * update.b.mT @ update.b)
    by_weights, by_moments = lk.truncate(adapter, rank=2), lk.truncate(adapter, rank=2, moments=plain)
    for path in adapter.layers:
        torch.testing.assert_close(delta(by_moments, path), delta(by_weights, path), rtol=1e-4, atol=1e-6)


def test_moments_of_convolutions_embeddings_and_gpt2s_layers():
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 2)).double()
    words = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(40, 2)).double()
    labels = torch.tensor([0, 1, 1])
    for model, x in ((images, torch.randn(3, 3, 4, 4).double()), (words, torch.randint(0, 30, (3, 5)))):
        adapter = learned(model, rank=2, layers=["0"])
        assert "0" in adapter.layers
        lk.attach(model, adapter)
        found = lk.moments(model, [x], lambda model, x: F.cross_entropy(model(x), labels))
        update = layer_update(adapter.layers["0"])
        if model is images:
            rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
        else:
            rows = F.one_hot(x.flatten(), 30).double()
        seen = update.a @ (rows.mT @ rows) @ update.a.mT / len(rows)
        assert float((found["0"].seen - seen).abs().max()) < 0.2 * float(seen.abs().max())  # rows that nobody asks
        assert found["0"].asked.shape == (2, 2)
        small = lk.truncate(adapter, keep=0.5, moments=found)
        lk.detach(model)
        lk.attach(model, small)
    gpt2 = tiny.gpt2().eval()
    adapter = learned(gpt2, rank=2).to(dtype=torch.float32)
    lk.attach(gpt2, adapter)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 6))
    found = lk.moments(gpt2, [ids], lambda model, ids: model(input_ids=ids, labels=ids).loss)
    assert found.keys() == adapter.layers.keys()


def test_rows_that_no_gradient_comes_to_do_not_count():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    adapter = learned(model, rank=2)
    lk.attach(model, adapter)
    x = torch.randn(5, 4).double()
    whole = lk.moments(model, [x], lambda model, x: model(x).square().mean())
    filled = torch.cat([x, 100 * torch.ones(3, 4)])
    part = lk.moments(model, [filled], lambda model, x: model(x)[:5].square().mean())
    torch.testing.assert_close(whole["0"].seen, part["0"].seen)


def test_what_moments_cannot_be_gathered_or_used_for_is_said(tmp_path):
    model = net()
    with pytest.raises(AttachError, match="no adapter is attached"):
        lk.moments(model, data(), loss)
    adapter = learned(model)
    lk.attach(model, adapter, name="one")
    with pytest.raises(UsageError, match="no gradient came"):
        lk.moments(model, [], loss)
    found = lk.moments(model, data(), loss)
    lk.attach(model, adapter, name="two")
    lk.activate(model, ["one", "two"])
    with pytest.raises(AttachError, match="2 are active"):
        lk.moments(model, data(), loss)
    with pytest.raises(UsageError, match="moments of '9', which is no layer"):
        lk.truncate(adapter, rank=2, moments={"9": found["0"]})
    with pytest.raises(UsageError, match="no moments of '2' and 1 more layers"):
        lk.truncate(adapter, keep=0.5, moments={"0": found["0"]})
    assert lk.truncate(adapter, rank=2, moments={"0": found["0"]}).layers["2"].rank == 2
    save_moments(tmp_path / "m.safetensors", found, adapter)
    again = load_moments(tmp_path / "m.safetensors", adapter)
    assert all(torch.equal(again[path].asked, found[path].asked) for path in found)
    with pytest.raises(AdapterError, match="measured with another adapter"):
        load_moments(tmp_path / "m.safetensors", lk.truncate(adapter, rank=2))


def test_methods_that_are_no_pair_are_refused():
    model = net()
    lk.attach(model, lk.plan(model, rank=2, method="dora"))
    with pytest.raises(PlanError, match="only low-rank pairs"):
        lk.truncate(lk.collect(model), rank=1)
