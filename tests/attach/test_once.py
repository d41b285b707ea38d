"""Updates that are made once a step: in the fast engine every method has the gradients that autograd gives."""

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.slots import Factors
from lorakit.method import METHODS
from lorakit.testing import perturb
from lorakit.trunk import Segments, Trunk
from tiny import MODELS

IDS, LENGTHS = torch.arange(1, 13) % 9 + 1, (5, 4, 3)
SCALES = {"fourier": 3.0, "randlora": 0.5}  # so that no update outweighs the base


def adapted(method: str, rank: int = 4) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS["bert"]().bert.eval()
    plan = lk.plan(
        model, rank, method=method, layers="re:encoder.*", scale=SCALES.get(method), trained=["embeddings.LayerNorm"]
    )
    lk.attach(model, plan, seed=0)
    perturb(model, 0.1)
    return model


def weighed(states: Tensor) -> Tensor:
    return (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()


def by_autograd(model: nn.Module) -> dict[str, Tensor]:
    total = torch.zeros(())
    for ids in IDS.split(LENGTHS):
        total = total + weighed(model(input_ids=ids[None]).last_hidden_state[0])
    total.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def texts(trunk: Trunk) -> list[Tensor]:
    """Hidden states of every text, in two passes."""
    first, second = IDS[:9], IDS[9:]
    states = trunk.hidden(first, Segments.of(LENGTHS[:2]))
    return [*states.split(LENGTHS[:2]), trunk.hidden(second, Segments.of(LENGTHS[2:]))]


@pytest.mark.parametrize("method", METHODS.names())
def test_gradients_are_those_of_autograd(method: str) -> None:
    model = adapted(method)
    wanted = by_autograd(model)
    learning = {name: p for name, p in model.named_parameters() if name in wanted}
    assert len(learning) == sum(p.requires_grad for p in model.parameters())
    with Trunk(model) as trunk:
        states = trunk.hidden(IDS, Segments.of(LENGTHS)).split(LENGTHS)
        grads = torch.autograd.grad(sum(map(weighed, states), torch.zeros(())), list(learning.values()))
        same(dict(zip(learning, grads)), wanted, "seen through by autograd")
        for parameter in learning.values():
            parameter.grad = torch.zeros_like(parameter)
        trunk.gradients_in_place(True)
        for _ in range(2):  # a step, and another one after the factors have moved
            trunk.clear()
            for parameter in learning.values():
                parameter.grad.zero_()  # type: ignore[union-attr]
            for k, states in enumerate(texts(trunk)):
                weighed(states).backward(retain_graph=k == 0)  # type: ignore[no-untyped-call]
            trunk.settle()
            same({name: p.grad for name, p in learning.items()}, wanted, "added up and settled")
            with torch.no_grad():
                for parameter in learning.values():
                    parameter.mul_(0.9)
            trunk.refresh()
            twin = adapted(method)
            twin.load_state_dict(model.state_dict())
            wanted = by_autograd(twin)
    assert all(module.made is None and not module.stands for module in model.modules() if isinstance(module, Factors))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    for name, gradient in wanted.items():
        size = max(1e-3, float(gradient.abs().max()))
        gap = float((found[name] - gradient).abs().max())
        assert gap < 2e-4 * size, f"{what}: '{name}' is off by {gap / size:.1e} of its largest number"  # float32


def test_a_wide_pair_is_made_a_dense_change_and_a_narrow_one_runs_in_a_group() -> None:
    for rank, n_in_groups in ((1, 12), (16, 0)):
        model = adapted("vera", rank)
        with Trunk(model) as trunk:
            assert trunk.groups is not None
            assert sum(len(group.members) for group in trunk.groups.groups) == n_in_groups
