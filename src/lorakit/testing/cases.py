"""The small models that the contract tries a method on: one for every kind of layer, torch and lorakit only."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.quant import FORMATS, QuantEmbedding, QuantLinear


class Conv1D(nn.Module):
    """Transformers' layer of this name, so that the contract runs without Transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Three experts in one 3-D weight, read by a product of their own."""

    def __init__(self, name: str, is_transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.name = 3, is_transposed, name
        self.register_parameter(name, nn.Parameter(torch.randn(*((3, 6, 5) if is_transposed else (3, 5, 6)))))

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.name)
        return torch.einsum("ti,eio->teo" if self.is_transposed else "ti,eoi->teo", x, weight)


class Attention(nn.Module):
    """Self-attention by torch's own layer, which reads two matrices without calling a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return result


class Recurrent(nn.Module):
    """A recurrent net and its output alone."""

    def __init__(self, net: nn.RNNBase) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)[0]
        return result


class Case(NamedTuple):
    """A small model, the layer of it that is adapted, its input, and the drives that can mean anything there."""

    name: str
    kind: str
    path: str
    drives: tuple[str, ...]
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.build().to(dtype)

    def batch(self, dtype: torch.dtype) -> Tensor:
        """The input, always the same."""
        generator = torch.Generator().manual_seed(11)
        if self.kind.endswith("embedding"):
            return torch.randint(11, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


def _quantized(form: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
    form_of, weight = FORMATS[form], layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(form_of, form_of.pack(weight), weight.shape[1], weight, layer.padding_idx)
    return QuantLinear(form_of, form_of.pack(weight), weight.shape[1], weight, layer.bias)


def _one(name: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict([(name, make())]))


PADDING = 3  # token of the embedding that is padding
_ALL, _CALLED, _READ = ("hook", "fused", "weight"), ("hook", "weight"), ("weight",)
_down = "down_proj"  # the name of a matrix that ends an MLP: its role decides what some methods train
CASES = (
    Case("linear", "linear", "layer", _ALL, _one("layer", lambda: nn.Linear(6, 5)), (2, 3, 6)),
    Case("linear that ends an MLP", "linear", _down, _ALL, _one(_down, lambda: nn.Linear(6, 5, bias=False)), (4, 6)),
    Case("hf_conv1d", "hf_conv1d", "layer", _ALL, _one("layer", lambda: Conv1D(5, 6)), (2, 3, 6)),
    Case("hf_conv1d that ends an MLP", "hf_conv1d", _down, _ALL, _one(_down, lambda: Conv1D(5, 6)), (2, 3, 6)),
    Case("conv1d", "conv1d", "layer", _CALLED, _one("layer", lambda: nn.Conv1d(3, 4, 3, padding=1)), (2, 3, 7)),
    Case("conv2d", "conv2d", "layer", _ALL, _one("layer", lambda: nn.Conv2d(3, 4, (3, 2), stride=2)), (2, 3, 7, 6)),
    Case(
        "grouped conv2d",
        "conv2d",
        "layer",
        _ALL,
        _one("layer", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular")),
        (2, 4, 5, 5),
    ),
    Case("conv2d that ends an MLP", "conv2d", _down, _ALL, _one(_down, lambda: nn.Conv2d(3, 4, 1)), (2, 3, 4, 4)),
    Case("conv3d", "conv3d", "layer", _CALLED, _one("layer", lambda: nn.Conv3d(2, 3, 2, bias=False)), (1, 2, 4, 3, 3)),
    Case(
        "embedding",
        "embedding",
        "layer",
        _CALLED,
        _one("layer", lambda: nn.Embedding(11, 6, padding_idx=PADDING)),
        (2, 9),
    ),
    Case(
        "int8",
        "quantized_linear",
        "layer",
        _ALL,
        _one("layer", lambda: _quantized("int8", nn.Linear(6, 5))),
        (2, 3, 6),
    ),
    Case("nf4", "quantized_linear", _down, _ALL, _one(_down, lambda: _quantized("nf4", nn.Linear(6, 5))), (4, 6)),
    Case(
        "int8 embedding",
        "quantized_embedding",
        "layer",
        _CALLED,
        _one("layer", lambda: _quantized("int8", nn.Embedding(11, 6, padding_idx=PADDING))),
        (2, 9),
    ),
    Case("attention in_proj", "parameter", "attn.in_proj_weight", _READ, Attention, (2, 3, 6)),
    Case("attention out_proj", "linear", "attn.out_proj", _READ, Attention, (2, 3, 6)),
    Case(
        "experts", "parameter", "moe.gate_up_proj", _READ, _one("moe", lambda: Experts("gate_up_proj", False)), (4, 6)
    ),
    Case("transposed experts", "parameter", "moe.up", _READ, _one("moe", lambda: Experts("up", True)), (4, 6)),
    Case(
        "experts that end an MLP", "parameter", f"moe.{_down}", _READ, _one("moe", lambda: Experts(_down, True)), (4, 6)
    ),
    Case("lstm", "parameter", "net.weight_ih_l0", _READ, lambda: Recurrent(nn.LSTM(6, 4)), (3, 2, 6)),
    Case("gru", "parameter", "net.weight_hh_l0", _READ, lambda: Recurrent(nn.GRU(6, 4)), (3, 2, 6)),
)
