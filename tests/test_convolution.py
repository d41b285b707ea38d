"""Convolutions with their pair by hand: exact gradients, kernels of 1 x 1 as products, norms folded and put back."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit as lk
from lorakit.attach.convolution import Convolution
from lorakit.attach.groups import inputs_recorded, make_groups
from lorakit.attach.slots import slots_of, switch_of
from lorakit.trunk import Trunk


class Net(nn.Module):
    """A stem, a block with a shortcut and norms behind its convolutions, one norm that reads a sum, and an end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.way, self.way_norm = nn.Conv2d(8, 12, 1, stride=(2, 1), bias=False), nn.BatchNorm2d(12, affine=False)
        self.two = nn.Conv2d(12, 12, (3, 1), stride=(2, 1), padding=(1, 0), dilation=1)
        self.sum_norm = nn.BatchNorm2d(12)
        self.twice, self.twice_norm = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.stem_norm(self.stem(x)))
        y = self.two(F.relu(self.one_norm(self.one(x))))
        y += self.way_norm(self.way(x))
        y = F.relu(self.sum_norm(y))
        z = self.twice(y)
        return self.grouped(z + self.twice_norm(z))


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = Net().to(dtype).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                norm.weight.data.normal_()
                norm.bias.data.normal_()
    return model


def attached(model: nn.Module, rank: int = 3) -> nn.Module:
    dtype = model.stem.weight.dtype
    lk.attach(model, lk.plan(model, rank, "all-conv", scale=1.7), seed=0)
    model.to(dtype)
    for name, factor in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(len(name)))
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output; gradients of the input and of all factors."""
    x = x.clone().requires_grad_()
    found = model(x)
    learning = [p for p in model.parameters() if p.requires_grad]
    return found.detach(), list(torch.autograd.grad((found * torch.arange(found.shape[-1])).sum(), [x, *learning]))


def grouped(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float64):
    name = switch_of(model).active[0]
    with torch.no_grad(), inputs_recorded(model) as calls:
        model(x)
    return make_groups(model, name, calls, dtype)


def folded(model: nn.Module) -> set[str]:
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    return {name for name, module in norms if "forward" in module.__dict__}


def test_output_and_gradients_are_those_of_autograd_with_and_without_folded_norms():
    model, x = attached(net()), torch.randn(3, 2, 13, 10, dtype=torch.float64)
    wanted, exact = gradients(model, x)
    groups = grouped(model, x)
    assert sum(isinstance(group, Convolution) for group in groups.groups) == 5, "all but the grouped one"
    for folds in (False, True):
        if folds:
            with torch.no_grad():
                groups.fold_norms(model, lambda: model(x), 1e-9)
        found, ours = gradients(model, x)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    assert folded(model) == set(), "one output is read twice, which the proof shows, so none is folded"
    groups.release()
    assert not any(slot.group for _, _, slot in slots_of(model, model_paths(model)))


def model_paths(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def test_norms_behind_convolutions_are_folded_and_come_back():
    model, x = net(), torch.randn(3, 2, 13, 10, dtype=torch.float64)
    model.twice = nn.Identity()
    attached(model)
    wanted, exact = gradients(model, x)
    groups = grouped(model, x)
    with torch.no_grad():
        groups.fold_norms(model, lambda: model(x), 1e-9)
    assert folded(model) == {"stem_norm", "one_norm", "way_norm"}
    found, ours = gradients(model, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    groups.gradients_in_place(False)
    groups.release()
    assert folded(model) == set()
    assert torch.equal(model(x), wanted)


def test_gradients_are_added_where_they_are_kept():
    model, x = net(), torch.randn(3, 2, 13, 10, dtype=torch.float64)
    model.twice = nn.Identity()
    attached(model)
    _, (_, *exact) = gradients(model, x)
    groups = grouped(model, x)
    with torch.no_grad():
        groups.fold_norms(model, lambda: model(x), 1e-9)
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)
    groups.gradients_in_place(True)
    found = model(x)
    (found * torch.arange(found.shape[-1])).sum().backward()
    for parameter, wanted in zip(learning, exact, strict=True):
        torch.testing.assert_close(parameter.grad, wanted + 1, rtol=1e-8, atol=1e-8)


def test_factors_that_have_changed_are_taken_over():
    model, x = attached(net()), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    groups = grouped(model, x)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.5)
        groups.refresh()
        found = model(x)
        groups.release()
        torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", ["hook", "learns", "train"])
def test_a_norm_that_something_may_change_is_left_alone(change):
    model, x = net(), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    model.twice = nn.Identity()
    attached(model)
    if change == "hook":
        model.one.register_forward_hook(lambda *_: None)
    elif change == "learns":
        model.one_norm.weight.requires_grad_(True)
    else:
        model.one_norm.train()
    groups = grouped(model, x)
    with torch.no_grad():
        groups.fold_norms(model, lambda: model(x), 1e-9)
    assert "forward" not in model.one_norm.__dict__
    assert "forward" in model.way_norm.__dict__
    groups.release()


def test_a_map_from_elsewhere_is_normed_as_ever():
    model, x = net(), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    model.twice = nn.Identity()
    attached(model)
    groups = grouped(model, x)
    other = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    wanted = model.one_norm(other)
    with torch.no_grad():
        groups.fold_norms(model, lambda: model(x), 1e-9)
    assert torch.equal(model.one_norm(other), wanted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_trunk_gives_the_same_and_leaves_the_model_as_it_was(dtype):
    model = net(torch.float32)
    model.twice = nn.Identity()
    attached(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 2, 16, 16)
    wanted = model(x)
    with torch.no_grad(), Trunk(model, dtype=dtype, shape=(2, 16, 16)) as trunk:
        assert "forward" in model.one_norm.__dict__
        found = trunk.seen(x)
    bound = {"fp32": 1e-5, "bf16": 3e-2}[dtype] * wanted.abs().max()
    assert (found.float() - wanted).abs().max() < bound
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.is_contiguous(), f"{name} is in the order it came in"
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("way", ["two norms", "one norm twice", "keyword"])
def test_what_two_norms_read_is_left_alone_and_a_keyword_is_an_input(way):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 8, 3), nn.Conv2d(2, 8, 3)
            self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            if way == "two norms":
                return self.norm(y) + self.other(y)
            if way == "one norm twice":
                return self.norm(y) + self.norm(self.two(x))
            return self.norm(input=y) + self.other(self.two(x))

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(2, 2, 6, 6)
    for norm in (model.norm, model.other):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
    lk.attach(model, lk.plan(model, 2, "all-conv"), seed=0)
    wanted = model(x)
    with torch.no_grad(), Trunk(model, shape=(2, 6, 6)) as trunk:
        assert folded(model) == ({"norm", "other"} if way == "keyword" else set())
        torch.testing.assert_close(trunk.seen(x), wanted, rtol=1e-5, atol=1e-5)
    assert folded(model) == set()
