"""The fused linear layer against plain autograd, in float64; and what it keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit as lk
from lorakit.kernels.lora import Layer, Ready, lora_group, lora_linear, ready
from lorakit.kernels.products import frozen_linear, input_gradient, linear, pack

RANKS = [1, 8, 16, 17]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)


def tensors(r: int, shape: tuple[int, ...] = (2, 3, 6), o: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(r)
    i = shape[-1]
    sizes = [shape, (o, i), (o,), (r, i), (o, r)]
    return [torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6), (2, 2, 2, 6)], ids=str)
@pytest.mark.parametrize("r", RANKS)
def test_output_and_all_gradients_are_those_of_autograd(r: int, shape: tuple[int, ...], biased: bool) -> None:
    found, wanted = ([t.clone().requires_grad_() for t in tensors(r, shape)] for _ in range(2))
    if not biased:
        found[2] = wanted[2] = None  # type: ignore[call-overload]
    y, z = lora_linear(*found, 0.7), plain(*wanted, 0.7)
    assert y.shape == z.shape
    assert torch.allclose(y, z, atol=1e-12)
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    for one, other in zip(found, wanted):
        if one is not None:
            assert one.grad is not None
            assert torch.allclose(one.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize("r", RANKS)
def test_gradients_are_the_finite_differences(r: int) -> None:
    leaves = tuple(t.requires_grad_() for t in tensors(r))
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, -1.3), leaves)


@pytest.mark.parametrize(
    "learning", [{"a", "b"}, {"x", "a", "b"}, {"a"}, {"b"}, {"x"}, {"weight"}, {"bias"}], ids=sorted
)
def test_only_what_learns_gets_a_gradient(learning: set[str]) -> None:
    names = ("x", "weight", "bias", "a", "b")
    found, wanted = ([t.clone() for t in tensors(3)] for _ in range(2))
    for group in (found, wanted):
        for name, tensor in zip(names, group):
            tensor.requires_grad_(name in learning)
    lora_linear(*found, 0.5).square().sum().backward()
    plain(*wanted, 0.5).square().sum().backward()
    for name, one, other in zip(names, found, wanted):
        assert (one.grad is not None) == (name in learning)
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize("r", RANKS)
def test_without_gradients_the_numbers_are_the_same(r: int) -> None:
    leaves = [t.requires_grad_() for t in tensors(r)]
    with torch.no_grad():
        quiet = lora_linear(*leaves, 0.7)
    assert not quiet.requires_grad
    assert torch.allclose(quiet, lora_linear(*leaves, 0.7), atol=1e-12)


def test_input_is_left_as_it_was_and_may_be_strided() -> None:
    x, weight, bias, a, b = tensors(4, (6, 4, 6))
    strided = x.transpose(0, 1)
    before = strided.clone()
    y = lora_linear(strided, weight, bias, a.requires_grad_(), b.requires_grad_(), 0.7)
    assert torch.allclose(y, plain(before, weight, bias, a, b, 0.7), atol=1e-12)
    assert torch.equal(strided, before)


def test_float32_factors_on_a_bfloat16_layer_get_float32_gradients() -> None:
    x, weight, bias = (t.bfloat16() for t in tensors(8, (64, 32), 48)[:3])
    a, b = (t.float().requires_grad_() for t in tensors(8, (64, 32), 48)[3:])
    y = lora_linear(x, weight, bias, a, b, 0.25)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    plain(x.double(), weight.double(), bias.double(), *exact, 0.25).sum().backward()
    for factor, wanted in zip((a, b), exact):
        assert factor.grad is not None
        assert factor.grad.dtype == torch.float32
        assert wanted.grad is not None
        # bfloat16 products of 64 rows: each rounded at 2^-8, errors add up like a random walk
        assert float((factor.grad.double() - wanted.grad).abs().max()) < 0.03 * float(wanted.grad.abs().max())


# ---------------------------------------------------------------- memory


class QueryKeyValue(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Memory that autograd keeps for the backward pass, the model's own apart, each piece once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    pieces: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(x)
    assert all(output.requires_grad for output in outputs)
    return sum(pieces.values())


@pytest.mark.parametrize("r", [8, 16])
def test_three_layers_on_one_input_keep_it_once_and_three_thin_products(r: int) -> None:
    width, n = 128, 256
    model = QueryKeyValue(width).bfloat16()
    lk.attach(model, lk.plan(model, rank=r))
    x = torch.randn(2, n // 2, width).bfloat16().requires_grad_()
    padded = r  # both are multiples of 8, the narrowest that half precision is multiplied by
    assert saved_bytes(model, x) == 2 * n * width + 3 * 2 * n * padded


def test_where_every_a_is_frozen_the_input_is_not_kept() -> None:
    n, width = 256, 128
    x, kept = torch.randn(2, n // 2, width).bfloat16().requires_grad_(), {}
    for method in ("lora", "lora-fa"):
        model = QueryKeyValue(width).bfloat16()
        lk.attach(model, lk.plan(model, 8, method=method))
        kept[method] = saved_bytes(model, x)
    assert kept["lora"] - kept["lora-fa"] == 2 * n * width


def test_the_fused_drive_keeps_less_than_the_hook_does() -> None:
    x = torch.randn(2, 128, 128).bfloat16().requires_grad_()
    kept = {}
    for drive in ("fused", "hook"):
        model = QueryKeyValue(128).bfloat16()
        lk.attach(model, lk.plan(model, rank=16), drive=drive)
        kept[drive] = saved_bytes(model, x)
    assert kept["fused"] < kept["hook"]


def group(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Layer]]:
    """An input and layers that read it, of unlike widths, ranks and scales."""
    g = torch.Generator().manual_seed(n)
    i, layers = 6, []
    for k in range(n):
        o, r = 5 + k, 2 + 3 * k
        w, c, a, b = (
            torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((o, i), (o,), (r, i), (o, r))
        )
        layers.append(Layer(w, None if k == 1 else c, a, b, 0.5 + k))
    return torch.randn(7, i, generator=g, dtype=torch.float64).to(dtype), layers


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_gains_have_the_gradients_of_autograd(n: int, merges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.kernels.lora._pays_to_merge", lambda *_: merges)
    x, layers = group(n)
    gains = [torch.randn(len(layer.b), dtype=torch.float64).sign() * (0.5 + k) for k, layer in enumerate(layers)]

    def leaves() -> list[Tensor]:
        factors = [t for layer, gain in zip(layers, gains) for t in (layer.a, layer.b, layer.bias, gain)]
        return [t.clone().requires_grad_() for t in (x, *factors) if t is not None]

    found, alone = leaves(), leaves()

    def gained(own: list[Tensor]) -> list[Layer]:
        rest = iter(own[1:])
        made = []
        for layer in layers:
            a, b = next(rest), next(rest)
            bias = None if layer.bias is None else next(rest)
            made.append(layer._replace(a=a, b=b, bias=bias, gain=next(rest)))
        return made

    ys = lora_group(found[0], gained(found))
    zs = [
        plain(alone[0], layer.weight, None, *layer[2:5]) * layer.gain + (0 if layer.bias is None else layer.bias)
        for layer in gained(alone)
    ]
    for y, z in zip(ys, zs):
        assert torch.allclose(y, z, atol=1e-12)
    sum((y.square().sum() for y in ys), torch.zeros(())).backward()
    sum((z.square().sum() for z in zs), torch.zeros(())).backward()
    for one, other in zip(found, alone):
        assert torch.allclose(one.grad, other.grad, atol=1e-9)  # type: ignore[arg-type]
    windows = [torch.ones_like(gain) for gain in gains]
    factors = [(torch.zeros_like(layer.a), torch.zeros_like(layer.b)) for layer in layers]
    with torch.no_grad():
        now = ready([layer[2:5] for layer in layers], torch.float64)._replace(into=tuple(factors), gains=tuple(windows))
    own = [
        layer._replace(a=layer.a.requires_grad_(), b=layer.b.requires_grad_(), gain=gain.requires_grad_())
        for layer, gain in zip(layers, gains)
    ]
    sum((y.square().sum() for y in lora_group(x, own, now)), torch.zeros(())).backward()
    wanted = [layer.gain.grad for layer in gained(alone)]
    for window, gradient in zip(windows, wanted):
        assert torch.allclose(window, gradient + 1, atol=1e-9)


@pytest.mark.parametrize("given", [True, False], ids=["ready", "cast"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_group_gives_what_its_layers_give_alone(n: int, given: bool) -> None:
    x, layers = group(n)
    found = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for layer in layers for t in (layer.a, layer.b))]
    alone = [t.detach().clone().requires_grad_() for t in found]

    def with_factors(leaves: list[Tensor]) -> list[Layer]:
        return [layer._replace(a=a, b=b) for layer, a, b in zip(layers, leaves[1::2], leaves[2::2])]

    now = ready([layer[2:5] for layer in with_factors(found)], torch.float64) if given else None
    now = now and Ready(now.a.detach(), tuple(b.detach() for b in now.b))
    ys = lora_group(found[0], with_factors(found), now)
    zs = [plain(alone[0], *layer[:5]) for layer in with_factors(alone)]
    for k, (y, z) in enumerate(zip(ys, zs)):
        assert torch.allclose(y, z, atol=1e-12), k
    sum((y.square().sum() for y in ys), torch.zeros(())).backward()
    sum((z.square().sum() for z in zs), torch.zeros(())).backward()
    for one, other in zip(found, alone):
        assert torch.allclose(one.grad, other.grad, atol=1e-10)  # type: ignore[arg-type]


def test_gradients_can_be_added_where_they_belong() -> None:
    x, layers = group(3)
    layers = [layer._replace(a=layer.a.requires_grad_(), b=layer.b.requires_grad_()) for layer in layers]
    factors = [t for layer in layers for t in (layer.a, layer.b)]
    wanted = torch.autograd.grad(sum(y.square().sum() for y in lora_group(x, layers)), factors)  # type: ignore[arg-type]
    windows = [torch.ones_like(t) for t in factors]
    with torch.no_grad():
        now = ready([layer[2:5] for layer in layers], torch.float64)
    now = now._replace(into=tuple(zip(windows[::2], windows[1::2])))
    sum(y.square().sum() for y in lora_group(x, layers, now)).backward()  # type: ignore[union-attr]
    for window, gradient, factor in zip(windows, wanted, factors):
        assert factor.grad is None
        assert torch.allclose(window, gradient + 1, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_a_packed_weight_are_those_with_the_plain_one(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, c, dy = (torch.randn(s, generator=g).to(dtype) for s in ((9, 80), (96, 80), (96,), (9, 96)))
    packed = pack(w)
    assert (packed is not None) == (dtype == torch.bfloat16)
    exact = F.linear(x.double(), w.double(), c.double())
    bound = 1e-4 if dtype == torch.float32 else 0.15  # 80 terms of size 1, rounded once to bfloat16
    assert float((linear(x, w, c, packed).double() - exact).abs().max()) < bound
    back = dy.double() @ w.double()
    assert float((input_gradient(dy, w, packed).double() - back).abs().max()) < bound
    onto = torch.ones(9, 80, dtype=dtype)
    assert float((input_gradient(dy, w, packed, onto).double() - back - 1).abs().max()) < bound
    x.requires_grad_()
    y = frozen_linear(x, w, c, packed)
    assert torch.equal(y, linear(x, w, c, packed))
    y.backward(dy)
    assert torch.equal(x.grad, input_gradient(dy, w, packed))  # type: ignore[arg-type]
