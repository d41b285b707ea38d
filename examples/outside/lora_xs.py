"""LoRA-XS: r x r numbers that learn between frozen singular vectors of W (Balazy et al., 2024, arXiv 2405.17604).

`delta = scale * b core a` with `b` the leading left singular vectors times their values, `a` the right ones; `core`
begins at zero. A package of its own: `pip install ./examples/outside`, and `--method lora-xs` is there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.method import METHODS, Factors, Held, Method, ReadWeight
from lorakit.plan import LayerPlan
from lorakit.update import LayerSpec, Update


@METHODS.add
class LoraXs(Method):
    """A small square between frozen singular vectors."""

    name = "lora-xs"
    formula = "scale * b @ core @ a"
    parameters = "r^2"
    use = "thousands of adapters on one base: their size does not depend on the layers'"
    source = "Balazy et al., 2024, arXiv 2405.17604"
    frozen = frozenset({"a", "b"})
    scale = 1.0
    takes_start = False

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        (o, i), lead = spec.matrix, spec.batch
        return {"a": (*lead, rank, i), "b": (*lead, o, rank), "core": (*lead, rank, rank)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        u, s, vh = torch.linalg.svd(weight().detach().float().cpu(), full_matrices=False)
        r = plan.rank
        b = u[..., :r] * s[..., None, :r]
        return {"a": vh[..., :r, :].contiguous(), "b": b.contiguous(), "core": torch.zeros(*spec.batch, r, r)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(a=factors["core"] @ factors["a"], b=factors["b"], scale=scale)
