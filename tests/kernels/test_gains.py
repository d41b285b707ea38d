"""Gains of columns against torch in float64, by the C functions and without them."""

import pytest
import torch
from torch import Tensor

from lorakit.kernels import gains as kernel

SHAPES = [(1, 16), (7, 5), (65, 33), (300, 96)]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "takes", lambda _: False)
    return str(request.param)


def numbers(n: int, o: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    y, dy = (torch.randn(n, o + 3, generator=g).to(dtype)[:, :o] for _ in range(2))
    gain = torch.randn(o, generator=g).sign() * (0.3 + torch.rand(o, generator=g))
    return y, dy, gain, torch.randn(o, generator=g).to(dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "o"), SHAPES)
def test_forward_and_backward_are_those_of_autograd(way: str, n: int, o: int, dtype: torch.dtype, biased: bool) -> None:
    z, dy, gain, shift = numbers(n, o, dtype)
    bias = shift if biased else None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    exact = gain.double().requires_grad_()
    wanted = z.double() * exact + (0 if bias is None else bias.double())
    (slope,) = torch.autograd.grad(wanted, exact, dy.double())
    wanted = wanted.detach()
    y = kernel.add_gain(z.clone(), gain, bias)
    assert y.dtype == dtype
    assert float((y.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
    dgain = torch.ones(o)
    dz = kernel.gain_gradients(dy, y, gain, bias, dgain)
    assert float((dz.double() - dy.double() * gain.double()).abs().max()) <= tolerance * float(dy.abs().max())
    room = tolerance * float(dy.double().norm() * z.double().norm()) / o**0.5 + 1e-6
    assert float((dgain.double() - 1 - slope).abs().max()) <= room
    assert torch.equal(kernel.gain_gradients(dy, y, gain, bias, None), dz)


def test_a_gain_that_hides_what_it_was_given_is_told() -> None:
    assert kernel.fit([])
    assert kernel.fit([torch.tensor([1.0, -0.5]), torch.tensor([0.1])])
    assert not kernel.fit([torch.tensor([1.0, 1e-4])])
    assert not kernel.fit([torch.tensor([1.0, float("nan")])])
