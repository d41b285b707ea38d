"""Scores of all users with all items, against autograd and plain products."""

import pytest
import torch

from lorakit.attach.kernels.pairs import all_pairs


def three(b, c, d, dtype):
    generator = torch.Generator().manual_seed(b + c)
    shapes = ((b, d), (c, d), (c,))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_it_passes_gradcheck_in_float64():
    assert torch.autograd.gradcheck(all_pairs, three(5, 7, 3, torch.float64))


@pytest.mark.parametrize(("b", "c", "d"), [(1, 1, 1), (33, 70, 16), (256, 129, 64)])
def test_value_and_gradients_are_those_of_plain_products_in_float32(b, c, d):
    x, y, bias = three(b, c, d, torch.float32)
    pull = torch.randn(b, c, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ y.double().T + bias.double()
    scores = all_pairs(x, y, bias)
    assert torch.allclose(scores.double(), wanted, atol=1e-4)  # sums of 64 products
    found = torch.autograd.grad(scores, (x, y, bias), pull)
    right = torch.autograd.grad(wanted, (x, y, bias), pull.double())
    for one, other in zip(found, right):
        assert torch.allclose(one, other, atol=2e-4)


def test_only_what_learns_gets_a_gradient():
    x, y, bias = three(4, 6, 8, torch.float32)
    all_pairs(x, y.detach(), bias.detach()).sum().backward()
    assert torch.allclose(x.grad, y.detach().sum(0).expand(4, 8), atol=1e-5)
