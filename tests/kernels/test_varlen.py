"""Which attention runs where, and that torch's `varlen_attn` is asked for what ours means. It is played on the CPU."""

from typing import Any

import pytest
import torch
from test_segments import agree, tensors
from torch import Tensor

from lorakit.kernels import segments as kernel
from lorakit.kernels import varlen
from lorakit.kernels.segments import Asking, Scores


def played(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's documentation says of `varlen_attn`, text by text: rows, heads, d."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    shared = query.shape[1] // key.shape[1]
    assert enable_gqa is (shared > 1)
    found = []
    for n in range(len(cu_seq_q) - 1):
        q, k, v = (
            x[s[n] : s[n + 1]].transpose(0, 1).float()
            for x, s in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
        distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
        left, right = (1 << 30 if side < 0 else side for side in window_size)
        hidden = (distance > right) | (distance < -left)
        found.append((scale * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(found, 1).transpose(0, 1).to(query.dtype)


@pytest.fixture
def calls(monkeypatch) -> list[Any]:
    """The stand-in, and a note of every call."""
    seen: list[Any] = []
    monkeypatch.setattr(varlen, "has_varlen", lambda _: True)
    monkeypatch.setattr(varlen, "varlen", lambda: lambda *given, **more: (seen.append(more), played(*given, **more))[1])
    return seen


@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, causal=True), Scores(0.3, causal=True, window=5)])
@pytest.mark.parametrize("shared", [4, 2, 1])
def test_packed_rows_and_their_gradients_are_those_of_float64(calls, scores, shared):
    q, k, v, starts = tensors((5, 1, 33, 16), 4, shared, 8, torch.float16)  # float16: not for the C kernel
    agree((q, k, v), starts, scores, None, 5e-3)
    assert len(calls) == 1


def test_rows_of_other_texts_and_some_of_the_rows_ask_it_too(calls):
    q, k, v, starts = tensors((5, 9, 33, 16), 2, 2, 8, torch.float16)
    agree((q[:, :12], k, v), starts, Scores(0.3), Asking(torch.tensor([0, 4, 4, 7, 12])), 5e-3)
    rows = torch.tensor([2, 6, 7, 50])
    few = Asking(torch.tensor([0, 1, 3, 3, 4]), torch.tensor([2, 1, 2, 3]))
    agree((q[:, rows], k, v), starts, Scores(0.3, causal=True), few, 5e-3)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("d", "dtype", "scores"),
    [
        (8, torch.float64, Scores(0.3)),
        (12, torch.float16, Scores(0.3)),
        (264, torch.float16, Scores(0.06)),
        (8, torch.float16, Scores(0.3, causal=True, softcap=5.0)),
        (8, torch.float16, Scores(0.3, bias=torch.zeros(2, 17))),
    ],
)
def test_what_it_does_not_take_runs_by_length(calls, d, dtype, scores):
    q, k, v, starts = tensors((5, 9), 2, 2, d, dtype)
    agree((q, k, v), starts, scores, None, 5e-3)
    assert not calls


def test_where_segments_begin_is_sent_once_for_all_layers(calls):
    q, k, v, starts = tensors((5, 9), 2, 2, 8, torch.float16)
    kernel.segment_attention(q, k, v, starts, Scores(0.3))
    first = varlen._there(starts, q.device)[0]
    assert varlen._there(starts, q.device)[0] is first
    assert varlen._there(starts.clone(), q.device)[0] is not first
