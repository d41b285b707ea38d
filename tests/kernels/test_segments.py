"""Attention inside segments against one dense matrix in float64, both ways, with the C kernel and without."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels import segments as kernel
from lorakit.kernels.native import library, reason
from lorakit.kernels.segments import Asking, Scores

LENGTHS = [(5, 1, 33, 70, 16), (1,), (32, 64), (7,), (3, 3, 129)]


def tensors(lengths: tuple[int, ...], heads: int, shared: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as columns of one matrix, (heads, tokens, d), and where the segments begin."""
    n = sum(lengths)
    whole = torch.randn(n, (heads + 2 * shared) * d, generator=torch.Generator().manual_seed(n)).to(dtype)
    parts = whole.split([heads * d, shared * d, shared * d], 1)
    q, k, v = (part.view(n, -1, d).transpose(0, 1) for part in parts)
    return q, k, v, torch.tensor([0, *itertools.accumulate(lengths)])


def rows_of(starts: Tensor) -> tuple[Tensor, Tensor]:
    """The segment of every row, and its place there."""
    owners = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return owners, torch.arange(int(starts[-1])) - starts[owners]


def wanted(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scores: Scores, asking: Asking | None = None) -> Tensor:
    """All rows against all rows, and what lies in other segments hidden."""
    owners, places = rows_of(starts)
    asks, at = rows_of(starts if asking is None else asking.starts)
    at = at if asking is None or asking.places is None else asking.places
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    x, distance = scores.scale * q @ k.mT, places - at[:, None]
    if scores.bias is not None:
        middle = scores.bias.shape[1] // 2
        x = x + scores.bias.double()[:, (distance + middle).clamp(0, 2 * middle)]
    if scores.softcap:
        x = scores.softcap * torch.tanh(x / scores.softcap)
    seen = asks[:, None] == owners
    if scores.causal:
        seen &= distance <= 0
    if scores.window:
        seen &= distance > -scores.window
    return x.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def agree(inputs: tuple[Tensor, ...], starts: Tensor, scores: Scores, asking: Asking | None, bound: float) -> None:
    """Output and gradients of q, k, v are those of the dense way in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = kernel.segment_attention(*leaves, starts, scores, asking)
    expected = wanted(*exact, starts, scores, asking)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    gradients = torch.autograd.grad(found, leaves, dy)
    exact_gradients = torch.autograd.grad(expected, exact, dy.double())
    for one, other in zip((found, *gradients), (expected, *exact_gradients)):
        assert one.dtype == inputs[0].dtype
        assert float((one.double() - other).detach().abs().max()) < bound


def bias_for(starts: Tensor, heads: int, more: int = 0) -> Tensor:
    m = int(starts.diff().max()) + more
    return 2 * torch.randn(heads, 2 * m - 1, generator=torch.Generator().manual_seed(2))


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
    *inputs, starts = tensors(lengths, heads, shared, d, dtype)
    # float32 inside; bfloat16 rounds the output (2^-9 of values up to 4), and torch's own rounds the weights too
    bound = 5e-6 if dtype == torch.float32 else 0.03 if way == "native" else 0.15
    agree(tuple(inputs), starts, Scores(d**-0.5, causal), None, bound)


SOME = Asking(torch.tensor([0, 2, 2, 5, 7]), torch.tensor([0, 4, 1, 2, 30, 0, 8]))
HOW = [
    pytest.param({}, id="full"),
    pytest.param({"causal": True}, id="causal"),
    *(pytest.param({"causal": True, "window": window}, id=f"window {window}") for window in (1, 3, 16, 50)),
    pytest.param({"softcap": 1.5}, id="softcap"),
    pytest.param({"softcap": 1.5, "causal": True, "window": 3}, id="softcap, window"),
    pytest.param({"bias": 0}, id="bias"),
    pytest.param({"bias": 3, "causal": True}, id="wide bias, causal"),
    pytest.param({"bias": 0, "softcap": 1.5, "causal": True, "window": 9}, id="all"),
]


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("how", HOW)
def test_every_way_to_score_is_that_of_one_dense_matrix(way: str, how: dict[str, Any], shared: int, some: bool) -> None:
    q, k, v, starts = tensors((5, 1, 40, 9), 4, shared, 16, torch.float32)  # two rows of the first, three of the third
    if some:
        q = q[:, SOME.places + torch.repeat_interleave(starts[:-1], SOME.starts.diff())]
    bias = bias_for(starts, 4, how["bias"]) if "bias" in how else None
    # float32 with scores of size 10: 3e-6 was seen, with the kernel and without
    agree((q, k, v), starts, Scores(0.5, **{**how, "bias": bias}), SOME if some else None, 1e-5)


def test_a_softcap_holds_for_large_scores_and_leaves_small_ones_alone(way: str) -> None:
    q, k, v, starts = tensors((9, 17), 2, 2, 16, torch.float32)
    for scale in (1e4, 1e-4):
        found = kernel.segment_attention(q, k, v, starts, Scores(scale, softcap=30.0))
        expected = wanted(q.double(), k.double(), v.double(), starts, Scores(scale, softcap=30.0))
        assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("shared", [4, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_other_texts_may_ask(way: str, shared: int, biased: bool) -> None:
    _, k, v, starts = tensors((5, 1, 40, 9, 0), 4, shared, 16, torch.float32)
    asking = Asking(torch.tensor([0, 2, 37, 37, 46, 46]))  # 2 rows ask 5, 35 ask one, none asks 40, 9 ask 9
    q = torch.randn(46, 4, 16, generator=torch.Generator().manual_seed(5)).transpose(0, 1)
    agree((q, k, v), starts, Scores(0.5, bias=bias_for(starts, 4) if biased else None), asking, 1e-5)


@pytest.mark.parametrize(
    ("scores", "asking", "words"),
    [
        (Scores(1.0, window=2), None, "window of 2 rows"),
        (Scores(1.0, causal=True), Asking(torch.tensor([0, 3, 8, 8])), "causal must be False"),
        (Scores(1.0), Asking(torch.tensor([0, 3, 5, 8])), "without keys"),
        (Scores(1.0, bias=torch.zeros(2, 9)), None, "2 heads and 9 distances"),
        (Scores(1.0, bias=torch.zeros(1, 11)), None, "must be (2, 11)"),
        (Scores(1.0, bias=torch.zeros(2, 12)), None, "12 distances"),
        (Scores(1.0, bias=torch.zeros(2, 11)), Asking(torch.tensor([0, 1, 8, 8])), "up to 7 rows"),
        (Scores(1.0, bias=torch.zeros(2, 11, requires_grad=True)), None, "it learns"),
    ],
)
def test_what_does_not_fit_is_told(way: str, scores: Scores, asking: Asking | None, words: str) -> None:
    q, k, v, starts = tensors((2, 6, 0), 2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=re.escape(words)):
        kernel.segment_attention(q, k, v, starts, scores, asking)


def test_gradients_of_joined_inputs_are_columns_of_one_matrix() -> None:
    q, k, v, starts = tensors((5, 9), 2, 2, 16, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = kernel.segment_attention(*leaves, starts, Scores(0.25))
    dq, dk, dv = torch.autograd.grad(y.sum(), leaves)
    assert dk.data_ptr() - dq.data_ptr() == dv.data_ptr() - dk.data_ptr() == 32 * 4


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_a_number_that_is_none_shows_up_and_stays_in_its_segment(place: str) -> None:
    q, k, v, starts = tensors((4, 6), 1, 1, 16, torch.float32)
    {"q": q, "k": k, "v": v}[place][0, 1, 3] = float("nan")
    y = kernel.segment_attention(q, k, v, starts, Scores(0.25))
    assert bool(y[:, 1].isnan().any())
    assert not bool(y[:, 4:].isnan().any())


def test_large_scores_do_not_overflow() -> None:
    q, k, v, starts = tensors((9, 17), 2, 2, 16, torch.float32)
    y = kernel.segment_attention(q * 1e4, k * 1e4, v, starts, Scores(1.0, True))
    expected = wanted((q * 1e4).double(), (k * 1e4).double(), v.double(), starts, Scores(1.0, True))
    assert torch.allclose(y.double(), expected, atol=1e-4)
