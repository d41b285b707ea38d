"""From images to pixels: how a base wants to see them, and batches of them.

What is kept is bytes: all images at the base's size where they take less than a quarter of what is free, else each is
decoded when its batch comes. Floats are made for one pass at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.batches import IGNORED, Batch, Examples
from lorakit.data.faults import refuse_rows, tolerant
from lorakit.data.images import Images
from lorakit.data.pictures import opened
from lorakit.errors import DataError, LorakitError, MissingExtraError
from lorakit.trunk.memory import available_memory

_SHARE = 0.25  # of what is free, for decoded images
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TRIALS = ((40, 64), (64, 48))


@dataclass(frozen=True)
class Lens:
    """Makes pixels as a base wants them: `channels`, resized to `size` (height, width), `(x / 255 - mean) / std`.

    Without a `size` images are taken as large as the first of them; `resizes` false refuses others. Where there is a
    `processor` of Transformers, that resizes and cuts; with `exact` its floats are taken as they are too.
    """

    size: tuple[int, int] | None = None
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    processor: Any = None
    exact: bool = False
    resizes: bool = True

    @classmethod
    def of(cls, processor: Any, channels: int = 3) -> "Lens":
        """That of an image processor of Transformers. LorakitError if its images are of several sizes."""
        size = _trials(processor, channels)
        plain = 1.0 if not getattr(processor, "do_rescale", True) else 255 * float(processor.rescale_factor)
        normal = getattr(processor, "do_normalize", True)
        mean, std = (processor.image_mean, processor.image_std) if normal else ([0.0], [1.0])
        found = cls(size, channels, _divided(mean, plain), _divided(std, plain), processor)
        picture = _noise(_TRIALS[0], channels)
        wanted = torch.from_numpy(np.array(_seen(processor, picture)))
        mine = found.floats(torch.from_numpy(found.see(picture))[None])[0]
        alike = mine.shape == wanted.shape and torch.allclose(mine, wanted.float(), atol=1e-5)
        return found if alike else replace(found, exact=True)

    def see(self, picture: Any) -> NDArray[Any]:
        """Pixels `(channels, height, width)` of an array or an image of Pillow; uint8, or floats if `exact`.

        DataError (without a name) if it cannot be made to fit.
        """
        if isinstance(picture, np.ndarray):
            planes = 1 if picture.ndim == 2 else picture.shape[2]
            if planes == self.channels and self.processor is None and self.size in (None, picture.shape[:2]):
                return np.array(picture.reshape(*picture.shape[:2], planes).transpose(2, 0, 1), order="C")
        image = _with_channels(picture, self.channels)
        if self.processor is not None:
            more = {} if self.exact else {"do_rescale": False, "do_normalize": False}
            found = _seen(self.processor, image, **more)
            return found.astype(np.float32) if self.exact else np.rint(found).clip(0, 255).astype(np.uint8)
        if self.resizes and self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], resample=2)  # bilinear, over all pixels that become one
        array = np.asarray(image)
        return np.array(array.reshape(*array.shape[:2], self.channels).transpose(2, 0, 1), order="C")

    def floats(self, pixels: Tensor) -> Tensor:
        """What the base gets: `pixels (b, channels, height, width)` from `see` -> float32."""
        if self.exact:
            return pixels
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def save_pretrained(self, place: Any) -> None:
        """Writes the processor, if there is one; else the base's configuration says it all."""
        if self.processor is not None:
            self.processor.save_pretrained(place)


def _divided(values: Any, by: float) -> tuple[float, ...]:
    return tuple(float(x) / by for x in (values if isinstance(values, list | tuple) else [values]))


def _noise(size: tuple[int, int], channels: int) -> Any:
    draws = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    return _with_channels(draws, channels)


def _seen(processor: Any, image: Any, **more: Any) -> NDArray[Any]:
    found: NDArray[Any] = np.asarray(processor(images=image, return_tensors="np", **more)["pixel_values"][0])
    return found


