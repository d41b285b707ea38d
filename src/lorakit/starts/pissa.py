"""pissa: the pair begins as the leading singular triples of W itself (Meng et al., 2024, arXiv 2404.02948).

`scale * b a` is the best rank-r approximation of W, with the singular values shared evenly. The method keeps this
start frozen beside the trained pair and subtracts it, so the base weight is never rewritten (PEFT rewrites it).
"""

import torch

from lorakit.errors import PlanError
from lorakit.linalg import Svd
from lorakit.method import STARTS, Held, Pair, ReadWeight, Start
from lorakit.update import LayerSpec


@STARTS.add
class Pissa(Start):
    """Leading singular triples of W."""

    name = "pissa"
    use = "faster early learning; stores a pair of width 2r"
    source = "Meng et al., 2024, arXiv 2404.02948"
    zero = False

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        b, a = svd_of(weight, scale, spec.path, self.name).truncated(rank).balanced()
        return Pair.scaled(b, a, scale)


def svd_of(weight: ReadWeight, scale: float, path: str, start: str) -> Svd:
    """Singular value decomposition of `W / |scale|`, in float32 on the CPU."""
    try:
        u, s, vh = torch.linalg.svd(weight().detach().float().cpu() / abs(scale), full_matrices=False)
    except RuntimeError as error:  # LinAlgError is one
        raise PlanError(f"start '{start}': the weight of '{path}' has no decomposition ({error})") from None
    return Svd(u, s, vh.mT)
