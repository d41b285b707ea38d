"""A model that is called as it is: for tasks whose inputs are no tokens. Nothing is packed, cast or kept."""

from torch import nn

from lorakit.trunk.memory import keep_freed_memory
from lorakit.trunk.trunk import Trunk


class Direct(Trunk):
    """A trunk that leaves the model alone. `width` is what the rule of the learning rate goes by."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__(model)
        self._width = width

    def __enter__(self) -> "Direct":
        if self._device().type == "cpu":
            keep_freed_memory()
        return self

    @property
    def width(self) -> int:
        """Numbers in what the model makes of one input."""
        return self._width
