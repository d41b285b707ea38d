"""Activation and norm in one reading, against torch in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import rows as kernel


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "takes", lambda _: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 50), (2, 3, 64), (5000,)], ids=str)
def test_gelu(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, z = kernel.gelu_tanh(x), F.gelu(exact, approximate="tanh")
    y.sum().backward()
    z.sum().backward()
    bound = 2e-6 if dtype == torch.float32 else 0.04  # values up to 15, eight bits
    assert float((y.double() - z).detach().abs().max()) < bound
    assert float((x.grad.double() - exact.grad).abs().max()) < bound  # type: ignore[union-attr]


def test_gelu_far_out_and_at_what_is_no_number() -> None:
    x = torch.tensor([-1e30, -60.0, 60.0, 1e10, float("nan")], requires_grad=True)
    y = kernel.gelu_tanh(x)
    y.sum().backward()
    assert y.detach()[:4].tolist() == [0.0, 0.0, 60.0, 1e10]
    assert x.grad is not None
    assert x.grad[1:3].tolist() == [0.0, 1.0]
    assert bool(y.detach()[4].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16), (3, 5, 50), (1, 7)], ids=str)
def test_rms_norm(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 3).to(dtype).requires_grad_()
    weight, dy = torch.randn(shape[-1], generator=g), torch.randn(shape, generator=g).to(dtype)
    exact = x.detach().double().requires_grad_()
    y, z = kernel.rms_norm(x, weight, 1e-3), F.rms_norm(exact, weight.shape, weight.double(), 1e-3)
    y.backward(dy)
    z.backward(dy.double())
    bound = 5e-6 if dtype == torch.float32 else 0.05
    assert float((y.double() - z).detach().abs().max()) < bound
    assert float((x.grad.double() - exact.grad).abs().max()) < bound  # type: ignore[union-attr]
