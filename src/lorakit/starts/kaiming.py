"""kaiming: `a` uniform in +-1/sqrt(i), `b` zero; the default of LoRA and PEFT (He et al., 2015, with a = sqrt 5)."""

import torch

from lorakit.method import STARTS, Pair, ReadWeight, Start
from lorakit.update import LayerSpec


@STARTS.add
class Kaiming(Start):
    """Uniform `a`, zero `b`."""

    name = "kaiming"
    use = "the default"
    source = "He et al., 2015; microsoft/LoRA"
    free = True

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: ReadWeight, generator: torch.Generator) -> Pair:
        o, i = spec.matrix
        bound = i**-0.5
        a = torch.empty(*spec.batch, rank, i).uniform_(-bound, bound, generator=generator)
        return Pair(a, torch.zeros(*spec.batch, o, rank))
