"""Attention inside segments against torch's in float64, forward and backward, with the C kernel and without."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.attach.kernels import segments as kernel
from lorakit.attach.kernels.native import library, reason

LENGTHS = [(5, 1, 33, 70, 16), (1,), (32, 64), (7,), (3, 3, 129)]


def tensors(lengths: tuple[int, ...], heads: int, shared: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as columns of one matrix, (heads, tokens, d), and where the segments begin."""
    n = sum(lengths)
    whole = torch.randn(n, (heads + 2 * shared) * d, generator=torch.Generator().manual_seed(n)).to(dtype)
    parts = whole.split([heads * d, shared * d, shared * d], 1)
    q, k, v = (part.view(n, -1, d).transpose(0, 1) for part in parts)
    return q, k, v, torch.tensor([0, *itertools.accumulate(lengths)])


def wanted(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool) -> Tensor:
    blocks = []
    for begin, end in itertools.pairwise(starts.tolist()):
        a, b, c = (x[None, :, begin:end] for x in (q, k, v))
        blocks.append(F.scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale, enable_gqa=True)[0])
    return torch.cat(blocks, 1)


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "library", lambda: None)
    return str(request.param)


def test_the_kernel_was_compiled_here() -> None:
    assert library() is not None, reason()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "shared", "d"), [(4, 4, 32), (4, 2, 24), (3, 1, 7), (2, 2, 128)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradients_are_those_of_attention_in_each_segment(
    way: str, lengths: tuple[int, ...], heads: int, shared: int, d: int, dtype: torch.dtype, causal: bool
) -> None:
    q, k, v, starts = tensors(lengths, heads, shared, d, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found = kernel.segment_attention(*leaves, starts, d**-0.5, causal)
    expected = wanted(*exact, starts, d**-0.5, causal)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(found, leaves, dy)
    exact_gradients = torch.autograd.grad(expected, exact, dy.double())
    # float32 inside; bfloat16 rounds the output (2^-9 of values up to 4), and torch's own rounds the weights too
    bound = 5e-6 if dtype == torch.float32 else 0.03 if way == "native" else 0.15
    for one, other in zip((found, *gradients), (expected, *exact_gradients)):
        assert one.dtype == dtype
        assert float((one.double() - other).detach().abs().max()) < bound


@pytest.mark.parametrize("causal", [True, False])
def test_some_rows_may_ask_for_themselves(way: str, causal: bool) -> None:
    q, k, v, starts = tensors((5, 1, 40, 9), 4, 2, 16, torch.float32)
    places = torch.tensor([0, 4, 1, 2, 30, 0, 8])  # two in the first text, none in the second, three in the third
    rows = places + torch.tensor([0, 0, 6, 6, 6, 46, 46])
    asking = kernel.Asking(torch.tensor([0, 2, 2, 5, 7]), places)
    leaves, others = ([x.detach().clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    found = kernel.segment_attention(leaves[0][:, rows], *leaves[1:], starts, 0.25, causal, asking)
    expected = kernel.segment_attention(*others, starts, 0.25, causal)[:, rows]
    assert torch.allclose(found, expected, atol=1e-6)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, others, dy)):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 16, 50])
def test_a_window_hides_what_lies_further_back(way: str, window: int) -> None:
    q, k, v, starts = tensors((5, 1, 40), 4, 2, 16, torch.float32)
    leaves, exact = ([x.detach().to(t).requires_grad_() for x in (q, k, v)] for t in (torch.float32, torch.float64))
    found = kernel.segment_attention(*leaves, starts, 0.25, True, None, window)
    rows = torch.arange(46)
    owners = torch.repeat_interleave(torch.arange(3), starts.diff())
    back = rows[:, None] - rows
    mask = (owners[:, None] == owners) & (back >= 0) & (back < window)
    expected = F.scaled_dot_product_attention(*(x[None] for x in exact), mask, scale=0.25, enable_gqa=True)[0]
    assert torch.allclose(found.double(), expected, atol=1e-6)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, exact, dy.double())):
        assert torch.allclose(one.double(), other, atol=1e-5)


def test_gradients_of_joined_inputs_are_columns_of_one_matrix() -> None:
    q, k, v, starts = tensors((5, 9), 2, 2, 16, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = kernel.segment_attention(*leaves, starts, 0.25, False)
    dq, dk, dv = torch.autograd.grad(y.sum(), leaves)
    assert dk.data_ptr() - dq.data_ptr() == dv.data_ptr() - dk.data_ptr() == 32 * 4


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_a_number_that_is_none_shows_up_and_stays_in_its_segment(place: str) -> None:
    q, k, v, starts = tensors((4, 6), 1, 1, 16, torch.float32)
    {"q": q, "k": k, "v": v}[place][0, 1, 3] = float("nan")
    y = kernel.segment_attention(q, k, v, starts, 0.25, False)
    assert bool(y[:, 1].isnan().any())
    assert not bool(y[:, 4:].isnan().any())


def test_large_scores_do_not_overflow() -> None:
    q, k, v, starts = tensors((9, 17), 2, 2, 16, torch.float32)
    y = kernel.segment_attention(q * 1e4, k * 1e4, v, starts, 1.0, True)
    expected = wanted((q * 1e4).double(), (k * 1e4).double(), v.double(), starts, 1.0, True)
    assert torch.allclose(y.double(), expected, atol=1e-4)
