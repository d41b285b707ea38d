"""A group of one `nn.Conv2d`; and the batch norm behind it, folded into its weight, its bias and its pair.

A batch norm that does not learn is `gain * y + shift` with fixed numbers, so two passes over the map, and two more in
the backward, can be spared. Which norm stands behind which convolution is seen in a forward pass, not guessed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorakit.attach.group import Group, Member
from lorakit.attach.slots import Factors, Slot
from lorakit.kernels.conv import is_product, joined, lora_conv, lora_point
from lorakit.kernels.lora import Layer, Ready
from lorakit.kernels.maps import Geometry
from lorakit.kernels.products import pack


class Convolution(Group):
    """One convolution, run with its channels last. While it `shows`, it knows what it made until a norm takes it."""

    def __init__(self, member: Member, geometry: Geometry, dtype: torch.dtype) -> None:
        self.geometry = geometry
        self.shows = False
        self._made: tuple[Tensor, int] | None = None
        self.norm: nn.Module | None = None
        self.is_product = is_product(geometry, member[0].weight)  # type: ignore[arg-type]
        super().__init__([member], dtype, False)
        self.use()

    def use(self, gain: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Takes over the layer's weight and bias, multiplied by a gain `(o,)` and with a shift added, if given."""
        module, dtype = self.members[0][0], self.now.a.dtype
        weight: Any = module.weight.detach()  # type: ignore[operator,union-attr]
        bias: Any = module.bias
        if gain is not None:
            weight = weight * gain.view(-1, 1, 1, 1)
            bias = shift if bias is None else bias * gain + shift
        self.gain, self.bias = gain, None if bias is None else bias.detach().to(dtype)
        if self.is_product:
            self.weight = weight.flatten(1).to(dtype)
            self.packed = [pack(self.weight)]
            return
        self.weight = joined(len(self.now.b[0]), weight, dtype)
        self.now = Ready(self.weight[len(weight) :], self.now.b, self.now.into)

    def targets(self) -> Iterator[tuple[Tensor, Tensor, float | Tensor]]:
        """Where each factor has to be copied: (place, factor, what it is multiplied by)."""
        a, b = super().targets()
        yield a
        yield b if self.gain is None else (b[0], b[1], b[2] * self.gain[:, None])

    def takes(self, slot: Slot, factors: Factors, x: Tensor) -> bool:
        """This call is one for the group."""
        return super().takes(slot, factors, x) and x.ndim == 4

    def run(self, slot: Slot, x: Tensor) -> Tensor:
        """The output of the layer, or of the norm behind it."""
        y = super().run(slot, x)
        self._made = (y, y._version) if self.shows else None
        return y

    def made(self, x: Tensor) -> bool:
        """This very tensor came from here, and nobody has written to it since."""
        return self._made is not None and x is self._made[0] and x._version == self._made[1]

    def forget(self) -> None:
        """Holds what was made no longer."""
        self._made = None

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        layer = Layer(self.weight, self.bias, *self.pairs()[0], packed=self.packed[0])
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.is_product:
            return (lora_conv(x, layer, self.geometry, self.now, self.gain),)
        if self.gain is None:
            return (lora_point(x, layer, self.geometry, self.now),)
        layer = layer._replace(b=layer.b * self.gain[:, None])  # so that autograd brings the gain into its gradient
        return (lora_point(x, layer, self.geometry, self.now._replace(into=())),)

    def fold(self, norm: _BatchNorm) -> None:
        """Does this norm's work from now on; the norm passes on what comes from here."""
        gain, shift = _line(norm)
        self.use(gain, shift)
        self.norm, self.shows = norm, True
        norm.__dict__["forward"] = partial(_pass_on, norm, self)

    def unfold(self) -> None:
        """Leaves the norm its own work again."""
        if self.norm is not None:
            self.norm.__dict__.pop("forward", None)
            self.norm, self.shows = None, False
            self.forget()
            self.use()

    def release(self) -> None:
        """Lets the layer and its norm run by themselves again."""
        super().release()
        self.unfold()


def _pass_on(norm: nn.Module, source: Convolution, input: Tensor) -> Tensor:
    """The forward of a folded norm; what does not come from its convolution it norms by itself."""
    if source.made(input):
        source.forget()
        return input
    return type(norm).forward(norm, input)  # type: ignore[no-any-return]


def _line(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift `(o,)` of a norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach()
    shift = -norm.running_mean * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach()


@contextmanager
def norms_seen(model: nn.Module, groups: Sequence[Group]) -> Iterator[dict[_BatchNorm, Convolution]]:
    """Yields a dict that has, behind the block, norm -> the convolution whose output it was given, for norms that can
    be folded: the only one that read it, and that once."""
    found: dict[_BatchNorm, Convolution] = {}
    calls: list[tuple[_BatchNorm, Convolution]] = []
    sources = [group for group in groups if isinstance(group, Convolution) and not group.members[0][0]._forward_hooks]

    def see(norm: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        x = args[0] if args else more["input"]
        calls.extend((norm, source) for source in sources if source.made(x) and isinstance(norm, _BatchNorm))

    norms = [module for module in model.modules() if sources and _is_fixed(module)]
    handles = [norm.register_forward_pre_hook(see, with_kwargs=True) for norm in norms]
    for source in sources:
        source.shows = True
    try:
        yield found
        for norm, source in calls:
            if sum(norm is other or source is given for other, given in calls) == 1:
                found[norm] = source
    finally:
        for handle in handles:
            handle.remove()
        for source in sources:
            source.shows = False
            source.forget()


def _is_fixed(module: nn.Module) -> bool:
    """A batch norm that nothing and nobody changes."""
    return (
        isinstance(module, nn.BatchNorm2d)
        and type(module).forward is nn.BatchNorm2d.forward
        and module.running_mean is not None
        and not module.training
        and not module._modules
        and "forward" not in module.__dict__
        and not any(p.requires_grad for p in module.parameters())
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Equal within so much of the largest value."""
    size = max(float(wanted.float().abs().max()), 1e-6)
    return float((found.float() - wanted.float()).abs().max()) <= tolerance * size
