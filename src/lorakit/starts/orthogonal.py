"""orthogonal: both factors random, their product zero, because they use complementary halves of a random rotation.

`q (r, r)` orthogonal; `a = x q_even`, `b = y q_odd` with `q_even q_odd^T = 0`, so `b a = 0` while neither factor is:
both learn from the first step (datta0.github.io, "Rethinking LoRA initialisation", 2024; PEFT's "orthogonal").
"""

import torch

from lorakit.method import STARTS, Held, Pair, Start
from lorakit.update import LayerSpec

_SPREAD = 0.1  # standard deviation of the random mixtures, as in the source


@STARTS.add
class Orthogonal(Start):
    """Two factors that are not zero with a product that is."""

    name = "orthogonal"
    use = "short runs: both factors learn from the first step"
    source = "datta0.github.io/posts/rethink-lora-init; PEFT"

    def faults(self, spec: LayerSpec, rank: int) -> list[str]:
        if rank % 2:
            return [f"start 'orthogonal' needs an even rank, and '{spec.path}' has {rank}; use {rank + 1}"]
        return []

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        o, i = spec.matrix
        half = rank // 2
        q, _ = torch.linalg.qr(torch.randn(*spec.batch, rank, rank, generator=generator, dtype=torch.float64))
        x = torch.randn(*spec.batch, half, i, generator=generator, dtype=torch.float64)
        y = torch.randn(*spec.batch, o, half, generator=generator, dtype=torch.float64)
        a = q[..., 0::2, :].mT @ x * _SPREAD
        b = y @ q[..., 1::2, :] * _SPREAD
        return Pair(a.float(), b.float())
