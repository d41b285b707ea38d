"""DoRA: the direction by a low-rank pair, the length of every row of W by a trained vector (Liu et al., 2024).

`W' = m * (W + scale * b a) / |W + scale * b a|`, row by row; `m` begins as the row lengths of W. The norm is taken as
a constant in the gradient (section 4.3) and computed without a dense matrix (`kernels.norms`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.kernels.norms import row_norms
from lorakit.method import METHODS, STARTS, Factors, Held, Method, ReadWeight
from lorakit.methods.lora import Lora, fresh_pair, whole_pair
from lorakit.peft_layout import pair_from_peft, pair_to_peft, vector_to_peft
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


@METHODS.add
class Dora(Method):
    """A low-rank pair under an output gain `m / |W + scale b a|`."""

    name = "dora"
    formula = "m * (W + scale * b @ a) / |W + scale * b @ a| - W, row by row"
    parameters = "r (o + i) + o"
    use = "small ranks, where LoRA falls behind full fine-tuning; a little slower"
    source = "Liu et al., 2024, arXiv 2402.09353"
    frozen = frozenset({"a0", "b0"})
    reads_weight = True
    exact_pair = False
    peft_leaves = Lora.peft_leaves | {"lora_magnitude_vector"}
    peft_type = "LORA"
    peft_config = {"use_dora": True}

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (*spec.batch, rank, i), "b": (*spec.batch, o, rank), "magnitude": (*spec.batch, o)}

    def optional_shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a0": (*spec.batch, rank, i), "b0": (*spec.batch, o, rank), "bias": (*spec.batch, o)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        pair = fresh_pair(spec, plan, weight, generator)
        length = torch.linalg.vector_norm(weight().float(), dim=-1).cpu()
        if STARTS[plan.start].corrects:
            length = row_norms(weight().float().cpu(), pair["b"], pair["a"], plan.scale_value)
        return {**pair, "magnitude": length}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        a, b = whole_pair(factors)
        magnitude = factors["magnitude"]
        with torch.no_grad():
            length = row_norms(weight(), b, a, scale, weight.row_squares())
            length = torch.where(length > 0, length, 1.0)
        bias = factors.get("bias")
        return Update(a=a, b=b, scale=scale, gain=magnitude / length, bias=None if bias is None else scale * bias)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        leaves = pair_to_peft(*whole_pair(layer.factors), layer)
        if leaves is None or layer.kind == "parameter":
            return None
        return {**leaves, "lora_magnitude_vector": vector_to_peft(layer.factors["magnitude"], layer)}

    def from_peft(self, leaves: Mapping[str, Tensor], kind: str) -> Factors:
        return {**pair_from_peft(leaves), "magnitude": leaves["lora_magnitude_vector"].flatten()}
