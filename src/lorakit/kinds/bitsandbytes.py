"""bitsandbytes: `Linear4bit` (nf4, fp4, with double quantization or not) and `Linear8bitLt`.

In eval mode without gradients, on processors with bfloat16 products, `Linear4bit` brings its codes into another order
for good (`packing_format_for_cpu`), with its scales rounded to bfloat16; its own functions then read nonsense out of
them (0.50.2). `read` knows both orders. `Linear8bitLt` rounds its inputs too in eval mode; products with an adapter do
not.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kinds import KINDS
from lorakit.kinds.quantized import CodedLinear


@KINDS.add
class BnbLinear4bit(CodedLinear):
    """Four bits."""

    name = "bnb_4bit"
    layers = "bitsandbytes Linear4bit"
    library = "bitsandbytes"

    def is_layer(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")

    def read(self, module: Any) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = module.weight
        state = getattr(weight, "quant_state", None) or module.quant_state
        if not getattr(state, "packing_format_for_cpu", False):
            return dequantize_4bit(weight.data, state).detach()
        o, i = state.shape
        pairs = weight.data.reshape(-1, 32)
        codes = torch.cat([pairs & 15, pairs >> 4], -1).reshape(o // 32, i // 2, 32, 2)
        codes = codes.transpose(-3, -2).reshape(o, i).int()
        scales = state.absmax.float().t().repeat_interleave(state.blocksize, 1)
        return (state.code.float()[codes] * scales).to(state.dtype)

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        from bitsandbytes.nn import Params4bit

        old: Any = module.weight
        how = {name: getattr(old, name) for name in ("compress_statistics", "quant_type", "blocksize", "quant_storage")}
        new = Params4bit(weight.detach().clone(), requires_grad=False, module=module, **how)
        module.weight = new.to(weight.device)


@KINDS.add
class BnbLinear8bit(CodedLinear):
    """Eight bits, LLM.int8."""

    name = "bnb_8bit"
    layers = "bitsandbytes Linear8bitLt"
    library = "bitsandbytes"

    def is_layer(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Linear8bitLt"

    def read(self, module: Any) -> Any:
        weight, state = self._parts(module)
        return weight.data.float() * (state.float() / 127).unsqueeze(1)

    def _parts(self, module: Any) -> tuple[Any, Tensor]:
        weight: Any = module.weight
        own = getattr(weight, "SCB", None)
        return weight, module.state.SCB if own is None else own

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        from bitsandbytes.nn import Int8Params

        new = Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        module.weight = new.to(weight.device)
        module.state.CB = module.state.SCB = None
