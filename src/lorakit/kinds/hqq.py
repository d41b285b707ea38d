"""hqq: `HQQLinear` (8, 4, 3, 2, 1 bits), which is no `nn.Linear` and calls its weight `W_q`."""

from typing import Any

from torch import Tensor, nn

from lorakit.kinds import KINDS
from lorakit.kinds.quantized import CodedLinear


@KINDS.add
class HqqLinear(CodedLinear):
    """A weight with scales and zeros of its own optimizer (half-quadratic quantization)."""

    name = "hqq"
    layers = "HQQLinear"
    library = "hqq"
    parameter = "W_q"

    def is_layer(self, module: nn.Module) -> bool:
        return type(module).__name__ == "HQQLinear"

    def read(self, module: Any) -> Any:
        return module.dequantize().detach()

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        del module.W_q
        module.quantize(weight.detach().clone(), **module.quant_config)
