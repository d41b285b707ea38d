"""torchao: `nn.Linear` whose weight is one of its tensors (Int8, Intx, Float8, NF4), of weights alone.

A configuration that quantizes the inputs too gives them no gradient, and says nothing (0.18): it is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.kinds import KINDS, Shapes
from lorakit.kinds.quantized import CodedLinear


@KINDS.add
class TorchaoLinear(CodedLinear):
    """A weight that is a tensor of torchao's."""

    name = "torchao"
    layers = "nn.Linear with a tensor of torchao"
    library = "torchao"

    def matches(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        ours = weight is not None and type(weight.data).__module__.partition(".")[0] == self.library
        return ours and isinstance(module, nn.Linear)

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        weight: Any = module.weight
        told = [getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")]
        if any(how is not None for how in told):
            raise UsageError(
                f"a {type(module).__name__} of this model has a weight of torchao that quantizes its inputs too, "
                "through which no gradient comes; take a configuration of weights alone"
            )
        return super().shapes(module, parameter)

    def read(self, module: Any) -> Any:
        weight: Any = module.weight
        if hasattr(weight, "get_original_weight"):  # NF4
            return weight.get_original_weight().detach()
        return weight.dequantize().detach()

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        old: Any = module.weight
        module.weight = nn.Parameter(_likewise(old, weight.to(old.dtype)), requires_grad=False)


def _likewise(old: Any, weight: Tensor) -> Any:
    """The weight quantized as `old` was, as far as that remembers it."""
    from torchao.quantization import PerGroup, PerRow

    kind: Any = type(old.data) if type(old) is nn.Parameter else type(old)
    with torch.no_grad():
        if hasattr(old, "get_original_weight"):
            made = kind.from_tensor(weight, old.block_size, old.scaler_block_size)
        elif hasattr(old, "target_dtype"):
            made = kind.from_hp(weight, old.block_size, old.target_dtype)
        elif old.qdata.dtype == torch.int8:
            size = old.block_size[-1]
            made = kind.from_hp(weight, granularity=PerRow() if size == weight.shape[-1] else PerGroup(size))
        else:
            made = kind.from_hp(weight, float8_dtype=old.qdata.dtype, granularity=PerRow())
    return made
