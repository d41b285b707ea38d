"""Bases that see: how a model's patches or maps become one vector, how it wants its images, what an image costs.

A model is one of Transformers (ViT, DINOv2, CLIP's and SigLIP's vision half, ResNet, ConvNext, Swin ...), or any torch
module that takes pixels `(b, channels, height, width)` and gives features `(b, d)`, maps `(b, d, height, width)` or
patches `(b, n, d)`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.data.pixels import Lens
from lorakit.errors import LorakitError, UsageError, nearest
from lorakit.tasks.base import Base
from lorakit.trunk import dtype_of, eval_mode, place_of

IMAGE_POOLS = ("own", "cls", "mean")
_PIXELS_A_TOKEN = 256  # of a network without patches: those of a ViT are 16 x 16


class Sight(NamedTuple):
    """What a model makes of one image: numbers in the pooled vector, and its cost in tokens."""

    width: int
    cost: int


def image_base(
    model: nn.Module,
    name: str,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    pool: str = "own",
) -> Base:
    """A torch module as a base for images: it takes pixels `(x / 255 - mean) / std`, resized to `size`.

    Without a `size` as large as the images are; `channels` default to those of its first convolution. `name` is what an
    adapter remembers; to use one, give the same base again.
    """
    lens = Lens(size, channels or channels_of(model), tuple(mean), tuple(std))
    return Base(model, lens, name, _checked(pool), 0)


def lens_of(eye: Any, channels: int, size: tuple[int, int] | None = None) -> Lens:
    """How a base wants its images: a Lens, an image processor of Transformers, or None for a plain one."""
    if isinstance(eye, Lens):
        return eye
    return Lens(size, channels) if eye is None else Lens.of(getattr(eye, "image_processor", eye), channels)


def size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a model takes, by its configuration; None where that does not say."""
    side = getattr(getattr(model, "config", None), "image_size", None)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return (int(height), int(width)) if height and width else None


def channels_of(model: nn.Module) -> int:
    """Of the images that a model takes."""
    known = getattr(getattr(model, "config", None), "num_channels", None)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return int(known or (first.in_channels if first is not None else 3))


def prepared(model: nn.Module, eye: Any, pool: str | None) -> tuple[nn.Module, Lens, str]:
    """A model as it was loaded, its lens, and its pooling: its own, unless that is a matrix like ViT's, whose place the
    head takes: then the first patch, which is the class token."""
    _checked(pool or "own")
    pooler = getattr(model, "pooler", None)
    dense = isinstance(pooler, nn.Module) and any(isinstance(module, nn.Linear) for module in pooler.modules())
    if dense and pool == "own":
        raise UsageError(
            f"the pooling of a {type(model).__name__} is a matrix, whose place the head takes; use cls or mean"
        )
    if dense:
        model.pooler = None  # type: ignore[assignment]
    lens = lens_of(eye, channels_of(model), size_of(model))
    return model, lens, pool or ("cls" if dense else "own")


def _checked(pool: str) -> str:
    if pool not in IMAGE_POOLS:
        raise UsageError(f"unknown pooling '{pool}'{nearest(pool, IMAGE_POOLS)}")
    return pool


def pooled(found: Any, pool: str) -> Tensor:
    """One vector for each image from what a model gives: `(b, d)`, float32. LorakitError if it cannot be pooled so.

    "own": what it pools by itself, else as "mean"; "cls": its first patch; "mean": that of its patches or maps.
    """
    states = found if isinstance(found, Tensor) else getattr(found, "last_hidden_state", None)
    own = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
    state = own if pool == "own" and own is not None else states
    if not isinstance(state, Tensor) or state.ndim not in (2, 3, 4):
        shape = f"a tensor {tuple(state.shape)}" if isinstance(state, Tensor) else type(found).__name__
        raise LorakitError(
            f"the base gives {shape} for images, which has no vector to read; it must give features (b, d), maps "
            "(b, d, height, width) or patches (b, n, d), or an output of Transformers"
        )
    if state.ndim == 2:
        return state.float()
    if state.ndim == 4:
        if pool == "cls":
            raise UsageError("the base gives maps, which have no class token; pool them by own or mean")
        return state.float().flatten(2).mean(2)
    return state[:, 0].float() if pool == "cls" else state.float().mean(1)


@torch.no_grad()
def sight_of(model: nn.Module, shape: tuple[int, int, int], pool: str) -> Sight:
    """Tries a model on one black image. LorakitError if it takes none of this shape."""
    pixels = torch.zeros(1, *shape, device=place_of(model), dtype=dtype_of(model))
    try:
        named = getattr(model, "main_input_name", "") == "pixel_values"
        with eval_mode(model):  # a single image would be no batch for batch norm
            found = model(pixel_values=pixels) if named else model(pixels)
    except Exception as error:
        size = " x ".join(map(str, shape))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(
            f"the base, a {type(model).__name__}, takes no images of {size} (channels, height, width): {reason}"
        ) from None
    states = getattr(found, "last_hidden_state", None)
    patches = states.shape[1] if isinstance(states, Tensor) and states.ndim == 3 else 0
    return Sight(pooled(found, pool).shape[1], patches or max(1, shape[1] * shape[2] // _PIXELS_A_TOKEN))
