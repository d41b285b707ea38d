"""Weights in few bits made numbers again: C and torch alike, whole and by rows, whatever the width."""

import pytest
import torch

from lorakit.kernels import codes as kernel

SHAPES = [(5, 70), (7, 32), (64, 384), (3, 7), (1, 1), (2, 128)]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernel, "library", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves(way: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    n, i = shape
    codes = torch.randint(16, shape, generator=g, dtype=torch.uint8)
    table, scales = torch.randn(16, generator=g), torch.randn(n, -(-i // 64), generator=g).bfloat16()
    wanted = (table[codes.int()] * scales.float().repeat_interleave(64, 1)[:, :i]).to(dtype)
    packed, rows = kernel.pack_halves(codes), torch.tensor([n - 1, 0, n - 1])
    assert packed.shape == (n, -(-i // 32) * 16)
    assert torch.equal(kernel.unpack_halves(packed, scales, table, i, 64, dtype), wanted)
    assert torch.equal(kernel.unpack_halves(packed, scales, table, i, 64, dtype, rows), wanted[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(way: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, shape, generator=g).to(torch.int8)
    scales, rows = torch.randn(len(codes), generator=g), torch.tensor([len(codes) - 1, 0])
    wanted = (codes.float() * scales.unsqueeze(1)).to(dtype)
    assert torch.equal(kernel.unpack_bytes(codes, scales, dtype), wanted)
    assert torch.equal(kernel.unpack_bytes(codes, scales, dtype, rows), wanted[rows])


def test_no_rows(way: str) -> None:
    codes, scales = torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)
    assert kernel.unpack_bytes(codes, scales, torch.float32, torch.zeros(0, dtype=torch.long)).shape == (0, 5)


def test_rows_that_are_not_there(way: str) -> None:
    codes, scales = torch.zeros(3, 5, dtype=torch.int8), torch.ones(3)
    for row in (-4, 3, 1 << 40):
        with pytest.raises(IndexError):
            kernel.unpack_bytes(codes, scales, torch.float32, torch.tensor([0, row]))
    one = torch.tensor([2]).expand(4)
    assert kernel.unpack_bytes(codes + 1, scales, torch.float32, one).shape == (4, 5)
