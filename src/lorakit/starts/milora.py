"""milora: the pair begins as the least singular triples of W (Wang et al., 2024, arXiv 2406.09044).

What the base knows best stays frozen, and what it hardly uses learns. Kept frozen beside the trained pair and
subtracted, as with pissa.
"""

import torch

from lorakit.linalg import Svd
from lorakit.method import STARTS, Held, Pair, Start
from lorakit.starts.pissa import svd_of
from lorakit.update import LayerSpec


@STARTS.add
class Milora(Start):
    """Least singular triples of W."""

    name = "milora"
    use = "keeps what the base knows; stores a pair of width 2r"
    source = "Wang et al., 2024, arXiv 2406.09044"
    zero = False

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        u, s, v = svd_of(weight, scale, spec.path, self.name)
        b, a = Svd(u[..., -rank:], s[..., -rank:], v[..., -rank:]).balanced()
        return Pair.scaled(b, a, scale)
