"""Updates made once a step, of methods whose factors are not themselves what the products read.

Between two optimizer steps the factors stand still, and so does what a method makes of them. Here it is made once
(`refresh`), as leaves that stay the same tensors: the passes of a step add to the leaves' gradients, and `settle` takes
the sums to the factors in one backward. Gradients add up, so this is exact. A pair made so runs in a group like any
other; one that is too wide to pay is made a dense change. Parts of an update that are factors as they stand (DoRA's
pair) are no leaves, but these factors themselves.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.slots import Factors, WeightReader, slots_of, switch_of
from lorakit.kinds import Kind
from lorakit.update import Update


class _Standing(WeightReader):
    """Reads a weight that does not learn meanwhile: what follows from it alone is computed once."""

    __slots__ = ("_squares",)

    def __init__(self, module: nn.Module, parameter: str, kind: Kind) -> None:
        super().__init__(module, parameter, kind)
        self._squares: Tensor | None = None

    def row_squares(self) -> Tensor:
        if self._squares is None:
            squares = super().row_squares()
            if self.stored().requires_grad:
                return squares
            self._squares = squares
        return self._squares


class _Made(NamedTuple):
    """`leaves` by the name of their part."""

    factors: Factors
    reader: WeightReader
    leaves: dict[str, Tensor]


class Once:
    """The updates of all layers of `part`, a part of the model `home`, under the adapter `name`."""

    def __init__(self, home: nn.Module, part: nn.Module, name: str) -> None:
        inside = {id(module) for module in part.modules()}
        self._made: list[_Made] = []
        self._live: list[Tensor] = []  # the same with the graphs that lead to their factors, while a step is under way
        for module, parameter, slot in slots_of(home, switch_of(home).names[name]):
            factors = slot._modules.get(name)
            if id(module) not in inside or not isinstance(factors, Factors) or factors.is_plain:
                continue
            reader = _Standing(module, parameter, slot.kind)
            live = _update(factors, reader)
            standing = {id(tensor) for tensor in factors.tensors().values()}
            leaves = {part: _leaf(tensor) for part, tensor in live.parts() if id(tensor) not in standing}
            factors.made = live.with_parts(leaves)
            self._made.append(_Made(factors, reader, leaves))

    def refresh(self) -> None:
        """Makes all updates of what the factors are now; the leaves keep their place."""
        self._live = []
        places: list[Tensor] = []
        found: list[Tensor] = []
        for factors, reader, leaves in self._made:
            live = _update(factors, reader)
            made = [getattr(live, part) for part in leaves]
            places += leaves.values()
            found += made
            if factors.stands:
                self._live += made
        if places:
            with torch.no_grad():
                torch._foreach_copy_(places, found)

    def stand(self, on: bool) -> None:
        """Whether gradients end at the leaves; calls that need none take these in any case."""
        for factors, _, _ in self._made:
            factors.stands = on
        self.refresh()

    def clear(self) -> None:
        """Sets the leaves' gradients to zero, in place."""
        for gradient in self._gradients():
            gradient.zero_()

    def settle(self) -> None:
        """Takes the leaves' gradients to the factors."""
        parts = [tensor for tensor in self._live if tensor.requires_grad]
        if parts:
            torch.autograd.backward(parts, self._gradients(), retain_graph=True)

    def release(self) -> None:
        """Lets every layer make its update by itself again."""
        for factors, _, _ in self._made:
            factors.made, factors.stands = None, False

    def _gradients(self) -> list[Tensor]:
        leaves = [leaf for made in self._made for leaf in made.leaves.values()]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.requires_grad:
        leaf.requires_grad_().grad = torch.zeros_like(leaf)
    return leaf


@torch.enable_grad()
def _update(factors: Factors, reader: WeightReader) -> Update:
    update = factors.method.update(factors.tensors(), factors.scale, reader)
    if update.a is None or update.b is None or not reader.kind.is_product or not update.is_linear:
        return update
    (o, r), i = update.b.shape[-2:], update.a.shape[-1]
    if 4 * r * (o + i) <= o * i:  # four thin products on each side, forward and back, against the gradient of W
        return update
    pair = update.scale * (update.b @ update.a)
    return replace(update, a=None, b=None, scale=1.0, dense=pair if update.dense is None else update.dense + pair)
