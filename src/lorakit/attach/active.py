"""Which attached adapters act: switching costs the same for two layers and for two thousand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lorakit.attach.slots import refuse_merged, switch_of
from lorakit.errors import AttachError, UsageError, listed, nearest


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes just these attached adapters act; `[]` none. Several add up. No tensor is touched.

    Raises AttachError for an unknown name, while adapters are merged (they would act twice), or when two of them
    train the same parameter fully.
    """
    switch = switch_of(model)
    refuse_merged(switch)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    faults = [f"no adapter named '{n}' is attached{nearest(n, switch.names)}" for n in wanted if n not in switch.names]
    if faults:
        raise AttachError(listed(faults))
    if len(set(wanted)) != len(wanted):
        raise UsageError(f"an adapter is named twice in {list(wanted)}")
    taken: dict[str, str] = {}
    for name in wanted:
        for parameter in switch.trained[name]:
            if parameter in taken:
                raise AttachError(
                    f"'{taken[parameter]}' and '{name}' both train '{parameter}' fully; only one of them can be active"
                )
            taken[parameter] = name
    switch.active = wanted


def active(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act now."""
    return switch_of(model).active


def attached(model: nn.Module) -> tuple[str, ...]:
    """Names of all attached adapters."""
    return tuple(switch_of(model).names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The plain base within the block. No `requires_grad` is touched, before or after.

    Raises AttachError while adapters are merged: the base is not there.
    """
    switch = switch_of(model)
    refuse_merged(switch)
    before, switch.active = switch.active, ()
    try:
        yield
    finally:
        switch.active = before
