"""p-tuning: input rows that come out of a small network while they learn; what is kept are the rows."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.method import kaiming_uniform
from lorakit.prompt import PROMPTS, PromptMethod, PromptPlan, Reads, Sizes


@PROMPTS.add
class PTuning(PromptMethod):
    """Three layers with rectifiers between them, as wide as the model, as PEFT's encoder."""

    name = "p-tuning"
    rows_are = "V input rows, made by an MLP until they are learned"
    parameters = "V d + 3 d (d + 1)"
    use = "where a soft prompt learns too slowly: the rows move together"
    source = "Liu et al., 2021, arXiv 2103.10385"
    inputs = True
    starts = ()
    pace = 6.0
    peft_type = "P_TUNING"
    peft_config = {"encoder_reparameterization_type": "MLP"}

    def shapes(self, sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
        d = sizes.width
        layers = {f"{part}{k}": (d, d) if part == "w" else (d,) for k in (1, 2, 3) for part in ("w", "c")}
        return {"seeds": (length, d), **layers}

    def init(self, plan: PromptPlan, base: Reads, generator: torch.Generator) -> dict[str, Tensor]:
        return network(self.shapes(base.sizes, plan.length), generator)

    def rows(self, factors: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
        x = F.linear(factors["seeds"], factors["w1"], factors["c1"]).relu()
        x = F.linear(x, factors["w2"], factors["c2"]).relu()
        return F.linear(x, factors["w3"], factors["c3"])


def network(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Normal seeds, and layers that begin as torch's do, each bias behind its matrix."""
    found: dict[str, Tensor] = {}
    bound = 0.0
    for name, shape in shapes.items():
        if name == "seeds":
            found[name] = torch.randn(shape, generator=generator)
        elif len(shape) == 1:
            found[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        else:
            bound = shape[-1] ** -0.5
            found[name] = kaiming_uniform(shape, generator)
    return found
