"""loftq: on a quantized base the pair begins as the best rank-r part of what quantizing has lost (Li et al., 2023).

`scale * b a` is the truncated decomposition of `W - Q`, Q being what the layer computes with: one round of LoftQ, with
the base left as it is. The fresh adapter changes the model, towards the one before it was quantized.
"""

import torch

from lorakit.errors import PlanError
from lorakit.linalg import Svd
from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec


@STARTS.add
class Loftq(Start):
    """Leading singular triples of the quantizer's error."""

    name = "loftq"
    use = "bases in 4 bits: takes back a part of the error; exports as a plain pair"
    source = "Li et al., ICLR 2024, arXiv 2310.08659"
    zero = False
    corrects = True
    needs = frozenset({"original"})

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        u, s, vh = torch.linalg.svd(lost(spec, self.name, weight) / abs(scale), full_matrices=False)
        b, a = Svd(u, s, vh.mT).truncated(rank).balanced()
        return Pair.scaled(b, a, scale)


def lost(spec: LayerSpec, start: str, weight: Held) -> torch.Tensor:
    """`W - Q (o, i)` in float64."""
    if weight.original is None:
        raise PlanError(
            f"start '{start}' makes up for a quantizer's error, and of '{spec.path}' no weight from before is kept; "
            "quantize the model with keep=True (fit --quantize does), or take another start"
        )
    return weight.original.detach().double().cpu() - weight().detach().double().cpu()
