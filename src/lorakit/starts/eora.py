"""eora: as loftq, with the error weighed by what the layer's inputs make of it (Liu et al., 2024).

With C the second moment of the inputs, the pair is the best of rank r for `|(W - Q - scale b a) C^1/2|`: the error of
the outputs, not of the weights.
"""

import torch

from lorakit.linalg import Svd
from lorakit.method import STARTS, Held, Pair, Start
from lorakit.starts.loftq import lost
from lorakit.update import LayerSpec

_LEAST = 1e-6  # of the largest eigenvalue of C


@STARTS.add
class Eora(Start):
    """Leading triples of the quantizer's error in the inputs' eigenspace."""

    name = "eora"
    use = "bases in 4 bits: takes back what the outputs lose; reads some batches first; exports as a plain pair"
    source = "Liu et al., 2024, arXiv 2410.21271"
    zero = False
    corrects = True
    needs = frozenset({"original", "inputs"})

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        inputs = weight.known.inputs
        assert inputs is not None
        values, vectors = torch.linalg.eigh(inputs.double().cpu())
        root = values.clamp_min(_LEAST * float(values.max().clamp_min(torch.finfo(torch.float32).tiny))).sqrt()
        error = lost(spec, self.name, weight) @ vectors * root
        u, s, vh = torch.linalg.svd(error / abs(scale), full_matrices=False)
        b, a = Svd(u, s, vh.mT).truncated(rank).balanced()
        a = (a / root) @ vectors.T
        return Pair.scaled(b, a, scale)
