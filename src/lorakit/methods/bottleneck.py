"""Bottleneck adapters: a small network behind a layer (Houlsby et al., ICML 2019), without its biases.

`y' = y + scale * b relu(a y)` with `a (r, o)`, `b (o, r)`. On the layers that end attention and MLP (`o`, `down`) these
are the places of the paper.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.method import METHODS, Factors, Held, Method, ReadWeight, kaiming_uniform, not_called
from lorakit.plan import LayerPlan
from lorakit.update import LayerSpec, Update


@METHODS.add
class Bottleneck(Method):
    """Two layers and a rectifier on the output."""

    name = "bottleneck"
    formula = "none: y + scale * b @ relu(a @ y)"
    parameters = "2 r o"
    use = "where linear changes fall short and nothing has to be merged"
    source = "Houlsby et al., ICML 2019, arXiv 1902.00751"
    scale = 1.0
    takes_start = False
    exact_pair = False
    linear = False
    peft_type = None
    on_output: ClassVar[bool] = True

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (rank, o if self.on_output else i), "b": (o, rank)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if spec.kind == "parameter" or not spec.called:
            return [not_called(spec.path, self.name)]
        if spec.groups > 1:
            return [f"method '{self.name}' has no form for the {spec.groups} groups of '{spec.path}'"]
        return super().faults(spec, plan)

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        return {"a": kaiming_uniform(shapes["a"], generator), "b": torch.zeros(shapes["b"])}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(a=factors["a"], b=factors["b"], scale=scale, between="relu", on_output=self.on_output)