def _trials(processor: Any, channels: int) -> tuple[int, int]:
    shapes = {_seen(processor, _noise(size, channels)).shape for size in _TRIALS}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise LorakitError(
            f"its {type(processor).__name__} makes images of several sizes ({', '.join(map(str, sorted(shapes)))}); "
            "this task needs one size for all"
        )
    _, height, width = next(iter(shapes))
    return height, width


def _with_channels(picture: Any, channels: int) -> Any:
    """As an image of Pillow with so many channels."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "image") from None
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3 and picture.shape[2] == 1:
            picture = picture[:, :, 0]
        if picture.ndim == 3 and picture.shape[2] not in _MODES:
            raise DataError(f"has {picture.shape[2]} channels, which cannot be resized; give it at the base's size")
        picture = Image.fromarray(picture)
    if channels not in _MODES:
        raise DataError(f"is an image of mode {picture.mode}, and the base takes {channels} channels")
    return picture if picture.mode == _MODES[channels] else picture.convert(_MODES[channels])


@dataclass(frozen=True, eq=False)
class Pixels(Examples):
    """Images with the number of their label, or IGNORED. `cost` of each in tokens; `kept` are all that were decoded."""

    rows: Images
    labels: tuple[tuple[int], ...]
    lens: Lens
    cost: int
    lines: tuple[int, ...]
    kept: Tensor | None = None

    @classmethod
    def of(cls, rows: Images, labels: Sequence[int], lens: Lens, cost: int) -> "Pixels":
        """Decoded now if there is room; looked at now too where bad rows are left out. BadRowsError names every image
        that cannot be used."""
        found = cls(rows, tuple((label,) for label in labels), lens, cost, rows.lines)
        n_bytes = len(rows) * lens.channels * int(np.prod(lens.size or (1, 1))) * (4 if lens.exact else 1)
        room = n_bytes <= _SHARE * available_memory()
        if not room and not tolerant():
            return found
        seen, faults = list[Tensor](), list[tuple[int, str]]()
        for i in range(len(rows)):
            try:
                pixels = found.see(i)
                seen += [pixels] if room else []
            except DataError as error:
                faults.append((rows.lines[i], str(error)))
        refuse_rows(rows.source, faults)
        return replace(found, kept=torch.stack(seen)) if room else found

    @property
    def lengths(self) -> list[int]:
        """What each costs."""
        return [self.cost] * len(self)

    def n_labels(self, indices: Sequence[int]) -> int:
        """Labels that count in the loss."""
        return sum(self.labels[i][0] != IGNORED for i in indices)

    def see(self, i: int) -> Tensor:
        """One image as `Lens.see` gives it. DataError names it."""
        name, lens = self.rows.names[i], self.lens
        picture = opened(self.rows.images[i], name)
        try:
            seen = torch.from_numpy(lens.see(picture))
        except DataError as error:
            raise DataError(f"'{name}' {error}") from None
        if lens.size is not None and tuple(seen.shape[1:]) != lens.size:
            found, wanted = (" x ".join(map(str, size)) for size in (seen.shape[1:], lens.size))
            raise DataError(
                f"'{name}' has {found} pixels, and the first image {wanted}, while the base says no size; resize them, "
                "or say it (image_base(..., size=(height, width)), or a preprocessor_config.json beside the base)"
            )
        return seen

    def gather(self, indices: Sequence[int]) -> "PixelBatch":
        """The images at these places, as floats."""
        seen = self.kept[list(indices)] if self.kept is not None else torch.stack([self.see(i) for i in indices])
        labels = torch.tensor([self.labels[i][0] for i in indices])
        return PixelBatch(self.lens.floats(seen), labels, tuple(indices), self.cost * len(indices))


@dataclass(frozen=True)
class PixelBatch(Batch):
    """Images of one size: `pixels (b, channels, height, width)`, float32, and `labels (b,)`."""

    pixels: Tensor
    labels: Tensor
    examples: tuple[int, ...]
    cost: int

    @property
    def n_tokens(self) -> int:
        """Patches, or what stands for them."""
        return self.cost

    def hidden(self, trunk: Any, prefix: Any = None) -> Any:
        """What the model gives for them."""
        return trunk.seen(self.pixels)
