"""Did every attached update really run? A layer whose weight is read without a call would learn nothing, silently."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorakit.attach.prompts import SEEN
from lorakit.attach.slots import switch_of
from lorakit.errors import NoEffectError
from lorakit.update import same_tensor


def probe(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """Runs one batch and names the layers whose active update never ran; empty if all is well.

    `batch` is what the model is called with: a mapping of keywords, a sequence of arguments, or one tensor. The model
    runs in the mode it is in, and nothing is kept: no gradient, no running statistics, no random number drawn.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with recorded(model) as unseen, torch.no_grad(), torch.random.fork_rng(devices):
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, Sequence):
                model(*batch)
            else:
                model(batch)
    finally:
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if not same_tensor(buffer, before):
                buffer.copy_(before)
    return tuple(unseen)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list that, after the block, names the layers whose active update did not run in it."""
    switch = switch_of(model)
    wanted = dict.fromkeys(path for name in switch.active for path in switch.names[name])
    if switch.prompts is not None and switch.prompts.acts:
        wanted[SEEN] = None
    unseen: list[str] = []
    switch.seen = set()
    try:
        yield unseen
        unseen += [path for path in wanted if path not in switch.seen]
    finally:
        switch.seen = None


def refuse_unseen(model: nn.Module, unseen: Sequence[str]) -> None:
    """NoEffectError where a layer's update never ran."""
    if unseen:
        switch = switch_of(model)
        n_layers = len({path for name in switch.active for path in switch.names[name]})
        named = ", ".join(f"'{path}'" for path in unseen[:4]) + (", ..." if len(unseen) > 4 else "")
        raise NoEffectError(
            f"{len(unseen)} of {n_layers} layers never ran in the probe batch: {named}; their weight is used without "
            "calling the layer, or not at all: attach them with drive='weight', or take them out of the plan"
        )
