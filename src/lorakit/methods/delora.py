"""DeLoRA: directions of a pair apart from its strength (Bini et al., ICLR 2025).

`delta = scale * (lambda / r) * sum over k of (b_k / |b_k|) (a_k / |a_k|) diag(norm)`, `norm` the column lengths of W:
the change cannot become larger than `lambda` beside W, however long it trains.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told, kaiming_uniform
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {"a": "delora_A", "b": "delora_B", "lambda": "delora_lambda", "norm": "delora_w_norm"}
_LEAST = 1e-4  # length of a row or column that counts as that much
_FIRST = 1.0  # lambda. After one step of Adam the change has its whole length: with PEFT's 15 the base is lost


@METHODS.add
class Delora(Method):
    """A pair of unit directions and one strength."""

    name = "delora"
    formula = "scale * lambda / r * (b / |b|) @ (a / |a|) @ diag(column lengths of W)"
    parameters = "r (o + i) + 1"
    use = "high learning rates and long runs: the change is bounded"
    source = "Bini et al., ICLR 2025, arXiv 2503.18225"
    frozen = frozenset({"norm"})
    scale = 1.0
    takes_start = False
    peft_type = "DELORA"
    peft_leaves = frozenset(_LEAVES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        (o, i), lead = spec.matrix, spec.batch
        return {"a": (*lead, rank, i), "b": (*lead, o, rank), "lambda": (*lead, 1), "norm": (*lead, i)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        return {
            "a": kaiming_uniform(shapes["a"], generator),
            "b": torch.zeros(shapes["b"]),
            "lambda": torch.full(shapes["lambda"], _FIRST),
            "norm": torch.linalg.vector_norm(weight().float(), dim=-2).cpu(),
        }

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        a, b = factors["a"], factors["b"]
        of_a = torch.linalg.vector_norm(a, dim=-1).clamp_min(_LEAST)
        of_b = torch.linalg.vector_norm(b, dim=-2).clamp_min(_LEAST)
        strength = factors["lambda"] / (a.shape[-2] * of_a * of_b)
        return Update(a=a * factors["norm"].unsqueeze(-2), b=b * strength.unsqueeze(-2), scale=scale)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "") or layer.scale != 1:
            return None
        return {_LEAVES[name]: factor for name, factor in layer.factors.items()}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm:
        return PeftForm.with_ranks({path: layer.rank for path, layer in layers.items()}).saying(delora_lambda=_FIRST)

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        factors = {name: leaves[own] for name, own in _LEAVES.items() if own in leaves}
        if factors.keys() != _LEAVES.keys():
            raise AdapterError(f"lacks {', '.join(_LEAVES[name] for name in _LEAVES.keys() - factors.keys())}")
        return AdaptedLayer(self.name, "linear", (), factors, len(factors["a"]), 1.0)
