"""Lengths of the rows of a changed weight, without forming it."""

import torch
from torch import Tensor

from lorakit.kernels.thin import lengths


def row_squares(weight: Tensor) -> Tensor:
    """`|w|^2` of every row of `weight (.., o, i)`: `(.., o)`, float32 at least; the weight is never copied wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    squares: Tensor = torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
    return squares


def row_norms(weight: Tensor, b: Tensor, a: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Euclidean norm of every row of `weight + scale * b @ a` (.., o).

    `|w|^2 + 2 s (W a^T) . b + s^2 b (a a^T) . b`, row by row; `squares` is `row_squares(weight)` where it is known.
    The result has the dtype of the factors; a weight in half precision is read as it is, never copied wider. A
    rounding error can make a square slightly negative when a row nearly vanishes: it counts as 0.
    """
    own = row_squares(weight) if squares is None else squares
    found = lengths(weight, b, a, scale, own)
    if found is not None:
        return found
    thin = b @ ((0.5 * scale**2) * (a @ a.mT))
    mixed = thin + scale * (weight @ a.mT.to(weight.dtype)).to(b.dtype)  # torch 2.13 compiles add(alpha=) without alpha
    return (own.to(b.dtype) + 2 * (mixed * b).sum(-1)).clamp_min(0).sqrt()
