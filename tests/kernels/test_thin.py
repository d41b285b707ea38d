"""The low-rank side of a group against torch in float64, by the C functions and without them."""

import pytest
import torch
from torch import Tensor

from lorakit.kernels import thin as kernel

# rows, input, outputs, ranks as padded, ranks
SHAPES = [
    (1, 32, (32,), (8,), (8,)),
    (7, 64, (32, 96), (8, 16), (5, 16)),
    (130, 96, (64, 32, 32), (8, 24, 8), (8, 20, 1)),
    (301, 384, (1536,), (16,), (16,)),
    (9, 50, (31,), (8,), (8,)),  # widths that the C functions do not take
    (5, 32, (32, 64), (8, 3), (8, 3)),
]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "_functions", lambda: None)
    return str(request.param)


class Case:
    """Random numbers of one shape; columns of a wider matrix, as the layers of a group leave and take them."""

    def __init__(self, n: int, i: int, outs: tuple[int, ...], wide: tuple[int, ...], ranks: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(n)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        self.x, self.a = numbers(n, i + 3)[:, :i], numbers(sum(wide), i)
        self.b = [numbers(r, o) for r, o in zip(wide, outs)]
        self.ys = numbers(n, sum(outs)).split_with_sizes(outs, 1)
        self.dx = numbers(n, i)
        self.wide, self.ranks, self.outs = wide, ranks, outs
        self.s = (self.x.double() @ self.a.double().T).bfloat16()


def near(found: Tensor, exact: Tensor) -> bool:
    return float((found.double() - exact).abs().max()) <= 0.01 * float(exact.abs().max()) + 1e-6  # 2^-8, and a little


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_added_to_every_output(way: str, shape: tuple[int, ...], gained: bool) -> None:
    case = Case(*shape)  # type: ignore[arg-type]
    gains = [torch.randn(o) if gained and k != 1 else None for k, o in enumerate(case.outs)]
    biases = [torch.randn(o).bfloat16() if k == 0 else None for k, o in enumerate(case.outs)]
    exact = [
        y.double() + s.double() @ b.double() for y, s, b in zip(case.ys, case.s.split_with_sizes(case.wide, 1), case.b)
    ]
    for k, (gain, bias) in enumerate(zip(gains, biases)):
        if gain is not None:
            exact[k] = exact[k] * gain.double() + (0.0 if bias is None else bias.double())
    s = kernel.add_pairs(case.x, case.a, case.b, case.ys, gains, biases)
    assert near(s, case.x.double() @ case.a.double().T)
    assert all(near(y, right) for y, right in zip(case.ys, exact))


@pytest.mark.parametrize("masters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_added_where_they_belong(way: str, shape: tuple[int, ...], masters: torch.dtype) -> None:
    case = Case(*shape)  # type: ignore[arg-type]
    sizes, scales = [(r, o) for r, o in zip(case.ranks, case.outs)], [0.5 + k for k in range(len(case.outs))]
    into = [(torch.ones(r, case.x.shape[1], dtype=masters), torch.ones(o, r, dtype=masters)) for r, o in sizes]
    ds = [dy.double() @ b.double().T for dy, b in zip(case.ys, case.b)]
    dx = case.dx.double() + torch.cat(ds, 1) @ case.a.double()
    kernel.pair_gradients(case.x, case.s, case.a, case.b, case.ys, into, scales, case.dx)
    thin = case.s.double().split_with_sizes(case.wide, 1)
    for (da, db), (r, _), d, s, dy, scale in zip(into, sizes, ds, thin, case.ys, scales):
        assert near(da, 1 + (d.T @ case.x.double())[:r])
        assert near(db, 1 + scale * (dy.double().T @ s)[:, :r])
    assert near(case.dx, dx)


def test_what_is_not_wanted_is_left_out(way: str) -> None:
    case = Case(*SHAPES[1])  # type: ignore[arg-type]
    db = torch.zeros(96, 16)
    before = case.dx.clone()
    for x in (case.x, None):  # which nothing is wanted of
        db.zero_()
        kernel.pair_gradients(x, case.s, case.a, case.b, case.ys, [(None, None), (None, db)], (1.0, 1.0))
        assert near(db, case.ys[1].double().T @ case.s.double()[:, 8:])
    assert torch.equal(case.dx, before)
    kernel.pair_gradients(None, case.s, case.a, case.b, case.ys, [(None, None), (None, db)], (1.0, 1.0), case.dx)
    ds = torch.cat([dy.double() @ b.double().T for dy, b in zip(case.ys, case.b)], 1)
    assert near(case.dx, before.double() + ds @ case.a.double())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_what_is_added(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case(999, 64, (96,), (8,), (8,))
        into = [(torch.zeros(8, 64), torch.zeros(96, 8))]
        kernel.pair_gradients(case.x, case.s, case.a, case.b, case.ys, into, (1.0,), case.dx)
        first = [t.clone() for t in into[0] if t is not None]
        for t in first:
            assert t.abs().min() > 0
        again = [(torch.zeros(8, 64), torch.zeros(96, 8))]
        kernel.pair_gradients(case.x, case.s, case.a, case.b, case.ys, again, (1.0,), case.dx)
        assert all(torch.equal(one, two) for one, two in zip(first, again[0]))
        assert near(first[1], case.ys[0].double().T @ case.s.double())
    finally:
        torch.set_num_threads(before)


def test_numbers_that_are_none_are_kept(way: str) -> None:
    case = Case(20, 64, (64,), (8,), (8,))
    case.ys[0][3, 5] = float("nan")
    into = [(torch.zeros(8, 64), torch.zeros(64, 8))]
    kernel.pair_gradients(case.x, case.s, case.a, case.b, case.ys, into, (1.0,))
    assert into[0][1].isnan().any(1).nonzero().flatten().tolist() == [5]
    assert bool(into[0][0].isnan().all())
