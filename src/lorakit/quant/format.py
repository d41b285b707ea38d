"""What a format of quantized weights is, and the registry that finds its files."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakit.registry import Registry


class Parts(NamedTuple):
    """A weight `W (o, i)` in a format. Both parts are whole numbers: a change of a model's dtype leaves them alone."""

    codes: Tensor
    scales: Tensor


class Format(ABC):
    """`W (o, i)` <-> codes and scales. Class attributes: `name`, `bits` for each number with its scales, `use`,
    `source`."""

    name: ClassVar[str]
    bits: ClassVar[float]
    use: ClassVar[str]
    source: ClassVar[str]

    def __reduce__(self) -> tuple[Any, ...]:
        return format_named, (self.name,)  # pickle and deepcopy give the registered one

    @abstractmethod
    def pack(self, weight: Tensor) -> Parts:
        """Of `weight (o, i)`, in any float dtype, without NaN."""

    @abstractmethod
    def unpack(self, parts: Parts, i: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """`W (o, i)`; or only `rows (k,)` of it, as `(k, i)`."""


FORMATS: Registry[Format] = Registry("format", "lorakit.quant")


def format_named(name: str) -> Format:
    """The registered format of this name."""
    return FORMATS[name]
