"""SSF: the output of a layer scaled and shifted, channel by channel (Lian et al., NeurIPS 2022).

`y' = gain * y + shift`. Where ia3 has a gain alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.method import METHODS, Factors, Held, Method, ReadWeight
from lorakit.plan import LayerPlan
from lorakit.update import LayerSpec, Update


@METHODS.add
class Ssf(Method):
    """A gain and a shift on the outputs."""

    name = "ssf"
    formula = "(gain - 1) * W, and a shift of the bias"
    parameters = "2 o"
    use = "a few thousand numbers; images with another look"
    source = "Lian et al., NeurIPS 2022, arXiv 2210.08823"
    pace = 4.0
    scale = 1.0
    takes_rank = False
    takes_scale = False
    takes_start = False
    exact_pair = False
    peft_type = None

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o = spec.matrix[0]
        return {"gain": (*spec.batch, o), "shift": (*spec.batch, o)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if not spec.has_bias:
            return [f"'{spec.path}' has no bias that could take the shift of ssf; use ia3 there"]
        return []

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, 0)
        return {"gain": torch.ones(shapes["gain"]), "shift": torch.zeros(shapes["shift"])}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(gain=factors["gain"], bias=factors["shift"], gain_covers_bias=True)
