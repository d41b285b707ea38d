"""Kinds: what sort of layer a weight belongs to, and how an `Update` is applied to it. One file per family.

A kind translates between the tensor as the layer stores it and the canonical weight `W (o, i)`, and adds the parts of
an update to the layer's output. It knows nothing of methods. Quantized kinds import their library inside functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.products import Coded
from lorakit.registry import Registry
from lorakit.update import Update


class Shapes(NamedTuple):
    """A weight as its layer stores it, its canonical `(o, i)`, and what stands around them (see LayerSpec)."""

    shape: tuple[int, ...]
    matrix: tuple[int, int]
    batch: tuple[int, ...] = ()
    groups: int = 1
    has_bias: bool = False
    peculiar: str = ""


class Kind(ABC):
    """One family of layers. `specific` orders the look-up: the highest that matches a module wins."""

    name: ClassVar[str]
    layers: ClassVar[str]
    specific: ClassVar[int] = 0
    fusable: ClassVar[bool] = False  # kernels has a form for it
    is_product: ClassVar[bool] = False  # `y = x W^T + bias` over the last dimension of x
    library: ClassVar[str] = ""  # whose layers these are, where it is not torch or Transformers
    family: ClassVar[str] = ""  # what adapters know it as, where that is another kind
    parameter: ClassVar[str] = "weight"  # what the module calls it
    rounds: ClassVar[bool] = False  # it keeps its weight in few bits: writing to it rounds

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_named, (self.name,)  # pickle and deepcopy give the registered one

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Is this module of this kind?"""

    @abstractmethod
    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        """Shapes of the weight."""

    @abstractmethod
    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The stored weight as `W (.., o, i)`, a view where its memory format allows one."""

    @abstractmethod
    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        """`W (.., o, i)` as the layer stores it, a view: the inverse of `canonical`."""

    def operand(self, module: nn.Module, weight: Tensor) -> Tensor | Coded:
        """The stored weight as products take it."""
        return self.canonical(module, weight)

    def tensors(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        """Name -> tensor of everything that the layer keeps of its weight."""
        weight = module._parameters[parameter]
        return {} if weight is None else {parameter: weight}

    def original(self, module: nn.Module) -> Tensor | None:
        """`W (o, i)` before it was quantized, where that is kept."""
        return None

    def numbers(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A plain tensor by which the weight can be told from others."""
        return weight

    def write(self, module: nn.Module, parameter: str, weight: Tensor) -> None:
        """Writes a changed `W (.., o, i)` into the layer, rounded to what it stores."""
        stored = module._parameters[parameter]
        assert stored is not None
        stored.copy_(self.stored(module, weight))

    @abstractmethod
    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        """The layer with weight `a (r, i)` and no bias, applied to `x`."""

    def outer(self, module: nn.Module, h: Tensor, b: Tensor, groups: int = 1) -> Tensor:
        """`b (o, r)` over the channels of `h`, which are the last dimension or, of a convolution's output, the first
        but one."""
        return F.linear(h, b)

    def pair(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The layer with weight `b @ a` and no bias, applied to `x`, without forming the product."""
        return self.outer(module, self.inner(module, x, a), b, getattr(module, "groups", 1))

    def rows(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """What every output is made of, `(n, i)`; None where it cannot be told."""
        return x.reshape(-1, x.shape[-1]) if self.is_product else None

    def by_place(self, h: Tensor) -> Tensor:
        """What an output, or what comes of it by `outer`, has at every place: `(n, channels)`."""
        return h.reshape(-1, h.shape[-1])

    @abstractmethod
    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with canonical weight `weight` and no bias, applied to `x`."""

    def plain(self, module: nn.Module) -> bool:
        """The module computes just what this kind says; False for a subclass with a forward of its own."""
        return True

    def over_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """A vector over output channels, shaped to multiply the output."""
        return vector

    def over_inputs(self, vector: Tensor, x: Tensor) -> Tensor:
        """A vector over input channels, shaped to multiply the input."""
        return vector

    def apply(self, module: nn.Module, x: Tensor, y: Tensor, update: Update) -> Tensor:
        """The output of the changed layer, from its input `x` and the unchanged output `y`."""
        if update.gain_in is not None:
            x = x * self.over_inputs(update.gain_in.to(x.dtype), x)
            y = type(module).forward(module, x)
        bias = getattr(module, "bias", None) if update.gain is not None and not update.gain_covers_bias else None
        if bias is not None:
            y = y - self.over_outputs(bias, y)
        if update.a is not None and update.b is not None:
            compute = x.dtype if x.is_floating_point() else y.dtype
            # the scale goes into `b`: torch 2.13's inductor loses the alpha of an add behind a 2-D product
            a, b = update.a.to(compute), (update.scale * update.b).to(compute)
            y = y + (self.pair(module, x, a, b) if update.is_linear else self._between(module, x, y, a, b, update))
        if update.dense is not None:
            y = y + self.dense(module, x, update.dense.to(y.dtype))
        if update.gain is not None:
            y = y * self.over_outputs(update.gain.to(y.dtype), y)
        if bias is not None:
            y = y + self.over_outputs(bias, y)
        if update.bias is not None:
            y = y + self.over_outputs(update.bias.to(y.dtype), y)
        return y

    def _between(self, module: nn.Module, x: Tensor, y: Tensor, a: Tensor, b: Tensor, update: Update) -> Tensor:
        h = self.outer(module, y, a) if update.on_output else self.inner(module, x, a)
        return self.outer(module, ACTIVATIONS[update.between](h), b)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
KINDS: Registry[Kind] = Registry("kind", "lorakit.kinds")


def kind_named(name: str) -> Kind:
    """The registered kind of this name."""
    return KINDS[name]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None. A weight that is computed (weight_norm, pruning) is nobody's to change."""
    parameters = module._parameters
    if parameters.get("weight") is None and not parameters.keys() & _other_names(len(KINDS)):
        return None
    return next((kind for kind in _by_specificity(len(KINDS)) if kind.matches(module)), None)


@lru_cache(maxsize=1)
def _by_specificity(n_kinds: int) -> tuple[Kind, ...]:
    return tuple(sorted(KINDS, key=lambda kind: (-kind.specific, not kind.fusable)))  # the commonest first


@lru_cache(maxsize=1)
def _other_names(n_kinds: int) -> frozenset[str]:
    return frozenset(kind.parameter for kind in KINDS if kind.parameter != "weight")


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as it stands now."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def same_forward(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """The module's class has this very forward, not one of its own."""
    return type(module).forward is forward
