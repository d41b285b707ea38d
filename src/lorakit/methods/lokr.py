"""LoKr: the Kronecker product of two small matrices, the larger of them low-rank (Yeh et al., 2023, LyCORIS).

`delta = scale * kron(w1, w2)` with `w1 (o1, i1)` and `w2 (o2, i2)`, `o = o1 o2` and `i = i1 i2`; each is whole, or a
product `b a`, `w2` of a convolution also a core of Tucker's form. `o1` and `i1` are the largest divisors up to the
root.
"""

from collections.abc import Mapping
from math import isqrt, prod

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told, kaiming_uniform
from lorakit.methods.loha import rebuilt, turned
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {"w1": "lokr_w1", "b1": "lokr_w1_a", "a1": "lokr_w1_b", "w2": "lokr_w2", "b2": "lokr_w2_a",
           "a2": "lokr_w2_b", "t2": "lokr_t2"}  # fmt: skip


@METHODS.add
class Lokr(Method):
    """A Kronecker product."""

    name = "lokr"
    formula = "scale * kron(w1, w2), w2 = b2 @ a2 where that is smaller"
    parameters = "about 2 sqrt(o i), or sqrt(o i) + r (sqrt o + sqrt i)"
    use = "a few thousand numbers for a large layer; image models"
    source = "Yeh et al., 2023, arXiv 2309.14859; LyCORIS"
    pace = 3.0
    takes_start = False
    exact_pair = False
    peft_type = "LOKR"
    peft_leaves = frozenset(_LEAVES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        (o, i), lead = spec.matrix, spec.batch
        fan_in = spec.shape[1] if spec.kind.startswith("conv") else i  # channels are divided, kernels are not
        o1, i1 = _divisor(o), _divisor(fan_in)
        o2, i2 = o // o1, i // i1
        whole = {"w1": (*lead, o1, i1)}
        if 2 * rank >= max(o2, fan_in // i1):
            return {**whole, "w2": (*lead, o2, i2)}
        return {**whole, "a2": (*lead, rank, i2), "b2": (*lead, o2, rank)}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        """Any division that comes to the weight: files of others choose their own."""
        found = {name: tuple(factor.shape) for name, factor in layer.factors.items()}
        own = self.shapes(spec, layer.rank)
        try:
            shape = tuple(_delta(layer.factors).shape)
        except (RuntimeError, KeyError, IndexError):
            return own
        return {name: found[name] for name in _LEAVES if name in found} if shape == (*spec.batch, *spec.matrix) else own

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if isinstance(plan.rank, int) and plan.rank >= 1:
            return []  # w2 is whole from a certain rank on, which no rank exceeds
        return super().faults(spec, plan)

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        drawn = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(spec, plan.rank).items()}
        return {**drawn, "w1": torch.zeros_like(drawn["w1"])}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(dense=scale * _delta(factors))

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind in ("hf_conv1d", "conv3d", "embedding", "parameter"):
            return None
        leaves = {_LEAVES[name]: turned(name, factor, layer.factors) for name, factor in layer.factors.items()}
        whole = leaves.get("lokr_w2")
        if whole is not None and layer.kind == "conv1d":
            return None  # peft 0.21.2 makes something else of it than the Kronecker product
        if whole is not None and layer.kind == "conv2d":
            leaves["lokr_w2"] = whole.reshape(len(whole), -1, *layer.shape[2:])
        return leaves

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where the divisions are not those that PEFT would choose."""
        form = PeftForm.with_ranks({p: x.rank for p, x in layers.items()}, {p: x.scale for p, x in layers.items()})
        both = {"a1" in layer.factors for layer in layers.values()}
        factors = {_factor(layer) for layer in layers.values()} - {None}
        if len(both) > 1 or len(factors) > 1:
            return None
        return form.saying(
            use_effective_conv2d=any("t2" in layer.factors for layer in layers.values()),
            decompose_both=both == {True},
            decompose_factor=factors.pop() if factors else -1,
        )

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        factors = {name: leaves[own] for name, own in _LEAVES.items() if own in leaves}
        if "w2" in factors and factors["w2"].ndim == 3:
            raise AdapterError(
                "is a Conv1d whose 'lokr_w2' is whole, of which PEFT makes no Kronecker product; merge it in peft"
            )
        kernel = tuple(factors["w2"].shape[2:]) if "w2" in factors else ()
        if kernel:
            factors["w2"] = factors["w2"].flatten(1)
        factors = {name: turned(name, factor, factors) for name, factor in factors.items()}
        try:
            o, i = _delta(factors).shape
        except (KeyError, RuntimeError):
            raise AdapterError(f"is incomplete or does not fit together: it has {', '.join(sorted(leaves))}") from None
        kind, shape = ("conv2d", (o, i // prod(kernel), *kernel)) if kernel else ("", ())
        return AdaptedLayer(self.name, kind, shape, factors, told.rank, told.scale)


def _delta(factors: Mapping[str, Tensor]) -> Tensor:
    """`kron(w1, w2) (.., o, i)`."""
    w1 = factors["w1"] if "w1" in factors else factors["b1"] @ factors["a1"]
    w2 = factors["w2"] if "w2" in factors else rebuilt(factors["a2"], factors["b2"], factors.get("t2"))
    blocks = w1[..., :, None, :, None] * w2[..., None, :, None, :]
    return blocks.flatten(-2, -1).flatten(-3, -2)


def _divisor(n: int) -> int:
    return next(d for d in range(isqrt(n), 0, -1) if n % d == 0)


def _factor(layer: AdaptedLayer) -> int | None:
    """The `decompose_factor` by which PEFT divides this layer so; None where it does not matter."""
    (o1, i1), (o2, i2) = (
        (layer.factors[f"b{n}"].shape[-2], layer.factors[f"a{n}"].shape[-1])
        if f"b{n}" in layer.factors
        else tuple(layer.factors[f"w{n}"].shape[-2:])
        for n in (1, 2)
    )
    kernel = layer.shape[2:] if layer.kind.startswith("conv") and "t2" not in layer.factors else ()
    o, i = o1 * o2, i1 * i2 // prod(kernel)
    if (o1, i1) == (_divisor(o), _divisor(i)):
        return None
    return next((f for f in (o1, i1) if _divided(o, f) == o1 and _divided(i, f) == i1), 0)


def _divided(n: int, factor: int) -> int:
    """The first part of n as PEFT divides it by a `decompose_factor` above 0."""
    if n % factor == 0:
        return factor
    return next(d for d in range(min(factor, isqrt(n)), 0, -1) if n % d == 0)
