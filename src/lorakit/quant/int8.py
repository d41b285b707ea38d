"""int8: one byte for each number and one scale for each row (output channel), the largest number of the row / 127."""

import torch
from torch import Tensor

from lorakit.kernels.codes import unpack_bytes
from lorakit.quant.format import FORMATS, Format, Parts


@FORMATS.add
class Int8(Format):
    """Whole numbers from -127 to 127."""

    name = "int8"
    bits = 8.0
    use = "a quarter of float32 at an error of about 1 %"
    source = "Dettmers et al., NeurIPS 2022, arXiv 2208.07339 (weights alone)"

    def pack(self, weight: Tensor) -> Parts:
        wide = weight.detach().float()
        scales = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return Parts((wide / scales.unsqueeze(1)).round_().to(torch.int8), scales.view(torch.int32))

    def unpack(self, parts: Parts, i: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        return unpack_bytes(parts.codes, parts.scales.view(torch.float32), dtype, rows)
