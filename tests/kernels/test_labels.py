"""The loss of an output head against torch's cross-entropy in float64, in one chunk and in several."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels import labels as kernel


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "library", lambda: None)
    monkeypatch.setattr(kernel, "rows_at_once", lambda n: 32)
    return str(request.param)


def tensors(n: int, d: int, o: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    hidden, weight = (torch.randn(size, generator=g).to(dtype) for size in ((n, d), (o, d)))
    return hidden, weight, torch.randint(o, (n,), generator=g), torch.randn(o, generator=g).to(dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d", "o"), [(1, 8, 5), (70, 16, 37), (32, 24, 64), (65, 8, 1000)])
def test_loss_and_gradient_are_those_of_cross_entropy(
    way: str, n: int, d: int, o: int, dtype: torch.dtype, biased: bool
) -> None:
    hidden, weight, labels, bias = tensors(n, d, o, dtype)
    c = bias if biased else None
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(exact, weight.double(), None if c is None else c.double())
    losses = kernel.label_losses(hidden, weight, labels, c)
    expected = F.cross_entropy(logits, labels, reduction="none")
    shares = torch.linspace(-1, 2, n)  # every row's loss counts otherwise
    losses.backward(shares)
    expected.backward(shares.double())
    near = 1e-5 if dtype == torch.float32 else 0.02  # logits of size 10 rounded to 8 bits
    loss = losses.detach().sum()
    assert abs(float(loss) / float(expected.detach().sum()) - 1) < near
    size = float(exact.grad.abs().max())  # type: ignore[union-attr]
    assert float((hidden.grad.double() - exact.grad).abs().max()) < (1e-5 if dtype == torch.float32 else 0.05) * size  # type: ignore[union-attr]
    scores = kernel.label_scores(hidden.detach(), weight, labels, c)
    assert torch.allclose(scores[:, 0], losses.detach(), rtol=1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert torch.equal(scores[:, 1].bool(), logits.argmax(1) == labels)


def test_of_equal_logits_the_first_is_the_answer(way: str) -> None:
    labels = torch.tensor([0, 3, 39])
    found = kernel.label_scores(torch.ones(3, 8), torch.ones(40, 8), labels)[:, 1]
    assert found.tolist() == [1, 0, 0]


def test_a_head_that_learns_gets_its_gradient(way: str) -> None:
    hidden, weight, labels, _ = tensors(40, 8, 20, torch.float32)
    weight.requires_grad_()
    found = torch.autograd.grad(kernel.label_losses(hidden, weight, labels).sum(), weight)[0]
    wanted = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), weight)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_numbers_that_are_none_are_seen(way: str) -> None:
    hidden, weight, labels, _ = tensors(3, 8, 40, torch.float32)
    hidden[1, 2] = float("nan")
    assert kernel.label_scores(hidden, weight, labels)[:, 0].isnan().tolist() == [False, True, False]


def test_no_row_at_all_is_a_loss_of_zero(way: str) -> None:
    hidden, weight, labels, _ = tensors(4, 8, 20, torch.float32)
    none = hidden[:0].requires_grad_()
    loss = kernel.label_losses(none, weight, labels[:0]).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert kernel.label_scores(hidden[:0], weight, labels[:0]).shape == (0, 2)


def test_a_label_outside_the_head_is_refused() -> None:
    hidden, weight, labels, _ = tensors(4, 8, 20, torch.float32)
    with pytest.raises(IndexError, match=r"outside 0 \.\. 19"):
        kernel.label_losses(hidden, weight, labels + 20)


def test_states_and_labels_of_unlike_numbers_are_refused() -> None:
    hidden, weight, labels, _ = tensors(4, 8, 20, torch.float32)
    for run in (kernel.label_losses, kernel.label_scores):
        with pytest.raises(ValueError, match="4 states and 3 labels"):
            run(hidden, weight, labels[:3])
