"""gaussian: `a` normal with standard deviation 1/r, `b` zero (Hu et al., 2021, section 4.1; PEFT's "gaussian")."""

import torch

from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec


@STARTS.add
class Gaussian(Start):
    """Normal `a`, zero `b`."""

    name = "gaussian"
    use = "as in the LoRA paper; embeddings and diffusion models by habit"
    source = "Hu et al., 2021, arXiv 2106.09685"
    free = True

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        o, i = spec.matrix
        a = torch.randn(*spec.batch, rank, i, generator=generator) / rank
        return Pair(a, torch.zeros(*spec.batch, o, rank))
