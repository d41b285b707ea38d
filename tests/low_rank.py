"""Random low-rank pairs in float64, and when two results count as equal."""

import torch
from hypothesis import strategies as st
from torch import Tensor

EXACT = 1e-11  # float64 on matrices of a few hundred numbers: some thousand roundings of 1e-16
sides = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def pair(o: int, i: int, r: int, seed: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(*batch, o, r, generator=g, dtype=torch.float64)
    return b, torch.randn(*batch, r, i, generator=g, dtype=torch.float64)


def close(x: Tensor, y: Tensor, tolerance: float = EXACT) -> bool:
    return x.shape == y.shape and bool(((x - y).abs() <= tolerance * (1 + y.abs().max())).all())
