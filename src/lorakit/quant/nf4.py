"""nf4 and int4: four bits for each number, one scale in bfloat16 for every 64 numbers of a row.

nf4's 16 values are quantiles of a normal distribution (Dettmers et al., 2023), int4's are evenly spaced. The scale of
a block is not simply its largest number: of ten candidates, with either sign, it is the one of least squared error,
which is 6 to 9 % less than the largest number gives.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lorakit.kernels.codes import pack_halves, unpack_halves
from lorakit.quant.format import FORMATS, Format, Parts

_BLOCK = 64
_SHARES = tuple(sign * share for share in (1.0, 0.95, 0.9, 0.85, 0.8) for sign in (1, -1))  # of the largest number
_ROOM = 1 << 18  # numbers parts at a time


@FORMATS.add
class Nf4(Format):
    """Quantiles of a normal distribution."""

    name = "nf4"
    bits = 4.25
    use = "an eighth of float32 at an error of about 9 %"
    source = "Dettmers et al., NeurIPS 2023, arXiv 2305.14314"
    values: ClassVar[Tensor] = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip

    def pack(self, weight: Tensor) -> Parts:
        n_rows = max(1, _ROOM // max(1, weight.shape[1]))
        pieces = [self._piece(rows.detach().float()) for rows in torch.split(weight, n_rows)]
        return Parts(*(torch.cat(piece) for piece in zip(*pieces)))

    def unpack(self, parts: Parts, i: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        table = self.values.to(parts.codes.device)
        return unpack_halves(parts.codes, parts.scales.view(torch.bfloat16), table, i, _BLOCK, dtype, rows)

    def _piece(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        o, i = weight.shape
        table = self.values.to(weight.device)
        between = (table[1:] + table[:-1]) / 2
        blocks = torch.nn.functional.pad(weight, (0, -i % _BLOCK)).view(o, -1, _BLOCK)
        largest = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        blocks = blocks / largest
        scales, codes = largest, torch.zeros(blocks.shape, dtype=torch.int32, device=weight.device)
        least = torch.full_like(largest, torch.inf)
        for share in _SHARES:
            scale = (largest * share).bfloat16().float()
            ratio = scale / largest
            found = torch.bucketize(blocks / ratio, between, out_int32=True)
            error = (table[found] * ratio - blocks).square_().sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, scale, scales)
            codes = torch.where(better, found, codes)
        return pack_halves(codes.to(torch.uint8).view(o, -1)[:, :i]), scales.squeeze(-1).bfloat16().view(torch.int16)


@FORMATS.add
class Int4(Nf4):
    """Whole numbers from -8 to 7."""

    name = "int4"
    use = "as nf4, with evenly spaced values, at an error of about 10 %"
    source = "the usual one"
    values: ClassVar[Tensor] = torch.arange(-8, 8) / 8.0
