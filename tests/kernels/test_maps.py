"""The low-rank side of a convolution by our C functions: what torch gives in float64, for every way a kernel moves."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.kernels import maps
from lorakit.kernels.maps import Geometry, add_conv_pair, conv_pair_gradients, rows_of

LAST = torch.channels_last
needs_bf16 = pytest.mark.skipif(
    maps._functions() is None, reason="runs where a C compiler is found and the processor multiplies pairs of bfloat16"
)


def drawn(*shape: int) -> torch.Tensor:
    made = torch.randn(*shape).bfloat16()
    return made.contiguous(memory_format=LAST) if made.ndim == 4 else made


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max().clamp(min=1e-6)


CASES = {
    "small maps": (5, 32, 64, (4, 4), (3, 3), Geometry((1, 1), (1, 1), (1, 1)), 8),
    "stride": (3, 64, 32, (9, 7), (3, 3), Geometry((2, 2), (1, 1), (1, 1)), 8),
    "one place": (7, 32, 32, (1, 1), (3, 3), Geometry((1, 1), (1, 1), (1, 1)), 16),
    "dilation": (2, 32, 96, (11, 13), (3, 2), Geometry((1, 2), (2, 0), (2, 3)), 24),
    "maps in parts": (2, 32, 32, (70, 61), (3, 3), Geometry((1, 1), (1, 1), (1, 1)), 8),
    "more padding than kernel": (2, 32, 32, (3, 3), (2, 2), Geometry((1, 1), (4, 3), (1, 1)), 8),
    "one image": (1, 128, 128, (5, 5), (5, 5), Geometry((1, 1), (2, 2), (1, 1)), 32),
}


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_those_of_torch(case, threads, monkeypatch):
    n, i, o, size, kernel, geometry, r = CASES[case]
    torch.manual_seed(0)
    rank = r - 3
    x, a, b = drawn(n, i, *size), drawn(r, i, *kernel), drawn(r, o)
    a[rank:], b[rank:] = 0, 0
    y = F.conv2d(x, drawn(o, i, *kernel), None, *geometry[:1], geometry.padding, geometry.dilation).contiguous(
        memory_format=LAST
    )
    dy, gain, before = drawn(*y.shape), torch.rand(o), y.double()
    into = torch.ones(rank, i * kernel[0] * kernel[1]), torch.ones(o, rank)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # torch's own way is not taken
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        s = add_conv_pair(geometry, x, y, a, b)
        joined = conv_pair_gradients(geometry, x, s, a, b, dy, into, 1.5, gain)
    finally:
        torch.set_num_threads(before_threads)
    thin = rows_of(geometry.run(x.double(), a.double(), None))
    close(s, thin, 1e-2)
    wide = s.double() @ b.double()
    close(rows_of(y), rows_of(before) + wide, 1e-2)
    rows = rows_of(dy).double()
    ds = rows @ b.double().T
    assert torch.equal(joined[:, :o], dy)
    close(rows_of(joined[:, o:]), ds, 1e-2)
    own = joined[:, o:].double()
    da = geometry.gradients(own, x.double(), a.double(), (False, True))[1]
    close(into[0], 1 + da[:rank].reshape(rank, -1), 1e-4)
    db = (rows.T @ s.double())[:, :rank] * 1.5 * gain.double()[:, None]
    close(into[1], 1 + db, 1e-4)


@needs_bf16
def test_few_tables_are_kept_those_that_were_asked_for_last(monkeypatch):
    geometry, made = Geometry((1, 1), (1, 1), (1, 1)), []
    inner = maps._made_table

    def counted(*what):
        made.append(what[2])
        return inner(*what)

    monkeypatch.setattr(maps, "_tables", {})
    monkeypatch.setattr(maps, "_made_table", counted)
    monkeypatch.setattr(maps, "_KEPT", 9 * (64 + 36 + 16))
    for height in (4, 6, 8, 4, 2, 4, 8, 6):
        found = maps._table(geometry, (3, 3), height, height)
        assert found.shape == (height * height, 9)
        assert sum(table.numel() for table in maps._tables.values()) <= maps._KEPT
    assert made == [4, 6, 8, 2, 6]


def test_only_what_is_wanted_is_made():
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    x, a, b, dy = drawn(2, 32, 4, 4), drawn(8, 32, 3, 3), drawn(8, 32), drawn(2, 32, 4, 4)
    s = rows_of(geometry.run(x, a, None))
    da, db = torch.zeros(8, 288), torch.zeros(32, 8)
    conv_pair_gradients(geometry, x, s, a, b, dy, (da, None), 1.0)
    assert da.abs().sum() > 0
    conv_pair_gradients(geometry, x, s, a, b, dy, (None, db), 1.0)
    assert db.abs().sum() > 0


def test_other_widths_and_dtypes_run_by_torch():
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    for x, a, b in (
        (torch.randn(2, 5, 4, 4), torch.randn(3, 5, 3, 3), torch.randn(3, 7)),
        (drawn(2, 20, 4, 4), drawn(8, 20, 3, 3), drawn(8, 32)),
        (drawn(0, 32, 4, 4), drawn(8, 32, 3, 3), drawn(8, 32)),
    ):
        y = torch.zeros(len(x), b.shape[1], 4, 4, dtype=x.dtype).contiguous(memory_format=LAST)
        s = add_conv_pair(geometry, x, y, a, b)
        if len(x):
            close(rows_of(y), s.double() @ b.double(), 1e-2)
        assert s.shape == (len(x) * 16, len(a))
