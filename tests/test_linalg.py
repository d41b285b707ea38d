"""Algebra on low-rank products, against dense decompositions in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.linalg import (
    effective_rank,
    energy_rank,
    overlap,
    principal_cosines,
    product_inner,
    product_norm,
    product_svd,
    randomized_svd,
    range_finder,
    stable_rank,
)
from low_rank import EXACT, close, pair, seeds, sides


@given(sides, sides, sides, seeds, st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([(), (3,)]))
def test_svd_of_a_product_is_the_dense_svd(
    o: int, i: int, r: int, seed: int, scale: float, batch: tuple[int, ...]
) -> None:
    b, a = pair(o, i, r, seed, batch)
    dense = scale * b @ a
    u, s, v = product_svd(b, a, scale)
    k = min(o, i, r)
    assert s.shape == (*batch, k)
    assert close(s, torch.linalg.svdvals(dense)[..., :k])
    assert close(u @ torch.diag_embed(s) @ v.mT, dense)
    eye = torch.eye(k, dtype=torch.float64).expand(*batch, k, k)
    assert close(u.mT @ u, eye)
    assert close(v.mT @ v, eye)
    assert bool((s[..., :-1] >= s[..., 1:]).all())


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), seeds)
def test_truncation_leaves_the_smallest_possible_error(o: int, i: int, k: int, seed: int) -> None:
    b, a = pair(o, i, 6, seed)
    u, s, v = product_svd(b, a).truncated(k)
    error = torch.linalg.matrix_norm(b @ a - u @ torch.diag(s) @ v.mT)
    rest = torch.linalg.svdvals(b @ a)[k:]  # Eckart and Young: nothing of rank k does better
    assert abs(float(error) - float(rest.square().sum().sqrt())) < EXACT * 100


@given(sides, sides, sides, seeds)
def test_balanced_factors_have_the_product_and_equal_grams(o: int, i: int, r: int, seed: int) -> None:
    b, a = pair(o, i, r, seed)
    left, right = product_svd(b, a).balanced()
    assert close(left @ right, b @ a)
    assert close(left.mT @ left, right @ right.mT)


@given(sides, sides, sides, sides, seeds)
def test_inner_product_and_norm_are_those_of_the_dense_matrices(o: int, i: int, r: int, q: int, seed: int) -> None:
    b, a = pair(o, i, r, seed)
    d, c = pair(o, i, q, seed + 1)
    assert close(product_inner(b, a, d, c), (b @ a * (d @ c)).sum())
    assert close(product_norm(b, a), torch.linalg.matrix_norm(b @ a))


def test_inner_product_and_norm_take_a_batch() -> None:
    b, a = pair(5, 4, 2, 0, (3,))
    d, c = pair(5, 4, 6, 1, (3,))
    assert close(product_inner(b, a, d, c), (b @ a * (d @ c)).sum((-2, -1)))
    assert close(product_norm(b, a), torch.linalg.matrix_norm(b @ a))


def test_norm_of_a_nearly_cancelling_pair_keeps_its_digits() -> None:
    g = torch.Generator().manual_seed(0)
    u, v, w = (torch.randn(n, 1, generator=g, dtype=torch.float64) for n in (8, 6, 6))
    tiny = 1e-10
    b, a = torch.cat([u, -u], 1), torch.cat([v + tiny * w, v], 1).mT
    wanted = tiny * float(u.norm() * w.norm())
    # v + tiny w is rounded at 1e-16 |v|, a millionth of tiny; squares, as in an inner product, would lose it at 1e-8
    assert abs(float(product_norm(b, a)) / wanted - 1) < 1e-4
    by_squares = product_inner(b, a, b, a).clamp_min(0).sqrt()
    assert abs(float(by_squares) / wanted - 1) > 1e-2, "the inner product is no worse, so this test shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    b, a = (t.to(dtype) for t in pair(12, 9, 3, 0))
    u, s, v = product_svd(b, a)
    assert {u.dtype, s.dtype, v.dtype} == {torch.float32}
    exact = torch.linalg.svdvals(b.double() @ a.double())[:3]
    assert close(s.double(), exact, 1e-5)
    assert product_norm(b, a).dtype == torch.float32
    assert product_svd(b.double(), a.double()).s.dtype == torch.float64


# ---------------------------------------------------------------- rows


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("k", [1, 4, 17])
def test_k_equal_singular_values_count_as_rank_k(k: int) -> None:
    s = torch.full((k,), 3.0, dtype=torch.float64)
    assert effective_rank(s) == pytest.approx(k)
    assert stable_rank(s) == pytest.approx(k)
    assert energy_rank(s, 1.0) == k


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_ranks_do_not_depend_on_scale_and_lie_between_one_and_the_count(values: list[float], factor: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for measure in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= measure(s) <= len(values) + 1e-9
        assert measure(s * factor) == pytest.approx(measure(s))
    p = s / s.sum()
    assert effective_rank(s) == pytest.approx(math.exp(-sum(float(x) * math.log(x) for x in p)))


def test_a_zero_matrix_has_rank_zero_by_every_measure() -> None:
    s = torch.zeros(3)
    assert (effective_rank(s), stable_rank(s), energy_rank(s, 0.5)) == (0.0, 0.0, 0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 0.999))
def test_energy_rank_is_the_smallest_that_holds_the_share(values: list[float], energy: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = energy_rank(s, energy)
    squares = s.square()
    assert float(squares[:k].sum()) >= (energy - 1e-9) * float(squares.sum())
    assert float(squares[: k - 1].sum()) < (energy + 1e-9) * float(squares.sum())


# ---------------------------------------------------------------- angles


def test_principal_cosines_of_planes_that_meet_at_a_known_angle() -> None:
    angle = 0.3
    x = torch.eye(4, 2, dtype=torch.float64)  # spans e1, e2
    y = torch.zeros(4, 2, dtype=torch.float64)
    y[0, 0] = 1  # e1: shared
    y[1, 1], y[2, 1] = math.cos(angle), math.sin(angle)  # e2 turned towards e3
    assert close(principal_cosines(x, y), torch.tensor([1.0, math.cos(angle)], dtype=torch.float64))
    assert overlap(x, y) == pytest.approx((1 + math.cos(angle) ** 2) / 2)


@given(st.integers(4, 9), st.integers(1, 3), seeds)
def test_a_subspace_overlaps_fully_with_itself_and_not_at_all_with_its_complement(n: int, p: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    mixed = q[:, :p] @ torch.randn(p, p, generator=g, dtype=torch.float64).add(3 * torch.eye(p, dtype=torch.float64))
    assert overlap(q[:, :p], q[:, p:]) == pytest.approx(0, abs=1e-12)
    if torch.linalg.cond(mixed) < 1e6:
        assert overlap(q[:, :p], mixed) == pytest.approx(1, abs=1e-6)


def test_random_subspaces_overlap_by_the_larger_dimension_over_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    n, p, q, draws = 20, 3, 5, 400
    found = [
        overlap(
            torch.randn(n, p, generator=g, dtype=torch.float64), torch.randn(n, q, generator=g, dtype=torch.float64)
        )
        for _ in range(draws)
    ]
    spread = float(torch.tensor(found).std()) / draws**0.5
    assert sum(found) / draws == pytest.approx(max(p, q) / n, abs=4 * spread)


# ---------------------------------------------------------------- random projections


def decaying(m: int, n: int, generator: torch.Generator) -> Tensor:
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return u * (0.5 ** torch.arange(k, dtype=torch.float64)) @ v.mT


def test_range_finder_says_exactly_what_it_missed(generator: torch.Generator) -> None:
    matrix = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    q, missed = range_finder(matrix, 4, oversample=2, power=1, generator=generator)
    assert q.shape == (30, 6)
    assert close(q.mT @ q, torch.eye(6, dtype=torch.float64))
    rest = matrix - q @ (q.mT @ matrix)
    assert missed == pytest.approx(float(rest.square().sum() / matrix.square().sum()), abs=1e-12)
    assert 0.1 < missed < 1


def test_range_finder_misses_nothing_of_a_matrix_of_lower_rank(generator: torch.Generator) -> None:
    b, a = pair(30, 20, 3, 0)
    assert range_finder(b @ a, 3, generator=generator).missed == pytest.approx(0, abs=1e-12)
    assert range_finder(torch.zeros(4, 5), 2, generator=generator).missed == 0.0
    assert range_finder(torch.randn(3, 50, generator=generator), 8, generator=generator).q.shape == (3, 3)


def test_range_finder_repeats_with_its_generator() -> None:
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(1))
    first, second = (range_finder(matrix, 2, generator=torch.Generator().manual_seed(5)).q for _ in range(2))
    assert torch.equal(first, second)


def test_randomized_svd_is_the_dense_one_where_the_values_fall(generator: torch.Generator) -> None:
    matrix = decaying(40, 25, generator)
    svd, missed = randomized_svd(matrix, 5, generator=generator)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # 8 extra directions and 4 power iterations at a decay of 1/2: error about 2^-(2*4+1)*8 of the first missed value
    assert close(svd.s, s[:5], 1e-9)
    assert close(svd.u @ torch.diag(svd.s) @ svd.v.mT, u[:, :5] @ torch.diag(s[:5]) @ vh[:5], 1e-9)
    assert missed == pytest.approx(float(1 - s[:5].square().sum() / s.square().sum()), rel=1e-6)
