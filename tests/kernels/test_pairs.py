"""The softmax of users over items, and its low-rank gradients, against autograd through plain products."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import pairs as kernel
from lorakit.kernels.pairs import Rows, pair_loss

SCALES = 0.5, 2.0


def drawn(b, c, d, ranks, dtype=torch.float64, seed=0):
    """The tensors of both sides and the bias, which require a gradient where they learn (of rank 0 all); labels."""
    generator = torch.Generator().manual_seed(seed + b + c)

    def normal(*shape):
        return (0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    sides = [
        [normal(n, d), normal(n, r).requires_grad_(), normal(d, r).requires_grad_()]
        if r
        else [normal(n, d).requires_grad_()]
        for n, r in zip((b, c), ranks)
    ]
    return *sides, normal(c).requires_grad_(), torch.randint(c, (b,), generator=generator)


def loss_of(x, y, bias, labels):
    sides = [Rows(*side, *([scale] if len(side) > 1 else [])) for side, scale in zip((x, y), SCALES)]
    return pair_loss(*sides, bias, labels)


def plain_loss(x, y, bias, labels):
    def whole(side, scale):
        return side[0] + scale * side[1] @ side[2].T if len(side) > 1 else side[0]

    scores = whole(x, SCALES[0]) @ whole(y, SCALES[1]).T + bias
    return F.cross_entropy(scores, labels, reduction="sum")


def learning(x, y, bias):
    return [tensor for tensor in (*x, *y, bias) if tensor.requires_grad]


@pytest.mark.parametrize("ranks", [(0, 0), (2, 3), (2, 0), (0, 1), (5, 5)])  # the last: no narrower than the rows
def test_gradients_are_those_of_autograd_in_float64(ranks):
    x, y, bias, labels = drawn(9, 7, 8, ranks)
    tensors = learning(x, y, bias)
    found = torch.autograd.grad(loss_of(x, y, bias, labels) * 0.3, tensors)
    wanted = torch.autograd.grad(plain_loss(x, y, bias, labels) * 0.3, tensors)
    for one, other in zip(found, wanted):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_it_passes_gradcheck_in_float64():
    x, y, bias, labels = drawn(4, 5, 6, (2, 1))
    tensors = learning(x, y, bias)
    assert torch.autograd.gradcheck(lambda *_: loss_of(x, y, bias, labels), tensors)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("b", "c", "d", "ranks"), [(1, 2, 1, (0, 0)), (33, 70, 20, (8, 8)), (300, 259, 64, (8, 0)),
                                                    (65, 1100, 40, (20, 16)), (17, 48, 24, (0, 0))])  # fmt: skip
def test_float32_is_as_near_to_float64_as_its_digits_allow(b, c, d, ranks, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernel, "library", lambda: None)
    x, y, bias, labels = drawn(b, c, d, ranks, torch.float32)
    tensors = learning(x, y, bias)
    loss = loss_of(x, y, bias, labels)
    found = torch.autograd.grad(loss, tensors)
    wide = [
        [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in side] for side in (x, y, [bias])
    ]
    wanted = plain_loss(wide[0], wide[1], wide[2][0], labels)
    right = torch.autograd.grad(wanted, learning(wide[0], wide[1], wide[2][0]))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for one, other in zip(found, right):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())  # scores of up to 50
    with torch.no_grad():
        assert float(loss_of(x, y, bias, labels)) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("side", [0, 1, 2])
def test_only_what_learns_gets_a_gradient(side):
    x, y, bias, labels = drawn(20, 30, 12, (3, 4), torch.float32)
    parts = [x, y, [bias]]
    for k, part in enumerate(parts):
        for tensor in part:
            tensor.requires_grad_(tensor.requires_grad and k == side)
    wanted = torch.autograd.grad(plain_loss(x, y, bias, labels), learning(x, y, bias))
    loss_of(x, y, bias, labels).backward()
    for k, part in enumerate(parts):
        assert all((tensor.grad is not None) == (k == side and tensor.requires_grad) for tensor in part)
    for tensor, right in zip(learning(x, y, bias), wanted):
        assert torch.allclose(tensor.grad, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native", [True, False])
def test_a_side_that_is_frozen_as_a_whole_takes_no_part(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernel, "library", lambda: None)
    x, y, bias, labels = drawn(20, 30, 12, (0, 0), torch.float32)
    x[0].requires_grad_(False)
    y[0].requires_grad_(False)
    loss = loss_of(x, y, bias, labels)
    (found,) = torch.autograd.grad(loss, bias)
    (wanted,) = torch.autograd.grad(plain_loss(x, y, bias, labels), bias)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_threads_change_no_more_than_rounding_and_a_call_can_be_repeated():
    x, y, bias, labels = drawn(150, 90, 24, (4, 4), torch.float32)
    tensors, before, found = learning(x, y, bias), torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            loss = loss_of(x, y, bias, labels)
            found.append([loss.detach(), *torch.autograd.grad(loss, tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(*found[:2]))
    assert all(torch.equal(one, other) for one, other in zip(*found[1:]))


def test_fillers_of_the_sample_get_nothing_and_change_nothing():
    x, y, bias, labels = drawn(40, 50, 16, (4, 4), torch.float32)
    tensors = learning(x, y, bias)
    first = loss_of(x, y, bias, labels)
    found = torch.autograd.grad(first, tensors)
    more = [torch.cat([part, part[-1:].expand(9, -1)]) if len(part) == 50 else part for part in y]
    filled = torch.cat([bias, torch.full((9,), -torch.inf)])
    second = loss_of(x, more, filled, labels)
    again = torch.autograd.grad(second, tensors)
    assert float(first.detach()) == pytest.approx(float(second.detach()), rel=1e-6)
    for one, other in zip(found, again):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_is_taken_in_float32():
    x, y, bias, labels = drawn(12, 20, 16, (2, 2), torch.bfloat16)
    loss = loss_of(x, y, bias, labels)
    assert loss.dtype == torch.float32
    wide = [[tensor.detach().float() for tensor in side] for side in (x, y)]
    assert float(loss.detach()) == pytest.approx(float(plain_loss(*wide, bias.detach().float(), labels)), rel=1e-5)
    assert all(gradient.dtype == torch.bfloat16 for gradient in torch.autograd.grad(loss, learning(x, y, bias)))


@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_finite_is_seen(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernel, "library", lambda: None)
    for bad in (torch.nan, torch.inf):
        x, y, bias, labels = drawn(20, 30, 8, (2, 2), torch.float32)
        x[0][3, 2] = bad
        assert not bool(loss_of(x, y, bias, labels).isfinite())


def test_a_label_outside_is_refused():
    x, y, bias, labels = drawn(3, 5, 4, (1, 1))
    for wrong in (-1, 5):
        labels[1] = wrong
        with pytest.raises(IndexError, match=r"outside 0 \.\. 4"):
            loss_of(x, y, bias, labels)
