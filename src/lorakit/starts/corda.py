"""corda: the pair begins as the part of W that the task's inputs make most use of, or (corda-kpm) least.

Yang et al., NeurIPS 2024. With C the second moment of the inputs, `W C = u s v^T`; the pair is `u s v^T C^-1` of the
first r triples (instruction-previewed mode) or the last r (knowledge-preserved mode, with inputs of what is to be
kept). Kept frozen beside the trained pair and subtracted: the base is never rewritten.
"""

from typing import ClassVar

import torch

from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec

_DAMPING = 0.01  # of the mean of C's diagonal, added to it


@STARTS.add
class Corda(Start):
    """Leading context-oriented triples of W."""

    name = "corda"
    use = "faster early learning on the task whose inputs were measured; stores a pair of width 2r"
    source = "Yang et al., NeurIPS 2024, arXiv 2406.05223"
    zero = False
    needs = frozenset({"inputs"})
    last: ClassVar[bool] = False

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        inputs = weight.known.inputs
        assert inputs is not None
        c = inputs.double().cpu()
        c = c + _DAMPING * c.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny) * torch.eye(len(c)).double()
        u, s, vh = torch.linalg.svd(weight().detach().double().cpu() @ c, full_matrices=False)
        part = slice(-rank, None) if self.last else slice(None, rank)
        root = (s[part] / abs(scale)).sqrt()
        a = root.unsqueeze(1) * torch.linalg.solve(c, vh[part].T).T
        return Pair.scaled(u[:, part] * root, a, scale)


@STARTS.add
class CordaKpm(Corda):
    """Last context-oriented triples of W."""

    name = "corda-kpm"
    use = "keeps what the measured inputs ask for, while something else is learned; stores a pair of width 2r"
    last = True
