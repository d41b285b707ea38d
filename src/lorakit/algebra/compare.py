"""compare: how much two adapters do the same, layer by layer, from their factors alone.

A cosine tells whether deltas add up or cancel; an overlap whether they act in the same directions, whichever way.
Neither tells whether two adapters disturb each other on data: inputs may never take the directions that they share.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.errors import PlanError, UsageError
from lorakit.linalg import overlap, product_inner, product_norm, product_svd
from lorakit.method import METHODS, layer_update
from lorakit.update import AdaptedLayer

_ZERO = 1e-6  # of the largest singular value: directions below are rounding


@dataclass(frozen=True)
class LayerComparison:
    """One layer that both change. `norms` of the deltas (Frobenius); `cosine` between them, -1..1; `outputs` and
    `inputs`, the mean squared cosine of the angles between the directions that they write to and read from, 0..1, and
    what two random adapters of these ranks would have (`chance_outputs`, `chance_inputs`); `conflict`, the share of
    what both do between common bases that has opposite signs, 0..1, about 0.5 by chance."""

    path: str
    norms: tuple[float, float]
    cosine: float
    outputs: float
    chance_outputs: float
    inputs: float
    chance_inputs: float
    conflict: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters: what both change, what one of them changes alone, and the cosine of everything together."""

    cosine: float
    layers: tuple[LayerComparison, ...]
    alone: tuple[int, int]

    def values(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([5, *(len(layer.path) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  norm 1  norm 2  cosine  outputs (chance)  inputs (chance)  conflict"]
        for x in self.layers:
            sides = f"{x.outputs:7.2f} ({x.chance_outputs:.2f})    {x.inputs:6.2f} ({x.chance_inputs:.2f})"
            norms = f"{x.norms[0]:6.3g}  {x.norms[1]:6.3g}"
            lines.append(f"{x.path:<{width}}  {norms}  {x.cosine:+6.2f}  {sides}      {x.conflict:5.0%}")
        one, two = self.alone
        only = f"; {one} layers only in the first, {two} only in the second" if one or two else ""
        return "\n".join([*lines, "", f"all deltas together: cosine {self.cosine:+.3f}{only}"])


def compare(one: Adapter, two: Adapter) -> Comparison:
    """How much two adapters do the same. Costs O((o + i) r^2) a layer. PlanError for methods that are no pair,
    UsageError where they have no layer in common.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9))
    >>> paths = lk.attach(model, lk.plan(model, rank=2))
    >>> model[0].adapters.default.b.data.normal_()  # doctest: +ELLIPSIS
    tensor(...
    >>> round(lk.compare(lk.collect(model), lk.collect(model)).cosine, 6)
    1.0
    """
    common = [path for path in one.layers if path in two.layers]
    if not common:
        raise UsageError(f"they have no layer in common; the first changes {_some(one)}, the second {_some(two)}")
    inner, squares = 0.0, [0.0, 0.0]
    found = []
    for path in common:
        pairs = [_pair(path, adapter.layers[path]) for adapter in (one, two)]
        if pairs[0][0].shape[:-1] != pairs[1][0].shape[:-1] or pairs[0][1].shape[-1] != pairs[1][1].shape[-1]:
            shapes = " and ".join(str((b.shape[-2], a.shape[-1])) for b, a in pairs)
            raise UsageError(f"'{path}' is {shapes}: these adapters are of different bases")
        found.append(_layer(path, *pairs))
        inner += float(product_inner(*pairs[0], *pairs[1]).sum())
    for k, adapter in enumerate((one, two)):
        for path, layer in adapter.layers.items():
            squares[k] += float(product_norm(*_pair(path, layer)).square().sum())
    alone = len(one.layers) - len(common), len(two.layers) - len(common)
    return Comparison(_ratio(inner, (squares[0] * squares[1]) ** 0.5), tuple(found), alone)


def _pair(path: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    if not METHODS[layer.method].exact_pair:
        raise PlanError(f"only low-rank pairs can be compared; '{path}' is {layer.method}")
    update = layer_update(layer)
    assert update.a is not None and update.b is not None
    return update.scale * update.b.detach().double(), update.a.detach().double()


def _layer(path: str, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> LayerComparison:
    norms = [float(product_norm(*pair).square().sum()) ** 0.5 for pair in (one, two)]
    cosine = _ratio(float(product_inner(*one, *two).sum()), norms[0] * norms[1])
    u, _ = torch.linalg.qr(torch.cat([one[0], two[0]], -1))
    v, _ = torch.linalg.qr(torch.cat([one[1], two[1]], -2).mT)
    m1, m2 = ((u.mT @ b) @ (a @ v) for b, a in (one, two))
    both = torch.minimum(m1.abs(), m2.abs())
    conflict = _ratio(float(both[m1 * m2 < 0].sum()), float(both.sum()))
    outputs, chance_outputs, inputs, chance_inputs = _overlaps(one, two)
    return LayerComparison(path, (norms[0], norms[1]), cosine, outputs, chance_outputs, inputs, chance_inputs, conflict)


def _overlaps(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> list[float]:
    """Overlap of outputs and that by chance, and the same of inputs; of a stack of experts their mean."""
    pairs = [(product_svd(b, a), b.shape[-2], a.shape[-1]) for b, a in (one, two)]
    each = []
    for k in range(pairs[0][0].s[..., 0].numel()):
        kept = []
        for svd, o, i in pairs:
            r = svd.s.shape[-1]
            u, s, v = svd.u.reshape(-1, o, r)[k], svd.s.reshape(-1, r)[k], svd.v.reshape(-1, i, r)[k]
            real = s > _ZERO * s.max()
            kept.append((u[:, real], v[:, real]))
        sides = []
        for x, y in zip(*kept):
            some = x.shape[1] and y.shape[1]
            sides += [overlap(x, y) if some else 0.0, max(x.shape[1], y.shape[1]) / x.shape[0]]
        each.append(sides)
    return [sum(column) / len(each) for column in zip(*each)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _some(adapter: Adapter) -> str:
    names = list(adapter.layers)
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "none"
