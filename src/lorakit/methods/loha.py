"""LoHa: two low-rank products multiplied number by number, a rank of up to r^2 (Hyeon-Woo et al., 2021, FedPara).

`delta = scale * (b1 a1) * (b2 a2)`. Convolutions may carry their kernel in cores of Tucker's form (`t1`, `t2`), as
LyCORIS and PEFT write them: `(b1 a1)` is then `sum over p, q of b1[p] t1[p, q, kernel] a1[q]`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told, kaiming_uniform
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {f"{own}{n}": f"hada_{theirs.format(n)}" for n in (1, 2) for own, theirs in
           (("b", "w{}_a"), ("a", "w{}_b"), ("t", "t{}"))}  # fmt: skip


@METHODS.add
class Loha(Method):
    """The product of two pairs, number by number."""

    name = "loha"
    formula = "scale * (b1 @ a1) * (b2 @ a2), number by number"
    parameters = "2 r (o + i)"
    use = "changes of high rank from small factors; image models"
    source = "Hyeon-Woo et al., 2021, arXiv 2108.06098; LyCORIS"
    pace = 2.0
    takes_start = False
    exact_pair = False
    peft_type = "LOHA"
    peft_leaves = frozenset(_LEAVES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        a, b = (*spec.batch, rank, i), (*spec.batch, o, rank)
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        if "t1" not in layer.factors:
            return self.shapes(spec, layer.rank)
        (o, i), r = spec.shape[:2], layer.rank
        core = (r, r, *spec.shape[2:], *[1] * (4 - len(spec.shape)))  # of a Conv1d it has a last side of 1
        return {"a1": (r, i), "b1": (o, r), "t1": core, "a2": (r, i), "b2": (o, r), "t2": core}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        drawn = {name: kaiming_uniform(shapes[name], generator) for name in ("a1", "b1", "a2")}
        return {**drawn, "b2": torch.zeros(shapes["b2"])}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        one, two = (rebuilt(*(factors.get(f"{name}{n}") for name in "abt")) for n in (1, 2))
        return Update(dense=scale * one * two)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind in ("hf_conv1d", "conv3d", "embedding", "parameter"):
            return None
        return {_LEAVES[name]: turned(name, factor, layer.factors) for name, factor in layer.factors.items()}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm:
        form = PeftForm.with_ranks({p: x.rank for p, x in layers.items()}, {p: x.scale for p, x in layers.items()})
        return form.saying(use_effective_conv2d=any("t1" in layer.factors for layer in layers.values()))

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        factors = {name: leaves[own] for name, own in _LEAVES.items() if own in leaves}
        missing = sorted({"a1", "b1", "a2", "b2"} - factors.keys()) or sorted({"t1", "t2"} & factors.keys())[:1]
        if missing and (missing[0][0] != "t" or len({"t1", "t2"} & factors.keys()) == 1):
            raise AdapterError(f"lacks a part: it has {', '.join(sorted(leaves))} only")
        factors = {name: turned(name, factor, factors) for name, factor in factors.items()}
        return AdaptedLayer(self.name, "", (), factors, len(factors["a1"]), told.scale)


def rebuilt(a: Tensor | None, b: Tensor | None, t: Tensor | None = None) -> Tensor:
    """`b @ a (.., o, i)`; with a core `t (r, r, kernel)` that of Tucker's form, `(o, i * kernel)`."""
    assert a is not None
    assert b is not None
    return b @ a if t is None else torch.einsum("op,pqk,qi->oik", b, t.flatten(2), a).flatten(1)


def turned(name: str, factor: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """PEFT and LyCORIS keep the outer factor of Tucker's form the other way round; the same way there and back."""
    return factor.mT.contiguous() if name[0] == "b" and f"t{name[1:]}" in factors else factor
