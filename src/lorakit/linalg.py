"""Exact linear algebra on low-rank products, without ever forming them.

A delta is `scale * b @ a` with `a (r, i)` and `b (o, r)`. Two thin QR factorisations and an r x r core give its whole
singular value decomposition in O((o + i) r^2) instead of O(o i min(o, i)). All functions accept leading batch
dimensions (3-D expert weights). bf16 and fp16 input is computed in float32; float64 stays float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Svd(NamedTuple):
    """`u (o, k)`, `s (k,)` falling, `v (i, k)`: the matrix is `u @ diag(s) @ v.T`."""

    u: Tensor
    s: Tensor
    v: Tensor

    def truncated(self, rank: int) -> "Svd":
        """The leading `rank` triples: the best approximation of that rank (Eckart and Young, 1936)."""
        return Svd(self.u[..., :rank], self.s[..., :rank], self.v[..., :rank])

    def balanced(self) -> tuple[Tensor, Tensor]:
        """`(b, a)` with the singular values shared evenly: `b = u sqrt(s)`, `a = sqrt(s) v.T`."""
        root = self.s.sqrt().unsqueeze(-2)
        return self.u * root, (self.v * root).mT


def _computable(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def product_svd(b: Tensor, a: Tensor, scale: float = 1.0) -> Svd:
    """Thin singular value decomposition of `scale * b @ a`, `k = min(o, i, r)` triples, in O((o + i) r^2).

    >>> import torch
    >>> b, a = torch.randn(30, 3, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    >>> torch.allclose(product_svd(b, a).s, torch.linalg.svdvals(b @ a)[:3])
    True
    """
    q_b, r_b = torch.linalg.qr(_computable(b))
    q_a, r_a = torch.linalg.qr(_computable(a).mT)
    u, s, vh = torch.linalg.svd(scale * (r_b @ r_a.mT), full_matrices=False)
    return Svd(q_b @ u, s, q_a @ vh.mT)


def product_inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    """Frobenius inner product `<b1 a1, b2 a2> = tr((b1^T b2)(a2 a1^T))`, in O((o + i) r1 r2)."""
    left = _computable(b1).mT @ _computable(b2)
    right = _computable(a1) @ _computable(a2).mT
    return (left * right).sum((-2, -1))


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """Frobenius norm of `b @ a`. Exact to rounding also where the inner product would cancel: it is taken by QR."""
    _, r_b = torch.linalg.qr(_computable(b))
    _, r_a = torch.linalg.qr(_computable(a).mT)
    norm: Tensor = torch.linalg.matrix_norm(r_b @ r_a.mT)
    return norm


def relative_error(found: Tensor, wanted: Tensor, beside: Tensor | None = None) -> float:
    """`|found - wanted| / |beside|` (Frobenius), `beside` being `wanted` if not given; 0 where that is zero."""
    size = float(torch.linalg.vector_norm(_computable(wanted if beside is None else beside)))
    return float(torch.linalg.vector_norm(_computable(found - wanted))) / size if size else 0.0


def effective_rank(s: Tensor) -> float:
    """`exp(-sum p ln p)` with `p = s / sum s` (Roy and Vetterli, 2007). 0 for a zero matrix."""
    s = _computable(s)
    total = float(s.sum())
    if total == 0:
        return 0.0
    p = s / total
    return float(torch.special.entr(p).sum().exp())


def stable_rank(s: Tensor) -> float:
    """`|M|_F^2 / |M|_2^2`, at most the rank. 0 for a zero matrix."""
    s = _computable(s)
    top = float(s.max()) if s.numel() else 0.0
    return float((s / top).square().sum()) if top > 0 else 0.0


def energy_rank(s: Tensor, energy: float) -> int:
    """Smallest k whose leading singular values hold the share `energy` (0..1) of the squared sum."""
    squares = _computable(s).double().square()
    total = float(squares.sum())
    if total == 0:
        return 0
    kept = squares.cumsum(0) / total
    return int((kept < energy - 1e-12).sum()) + 1


def principal_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of the principal angles between the column spaces of `x (n, p)` and `y (n, q)`, falling, min(p, q)."""
    q_x, _ = torch.linalg.qr(_computable(x))
    q_y, _ = torch.linalg.qr(_computable(y))
    cosines: Tensor = torch.linalg.svdvals(q_x.mT @ q_y)
    return cosines.clamp(max=1.0)


def overlap(x: Tensor, y: Tensor) -> float:
    """Mean squared cosine of the principal angles, 0..1 (phi of Hu et al., 2021, section 7.2).

    Two random subspaces of dimensions p and q in n dimensions have about `max(p, q) / n`, not 0.
    """
    cosines = principal_cosines(x, y)
    return float(cosines.square().mean())


class Range(NamedTuple):
    """An orthonormal basis `q (m, k)` and the exact share of squared Frobenius norm that it misses, 0..1."""

    q: Tensor
    missed: float


def range_finder(
    matrix: Tensor,
    rank: int,
    *,
    oversample: int = 8,
    power: int = 2,
    generator: torch.Generator | None = None,
) -> Range:
    """Basis of the dominant column space of a dense `matrix (m, n)` (Halko, Martinsson and Tropp, 2011, alg. 4.4).

    `rank + oversample` random directions, `power` iterations with re-orthogonalisation. The residual is exact, not
    estimated: `|M|^2 - |q^T M|^2`.
    """
    matrix = _computable(matrix)
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    noise = torch.randn(n, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    q, _ = torch.linalg.qr(matrix @ noise)
    for _ in range(power):
        p, _ = torch.linalg.qr(matrix.mT @ q)
        q, _ = torch.linalg.qr(matrix @ p)
    total = float(matrix.square().sum())
    caught = float((q.mT @ matrix).square().sum())
    return Range(q, max(0.0, 1.0 - caught / total) if total > 0 else 0.0)


def randomized_svd(
    matrix: Tensor, rank: int, *, power: int = 4, generator: torch.Generator | None = None
) -> tuple[Svd, float]:
    """Leading `rank` triples of a dense matrix by `range_finder`, and the exact missed share of the energy."""
    q, _ = range_finder(matrix, rank, power=power, generator=generator)
    small = q.mT @ _computable(matrix)
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    svd = Svd(q @ u, s, vh.mT).truncated(rank)
    total = float(_computable(matrix).square().sum())
    return svd, (max(0.0, 1.0 - float(svd.s.square().sum()) / total) if total > 0 else 0.0)
