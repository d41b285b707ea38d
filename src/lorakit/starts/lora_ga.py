"""lora-ga: the first step moves W as one step of full fine-tuning would, as far as rank 2r can (Wang et al., 2024).

With `u s v^T` the decomposition of the first gradient of W: `a` are the first r right singular vectors, `b` the left
ones from r to 2r, both times `o^(1/4) / sqrt(gamma)` with gamma 16 (section 3.3, stable scale). Kept frozen beside the
trained pair and subtracted.
"""

import torch

from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec

_GAMMA = 16.0


@STARTS.add
class LoraGa(Start):
    """Singular vectors of the first gradient."""

    name = "lora-ga"
    use = "steep first steps; runs some batches backward first; stores a pair of width 2r"
    source = "Wang et al., NeurIPS 2024, arXiv 2407.05000"
    zero = False
    needs = frozenset({"gradient"})

    def faults(self, spec: LayerSpec, rank: int) -> list[str]:
        if 2 * rank > spec.max_rank:
            return [
                f"start 'lora-ga' takes 2 x rank {rank} directions of '{spec.path}', which has {spec.max_rank}; "
                f"use rank <= {spec.max_rank // 2}"
            ]
        return super().faults(spec, rank)

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        gradient = weight.known.gradient
        assert gradient is not None
        u, _, vh = torch.linalg.svd(gradient.double().cpu(), full_matrices=False)
        size = spec.matrix[0] ** 0.25 / _GAMMA**0.5
        a, b = vh[:rank] * size, u[:, rank : 2 * rank] * size
        return Pair(a.float().contiguous(), b.float().contiguous())
