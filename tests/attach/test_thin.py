"""The gradient of a factor against torch's in float64, with the C function and without."""

import pytest
import torch
from torch import Tensor

from lorakit.attach.kernels import thin as kernel

SHAPES = [(1, 32, 8), (7, 64, 2), (16, 96, 24), (33, 384, 16), (9, 50, 8), (5, 31, 3)]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "_known", lambda: False)
    return str(request.param)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def near(found: Tensor, exact: Tensor) -> bool:
    return float((found.double() - exact).abs().max()) <= 0.01 * float(exact.abs().max()) + 1e-6  # 2^-8, and a little


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("n", "width", "r"), SHAPES)
def test_gradients_are_added_where_they_belong(way: str, n: int, width: int, r: int, turned: bool) -> None:
    s, y = numbers(n, r + 3), numbers(n, width)
    into = torch.ones(width, r).T if turned else torch.ones(r, width)
    exact = 1 + 0.5 * (s.double().T @ y.double())[:r]
    kernel.add_gradient(into, s, y, 0.5)
    assert near(into, exact)


def test_numbers_that_are_none_are_kept() -> None:
    s, y, into = numbers(20, 8), numbers(20, 64), torch.zeros(8, 64)
    y[3, 5] = float("nan")
    kernel.add_gradient(into, s, y)
    assert into.isnan().any(0).nonzero().flatten().tolist() == [5]
