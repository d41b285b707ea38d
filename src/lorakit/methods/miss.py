"""MiSS: one small matrix, repeated along the inputs (Kang and Yin, 2024, arXiv 2409.15371).

`delta[:, c] = scale * block[c mod r]`: a pair whose inner factor adds up every r-th input and is not kept. A block with
fewer columns than outputs is repeated along them too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_NARROW = "mini"  # PEFT's word for a block with fewer columns than outputs


@METHODS.add
class Miss(Method):
    """A pair whose inner factor is a fixed sum of inputs."""

    name = "miss"
    formula = "scale * block^T @ E, E adds up the inputs c with c mod r the same"
    parameters = "r o"
    use = "short of memory: half of LoRA's numbers"
    source = "Kang and Yin, 2024, arXiv 2409.15371"
    pace = 0.3
    scale = 1.0
    takes_start = False
    peft_type = "MISS"
    peft_leaves = frozenset({"miss_block"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        return {"block": (*spec.batch, rank, spec.matrix[0])}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        (o, _), columns = spec.matrix, layer.factors["block"].shape[-1]
        return {"block": (*spec.batch, layer.rank, columns if columns and o % columns == 0 else o)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return {"block": torch.zeros(self.shapes(spec, plan.rank)["block"])}

    def derived(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
        block, i = factors["block"], shape[-1]
        r = block.shape[-2]
        rows = torch.arange(r, device=block.device)[:, None] == torch.arange(i, device=block.device) % r
        return {"sums": rows.to(block.dtype)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        block, shape = factors["block"], weight.shape
        b = block.mT.repeat(*[1] * (block.ndim - 2), shape[-2] // block.shape[-1], 1)
        return Update(a=factors["sums"].to(b.dtype).expand(*shape[:-2], -1, -1), b=b, scale=scale)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "") or layer.scale != 1:
            return None
        return {"miss_block": layer.factors["block"]}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where layers have unlike ranks, or narrow blocks of unlike widths."""
        said = {(layer.rank, layer.start == _NARROW and layer.factors["block"].shape[1]) for layer in layers.values()}
        if len(said) > 1:
            return None
        rank, narrow = said.pop()
        return PeftForm({"r": rank, **({"init_weights": _NARROW, "mini_r": narrow} if narrow else {})})

    def reads_peft(self, config: Mapping[str, object]) -> bool:
        return config.get("init_weights", True) != "bat"

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        block = leaves["miss_block"]
        if block.ndim != 2:
            raise AdapterError(f"has a block of {tuple(block.shape)}; it must be (r, o)")
        start = _NARROW if told.config.get("init_weights") == _NARROW else ""
        return AdaptedLayer(self.name, "linear", (), {"block": block}, len(block), 1.0, start)
