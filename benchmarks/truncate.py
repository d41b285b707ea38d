"""Truncating a 2048 x 2048 delta from rank 64 to 16: two QRs and a 64 x 64 core, against the dense SVD of `b @ a`."""

import torch

from common import Bench
from lorakit.adapter import Adapter
from lorakit.algebra.truncate import truncate
from lorakit.linalg import product_svd
from lorakit.update import AdaptedLayer

SIDE, RANK, KEPT = 2048, 64, 16


def main() -> None:
    """The race, and how exact it is."""
    bench = Bench(__doc__)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, SIDE, generator=generator), torch.randn(SIDE, RANK, generator=generator)
    layer = AdaptedLayer("lora", "linear", (SIDE, SIDE), {"a": a, "b": b}, RANK, 1.0)
    adapter = Adapter({"layer": layer})

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        return u[:, :KEPT] * s[:KEPT].sqrt(), s[:KEPT].sqrt().unsqueeze(-1) * vh[:KEPT]

    bench.race(
        "truncate 2048 r64 to r16 vs dense SVD", dense, lambda: truncate(adapter, rank=KEPT), n=bench.rounds(5, 3)
    )
    exact = torch.linalg.svdvals(b.double() @ a.double())[:RANK]
    error = float(((product_svd(b, a).s.double() - exact) / exact).abs().max())
    bench.fact("largest relative error of a singular value, against float64", error)
    bench.done()


if __name__ == "__main__":
    main()
