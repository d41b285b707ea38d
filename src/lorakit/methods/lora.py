"""LoRA: `delta = scale * b @ a` (Hu et al., 2021, arXiv 2106.09685).

A start whose product is not zero (pissa) is kept as a frozen second pair and subtracted, so the base weight stays
untouched and the delta is exact: `delta = scale * (b a - b0 a0)`, a pair of width 2r. An optional bias on the outer
factor (`bias`, PEFT's lora_bias) adds `scale * bias` to the output.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.method import METHODS, STARTS, Factors, Held, Method, ReadWeight
from lorakit.peft_layout import pair_from_peft, pair_to_peft
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


def fresh_pair(spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
    """`a`, `b`, and for a start that is not zero its frozen copy `a0`, `b0`."""
    start = STARTS[plan.start]
    pair = start.pair(spec, plan.rank, plan.scale_value, weight, generator)
    factors = {"a": pair.a, "b": pair.b}
    return factors if start.zero or start.corrects else {**factors, "a0": pair.a.clone(), "b0": pair.b.clone()}


def whole_pair(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair with the frozen start subtracted: `a (.., r or 2r, i)`, `b (.., o, r or 2r)`."""
    a, b = factors["a"], factors["b"]
    if "a0" in factors:
        return torch.cat([a, factors["a0"]], -2), torch.cat([b, -factors["b0"]], -1)
    return a, b


@METHODS.add
class Lora(Method):
    """A low-rank pair and nothing else."""

    name = "lora"
    formula = "scale * b @ a"
    parameters = "r (o + i)"
    use = "the default; merges, serves and exports everywhere"
    source = "Hu et al., 2021, arXiv 2106.09685"
    frozen = frozenset({"a0", "b0"})
    plain = True
    peft_leaves = frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"})
    peft_type = "LORA"
    peft_config = {"use_dora": False}

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (*spec.batch, rank, i), "b": (*spec.batch, o, rank)}

    def optional_shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a0": (*spec.batch, rank, i), "b0": (*spec.batch, o, rank), "bias": (*spec.batch, o)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return fresh_pair(spec, plan, weight, generator)

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        a, b = whole_pair(factors)
        bias = factors.get("bias")
        return Update(a=a, b=b, scale=scale, bias=None if bias is None else scale * bias)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        a, b = whole_pair(layer.factors)
        leaves = pair_to_peft(a, b, layer)
        if leaves is not None and "bias" in layer.factors:
            leaves["lora_B.bias"] = layer.factors["bias"]
        return leaves

    def from_peft(self, leaves: Mapping[str, Tensor], kind: str) -> Factors:
        factors = pair_from_peft(leaves)
        return {**factors, "bias": leaves["lora_B.bias"]} if "lora_B.bias" in leaves else factors
