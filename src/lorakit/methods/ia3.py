"""(IA)3: one trained gain per output channel (keys, values) or per input channel (the matrix that ends the MLP).

`W' = gain * W` with the bias under the gain too, or `W' = W * gain_in` (Liu et al., 2022). Gains begin as 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.method import METHODS, Factors, Held, Method, ReadWeight
from lorakit.peft_layout import vector_to_peft
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


@METHODS.add
class Ia3(Method):
    """A gain on the outputs, or on the inputs of the layer that ends an MLP (role "down")."""

    name = "ia3"
    formula = "(gain - 1) * W, or W * (gain_in - 1) for the matrix that ends the MLP"
    parameters = "o, or i"
    use = "a few thousand numbers: many tasks, little data"
    source = "Liu et al., 2022, arXiv 2205.05638"
    pace = 4.0
    scale = 1.0
    takes_rank = False
    takes_scale = False
    takes_start = False
    exact_pair = False
    peft_leaves = frozenset({"ia3_l"})
    peft_type = "IA3"

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"gain_in": (*spec.batch, i)} if spec.role == "down" else {"gain": (*spec.batch, o)}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix  # which side is scaled is the adapter's own choice
        return {"gain": (*spec.batch, o)} if "gain" in layer.factors else {"gain_in": (*spec.batch, i)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if spec.role == "down" and spec.kind not in ("linear", "hf_conv1d", "parameter"):
            return [f"ia3 on the inputs of '{spec.path}' (kind {spec.kind}) is not defined; leave it out of the plan"]
        return []

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return {name: torch.ones(shape) for name, shape in self.shapes(spec, 0).items()}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(gain=factors.get("gain"), gain_in=factors.get("gain_in"), gain_covers_bias=True)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        gain, gain_in = layer.factors.get("gain"), layer.factors.get("gain_in")
        if layer.kind in ("conv2d", "conv3d") and gain is not None:
            return {"ia3_l": vector_to_peft(gain, layer)}
        if layer.kind not in ("linear", "hf_conv1d"):
            return None
        if gain_in is not None:
            return {"ia3_l": gain_in.reshape(1, -1)}
        return None if gain is None else {"ia3_l": gain.reshape(-1, 1)}

    def from_peft(self, leaves: Mapping[str, Tensor], kind: str) -> Factors:
        return {"gain_in" if name == "ia3_l.in" else "gain": vector.flatten() for name, vector in leaves.items()}
