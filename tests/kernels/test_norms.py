"""Lengths of rows by the factors are those of the dense sum, in half precision too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.kernels.norms import row_norms, row_squares
from low_rank import close, pair, seeds, sides


@given(sides, sides, sides, seeds, st.sampled_from([1.0, -0.7]), st.sampled_from([(), (2,)]), st.booleans())
def test_row_norms_are_those_of_the_dense_sum(
    o: int, i: int, r: int, seed: int, scale: float, batch: tuple[int, ...], known: bool
) -> None:
    b, a = pair(o, i, r, seed, batch)
    weight = torch.randn(*batch, o, i, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    squares = row_squares(weight) if known else None
    wanted = torch.linalg.vector_norm(weight + scale * b @ a, dim=-1)
    # a difference of squares: a row that nearly vanishes is exact to the root of the rounding only
    assert close(row_norms(weight, b, a, scale, squares), wanted, 1e-7)


def test_a_row_that_vanishes_has_length_zero_and_not_nan() -> None:
    b, a = pair(50, 7, 3, 5)
    lengths = row_norms(-(b @ a), b, a, 1.0)
    assert bool(lengths.isfinite().all())
    assert float(lengths.max()) < 1e-6


@pytest.mark.parametrize("r", [1, 8, 11, 40])
@pytest.mark.parametrize(("o", "i"), [(96, 64), (7, 32), (64, 50)])
def test_half_precision_is_that_of_the_product(o: int, i: int, r: int) -> None:
    b, a = (x.float() for x in pair(o, i, r, 3))
    weight = torch.randn(o, i, generator=torch.Generator().manual_seed(4)).bfloat16()
    dense = torch.linalg.vector_norm(weight.double() + 0.5 * b.double() @ a.double(), dim=-1)
    assert close(row_norms(weight, b, a, 0.5).double(), dense, 5e-3)
