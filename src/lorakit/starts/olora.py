"""olora: the pair begins as the first columns of an orthonormal basis of W, and what W is in it (Buyukakyuz, 2024).

`W = q r`, `b` the first columns of q, `a` the first rows of r. Kept frozen beside the trained pair and subtracted, so
the base weight is never rewritten (PEFT rewrites it).
"""

import torch

from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec


@STARTS.add
class Olora(Start):
    """Leading columns of a QR factorisation of W."""

    name = "olora"
    use = "faster early learning, cheaper to begin than pissa; stores a pair of width 2r"
    source = "Buyukakyuz, 2024, arXiv 2406.01775"
    zero = False

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        q, r = torch.linalg.qr(weight().detach().float().cpu())
        return Pair(r[..., :rank, :].contiguous(), q[..., :rank].contiguous())
