"""kaiming: `a` uniform in +-1/sqrt(i), `b` zero; the default of LoRA and PEFT (He et al., 2015, with a = sqrt 5)."""

import torch

from lorakit.method import STARTS, Held, Pair, Start, kaiming_uniform
from lorakit.update import LayerSpec


@STARTS.add
class Kaiming(Start):
    """Uniform `a`, zero `b`."""

    name = "kaiming"
    use = "the default"
    source = "He et al., 2015; microsoft/LoRA"
    free = True

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        o, i = spec.matrix
        return Pair(kaiming_uniform((*spec.batch, rank, i), generator), torch.zeros(*spec.batch, o, rank))
