"""A model on another device for a while. Where it was, it stays as it is: nothing is copied back."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


def place_of(model: nn.Module) -> torch.device:
    """Where a model is: its first parameter."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model computes in: its first parameter or buffer in floats (a quantized weight is kept in whole
    numbers)."""
    return next(t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


@contextmanager
def placed(model: nn.Module, device: torch.device, *, keep: bool = True) -> Iterator[None]:
    """Within the block, all parameters and buffers of the model are on `device`, the same objects as before.

    With `keep` the originals wait where they were, and come back bit for bit; without, the memory is let go, and the
    model stays on the device. New tensors of the block's CUDA calls go to that GPU.
    """
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    if place_of(model) == device:
        with there:
            yield
        return
    kept: list[tuple[Tensor, Tensor]] = []
    with there:
        try:
            for tensor in [*model.parameters(), *model.buffers()]:
                if keep:
                    kept.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for tensor, original in kept:
                tensor.data = original
