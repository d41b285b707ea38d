"""HiRA: W times a low-rank matrix, number by number, so that the change has a high rank (Huang et al., ICLR 2025).

`W' = W * (1 + scale * b a)`. A weight that is zero stays zero: a pruned base keeps its pattern.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.method import METHODS, STARTS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.peft_layout import kind_of_pair, pair_from_peft, pair_to_peft, stored_shape
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {"lora_A.weight": "hira_A", "lora_B.weight": "hira_B"}
_EMBEDDING = {"lora_embedding_A": "hira_embedding_A", "lora_embedding_B": "hira_embedding_B"}
_NAMES = {**_LEAVES, **_EMBEDDING}


@METHODS.add
class Hira(Method):
    """A low-rank pair that W is multiplied by."""

    name = "hira"
    formula = "scale * W * (b @ a), number by number"
    parameters = "r (o + i)"
    use = "changes of high rank at LoRA's size; keeps the zeros of a pruned base"
    source = "Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS"
    pace = 5.0
    scale = 1.0
    reads_weight = True
    exact_pair = False
    peft_type = "HIRA"
    peft_leaves = frozenset(_NAMES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (*spec.batch, rank, i), "b": (*spec.batch, o, rank)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if plan.start in STARTS and not STARTS[plan.start].zero:
            return [f"'{spec.path}': hira multiplies W, so its pair must begin at zero; take start 'kaiming'"]
        return super().faults(spec, plan)

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        pair = STARTS[plan.start].pair(spec, plan.rank, plan.scale_value, weight, generator)
        return {"a": pair.a, "b": pair.b}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(dense=scale * weight() * (factors["b"] @ factors["a"]))

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        leaves = pair_to_peft(layer.factors["a"], layer.factors["b"], layer)
        if leaves is None or layer.kind == "parameter" or layer.scale != 1:
            return None
        return {_NAMES[name]: tensor for name, tensor in leaves.items()}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm:
        return PeftForm.with_ranks({path: layer.rank for path, layer in layers.items()})

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        pair = {name: leaves[own] for name, own in _NAMES.items() if own in leaves}
        factors, kind = pair_from_peft(pair), kind_of_pair(pair, told.config)
        shape = stored_shape(kind, pair, factors)
        return AdaptedLayer(self.name, kind, shape, factors, len(factors["a"]), 1.0)
