"""Bone: every r x r block of W times a small matrix, and that matrix added (Kang and Yin, 2024; PEFT's MiSS "bat").

`delta = scale * (W_kl M_k + M_k)` for the block row k and every block column l. r must divide both sides.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


@METHODS.add
class Bone(Method):
    """One small matrix for every block of rows, with W and beside it."""

    name = "bone"
    formula = "scale * (W_kl @ block_k + block_k), block by block"
    parameters = "r o"
    use = "where MiSS falls short: the change follows W; slower"
    source = "Kang and Yin, 2024, arXiv 2409.15371"
    pace = 0.3
    scale = 1.0
    takes_start = False
    reads_weight = True
    exact_pair = False
    peft_type = "MISS"
    peft_leaves = frozenset({"miss_block"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        return {"block": (*spec.batch, spec.matrix[0] // rank, rank, rank)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        found, (o, i) = super().faults(spec, plan), spec.matrix
        if not found and (o % plan.rank or i % plan.rank):
            return [f"bone divides '{spec.path}' ({o} x {i}) into squares, and rank {plan.rank} does not divide both"]
        return found

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return {"block": torch.zeros(self.shapes(spec, plan.rank)["block"])}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        base, block = weight(), factors["block"]
        r = block.shape[-1]
        *lead, o, i = base.shape
        tiles = base.reshape(*lead, o // r, r, i // r, r).transpose(-3, -2)  # (.., o/r, i/r, r, r)
        change = tiles.to(block.dtype) @ block.unsqueeze(-3) + block.unsqueeze(-3)
        return Update(dense=scale * change.transpose(-3, -2).flatten(-2, -1).flatten(-3, -2))

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "") or layer.scale != 1:
            return None
        return {"miss_block": layer.factors["block"]}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where layers have unlike ranks."""
        ranks = {layer.rank for layer in layers.values()}
        return None if len(ranks) > 1 else PeftForm({"r": ranks.pop(), "init_weights": "bat"})

    def reads_peft(self, config: Mapping[str, object]) -> bool:
        return config.get("init_weights") == "bat"

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        block = leaves["miss_block"]
        if block.ndim != 3 or block.shape[1] != block.shape[2]:
            raise AdapterError(f"has a block of {tuple(block.shape)}; with init_weights 'bat' it must be (o / r, r, r)")
        return AdaptedLayer(self.name, "linear", (), {"block": block}, block.shape[1], 1.0)
