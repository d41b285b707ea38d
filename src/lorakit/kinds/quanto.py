"""quanto: `QLinear` of optimum-quanto, frozen (qint8, qint4, qint2, qfloat8).

Its weight says that it requires a gradient, and would get one; attaching freezes it like every parameter of the base.
"""

from typing import Any

from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.kinds import KINDS, Shapes
from lorakit.kinds.quantized import CodedLinear, frozen


@KINDS.add
class QuantoLinear(CodedLinear):
    """A weight in quanto's tensors."""

    name = "quanto"
    layers = "optimum-quanto QLinear"
    library = "optimum"

    def is_layer(self, module: nn.Module) -> bool:
        return type(module).__name__ == "QLinear"

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        if not module.frozen or getattr(module, "activation_qtype", None) is not None:
            what = (
                "quantizes its activations too" if module.frozen else "is not frozen yet: call quanto's freeze(model)"
            )
            raise UsageError(f"a QLinear of this model {what}; an adapter goes on frozen weights alone")
        return super().shapes(module, parameter)

    def read(self, module: Any) -> Any:
        weight: Any = module.weight
        return weight.dequantize().detach()

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        module.weight = frozen(weight)
        module.freeze()
        module.weight.requires_grad_(False)
