"""The normal form: what a method says about one layer, in the only words that the rest of the house understands.

For a layer with canonical weight `W (o, i)` and bias `c`:

    y = gain * ((W + scale * b @ a + dense) (gain_in * x)) + c' + bias,    c' = gain * c if gain_covers_bias else c

A pair may have a function between its factors (`between`), and may read the layer's unchanged output instead of its
input (`on_output`): it is then no change of the weight, and nothing that needs one can be done with it.

Every part but the layer itself is optional. A method fills it (methods/), a kind applies it to a layer (kinds/);
forward, merge, decomposition, report and export read nothing else. Leading batch dimensions are allowed everywhere
(expert weights: `a (e, r, i)`, `b (e, o, r)`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One layer's change. `a (r, i)`, `b (o, r)`, `dense (o, i)`, `gain (o,)`, `gain_in (i,)`, `bias (o,)`."""

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dense: Tensor | None = None
    gain: Tensor | None = None
    gain_in: Tensor | None = None
    bias: Tensor | None = None
    gain_covers_bias: bool = False
    between: str = ""
    on_output: bool = False

    @property
    def is_linear(self) -> bool:
        """A change of the weight and the bias, and nothing else."""
        return not self.between and not self.on_output

    @property
    def is_pair(self) -> bool:
        """Nothing but a low-rank pair: the delta is `scale * b @ a` whatever the weight is."""
        alone = self.dense is None and self.gain is None and self.gain_in is None
        return self.a is not None and alone and self.is_linear

    @property
    def rank(self) -> int:
        """Rows of `a`; 0 without a pair."""
        return 0 if self.a is None else self.a.shape[-2]

    def weight(self, weight: Tensor) -> Tensor:
        """The changed canonical weight (o, i), a new tensor in the dtype of `weight`, rounded once."""
        result = weight
        if self.a is not None and self.b is not None:
            result = result + self.scale * (self.b @ self.a)
        if self.dense is not None:
            result = result + self.dense
        if self.gain_in is not None:
            result = result * self.gain_in.unsqueeze(-2)
        if self.gain is not None:
            result = result * self.gain.unsqueeze(-1)
        return result.to(weight.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        """The change of the canonical weight (o, i)."""
        if self.is_pair and self.a is not None and self.b is not None:
            return self.scale * (self.b @ self.a).to(weight.dtype)
        return self.weight(weight) - weight

    def changed_bias(self, bias: Tensor | None) -> Tensor | None:
        """The changed bias (o,); None where the layer has none and the update brings none."""
        result = bias
        if result is not None and self.gain is not None and self.gain_covers_bias:
            result = result * self.gain.to(result.dtype)
        if self.bias is not None:
            result = self.bias if result is None else result + self.bias.to(result.dtype)
        return result

    def detached(self) -> "Update":
        """The same update cut off from autograd."""
        return self.with_parts({name: part.detach() for name, part in self.parts()})

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every part that there is."""
        for name in ("a", "b", "dense", "gain", "gain_in", "bias"):
            part = getattr(self, name)
            if part is not None:
                yield name, part

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Update":
        """The same with other tensors."""
        return replace(self, **parts)  # type: ignore[arg-type]


class LayerSpec(NamedTuple):
    """What is known of one weight of a model without looking at its numbers.

    `path` is the dotted module name; for a weight that is a bare parameter (experts, attention projections, recurrent
    nets) the module name and the parameter's. `matrix` is the canonical `(o, i)`, `batch` the experts before it,
    `shape` the tensor as the model stores it. `block` is the index in the model's stack of layers. `peculiar` says what
    the formats of others cannot express about this layer; '' mostly.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    batch: tuple[int, ...] = ()
    groups: int = 1
    role: str = "other"
    block: int | None = None
    has_bias: bool = False
    called: bool = True
    tied: tuple[str, ...] = ()
    peculiar: str = ""

    @property
    def n_parameters(self) -> int:
        """Numbers in the weight."""
        total = 1
        for side in self.shape:
            total *= side
        return total

    @property
    def max_rank(self) -> int:
        """The smaller side: the largest rank that can mean anything."""
        return min(self.matrix)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """One layer's part of an adapter: named factors, canonical shapes, and what they mean.

    `kind`, `shape`, `groups` and `peculiar` are those of the weight the factors were made for (see LayerSpec), and
    `matrix` is its canonical `(.., o, i)`, () where a file of others does not tell; `rank` is the declared one.
    """

    method: str
    kind: str
    shape: tuple[int, ...]
    factors: Mapping[str, Tensor]
    rank: int = 0
    scale: float = 1.0
    start: str = ""
    groups: int = 1
    peculiar: str = ""
    matrix: tuple[int, ...] = ()

    @property
    def n_parameters(self) -> int:
        """Numbers in the factors."""
        return sum(factor.numel() for factor in self.factors.values())

    def same_as(self, other: "AdaptedLayer") -> bool:
        """Equal in meaning and bit for bit in every factor."""
        return (
            (self.method, self.kind, self.shape, self.rank, self.scale, self.groups)
            == (other.method, other.kind, other.shape, other.rank, other.scale, other.groups)
            and self.factors.keys() == other.factors.keys()
            and all(same_tensor(factor, other.factors[name]) for name, factor in self.factors.items())
        )


def same_tensor(x: Tensor, y: Tensor) -> bool:
    """Same shape, dtype and bits (NaN equals NaN)."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.detach().cpu().contiguous(), y.detach().cpu().contiguous()
    return bool((x.flatten().view(torch.uint8) == y.flatten().view(torch.uint8)).all())
