"""What a method does between the steps of a fit, beside learning by gradients."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor


class Course(ABC):
    """Of all layers of one method, from the first step (1) to the last."""

    @abstractmethod
    def before(self, step: int) -> None:
        """The gradients of this step are there, and nothing has moved: they may be read and added to."""

    @abstractmethod
    def after(self, step: int) -> None:
        """The optimizer has moved the factors: they may be moved further."""

    @abstractmethod
    def is_done(self, step: int) -> bool:
        """From this step on what is learned has its final form: the best may be chosen from here."""

    @abstractmethod
    def memory(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `memory`."""
