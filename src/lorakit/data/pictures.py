"""One image: a file, what is in one, or pixels; and what Pillow makes of it.

Palettes, colours of print and 16 bits become gray, RGB or RGBA in one way, for files as for images of Pillow.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import DataError, MissingExtraError

Picture = Path | bytes | NDArray[np.uint8]  # a file, what is in one, or pixels (height, width) or (.., channels)


def opened(image: Picture, name: str) -> Any:
    """The image as Pillow's in mode L, RGB or RGBA, or as the array that it is. DataError if it cannot be decoded."""
    if isinstance(image, np.ndarray):
        return image
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "image") from None
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as file:
            file.load()
            return _plain(file)
    except DataError as error:
        raise DataError(f"'{name}' {error}") from None
    except Exception as error:  # damaged files raise what their decoders please
        raise DataError(f"'{name}' is not a readable image ({str(error) or type(error).__name__})") from None


def _plain(picture: Any) -> Any:
    """A copy of Pillow's image in mode L, RGB or RGBA. DataError continues its name."""
    if picture.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would cut what is above 255
        from PIL import Image

        return Image.fromarray(_of_16_bits(np.asarray(picture)))
    if "transparency" in picture.info or picture.mode.endswith(("A", "a")):
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _of_16_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The upper eight. Of 32 bits that are all below 256 nobody knows how many were meant."""
    unknown = values.dtype.itemsize > 2 and 0 < values.max() <= 255
    if values.dtype.kind == "f" or unknown or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"is an image of {values.dtype} from {values.min():g} to {values.max():g}, which are no 16 bits; save it "
            "with 8 or 16 bits"
        )
    return (values >> 8).astype(np.uint8)


def digest(image: Picture, name: str) -> str:
    """A hash of its content."""
    try:
        content = image.read_bytes() if isinstance(image, Path) else image
    except OSError as error:
        raise DataError(f"cannot read '{name}': {error.strerror or error}") from None
    if isinstance(content, np.ndarray):
        content = str(content.shape).encode() + content.tobytes()
    return hashlib.sha256(content).hexdigest()


def from_cell(value: Any, folder: Path) -> Picture:
    """What a cell of a table holds; a path begins in the folder. DataError continues "column 'x' ..."."""
    if isinstance(value, Mapping) and (value.get("bytes") is not None or value.get("path") is not None):
        value = value.get("bytes") or value["path"]
    if isinstance(value, bytes) and value:
        return value
    if hasattr(value, "shape") or hasattr(value, "getbands"):
        return _pixels(value)
    if isinstance(value, str | Path) and str(value).strip():
        file = folder / str(value).strip()
        if not file.is_file():
            raise DataError(f"names '{value}', which is not in '{folder}'")
        return file
    raise DataError(f"is {'empty' if not value else repr(value)[:40]}, neither a path nor the bytes of an image")


def from_python(one: Any, name: str) -> Picture:
    """A path, the bytes of a file, pixels, or an image of Pillow. DataError names it."""
    if isinstance(one, bytes):
        return one
    if isinstance(one, str | Path):
        if not Path(one).is_file():
            raise DataError(f"there is no image '{one}'")
        return Path(one)
    try:
        return _pixels(one)
    except DataError as error:
        raise DataError(f"{name} {error}") from None


def as_bytes(pixels: NDArray[Any]) -> NDArray[Any]:
    """Floats from 0 to 1 as 0 to 255; all else as it is."""
    floats = pixels.dtype.kind == "f" and pixels.size and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    return np.rint(pixels * 255).astype(np.uint8) if floats else pixels


def _pixels(one: Any) -> NDArray[np.uint8]:
    """Of an image of Pillow, an array or a tensor. DataError continues its name."""
    array = as_bytes(np.asarray(_plain(one) if hasattr(one, "getbands") else one))
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"is {array.dtype} {' x '.join(map(str, array.shape))}; give a path, the bytes of a file, a Pillow image, "
            "or pixels (height, width) or (height, width, channels), uint8 or floats from 0 to 1"
        )
    return array
