"""Images with one label each, as they lie: files on disk, files in a table's cells, or arrays. Nothing is decoded here.

A folder with one folder of images for each class; a table with columns image (a path beside the table, or the bytes of
a file, also as Hugging Face's {bytes, path}) and label; a NumPy archive (.npz) with images and labels, or with parts
such as train_images and train_labels (MedMNIST) or x_train and y_train (Keras); scikit-learn's digits (`demo:digits`).
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.cells import label_in
from lorakit.data.faults import leave_out
from lorakit.data.memory import Memory
from lorakit.data.pictures import Picture, as_bytes, digest, from_cell, from_python
from lorakit.data.rows import Part, Rows, at
from lorakit.data.sources import PARTS, apart, column_of
from lorakit.data.tables import DEMO, inside, is_dataset, open_table
from lorakit.errors import DataError, MissingExtraError, listed

IMAGE_NAMES = ("image", "img", "picture", "photo", "file_name", "filename", "path")
LABEL_NAMES = ("label", "category", "class", "target")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
_IMAGE_KEYS, _LABEL_KEYS = ("images", "image", "x"), ("labels", "label", "y")
_DIGITS = f"{DEMO}digits"


@dataclass(frozen=True, eq=False)
class Images(Part):
    """`images` with their `names`, for people, and where known one label each."""

    images: tuple[Picture, ...]
    names: tuple[str, ...]
    labels: tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]
    known: Mapping[int, str] = field(default_factory=dict, repr=False)  # digests that were made, by the id of an image

    def __repr__(self) -> str:
        kinds = f", {len(set(self.labels))} labels" if self.labels else ", no labels"
        return f"Images({len(self)}{kinds}, '{self.source}')"

    @cached_property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """A hash of the content of each image; every file is read for it once."""
        return tuple(self.known.get(id(image)) or digest(image, name) for image, name in zip(self.images, self.names))

    def take(self, indices: Sequence[int]) -> "Images":
        """The rows at these positions."""
        images, names, labels = at(self.images, indices), at(self.names, indices), at(self.labels, indices)
        known = {id(self.images[i]): self.inputs[i] for i in indices}
        return Images(images, names, labels, self.source, at(self.lines, indices), known)

    def digest(self) -> str:
        """A hash of images and labels, in their order."""
        return self._as_rows.digest()

    def about(self) -> str:
        """How many labels, and the first row."""
        labels = self.labels or ("",)
        return f"{len(set(labels))} labels; first image: {self.names[0]} -> {labels[0]}"

    def classes(self) -> tuple[str, ...] | None:
        """The labels."""
        return self.labels

    def faults(self, valid: "Images", test: "Images") -> list[str]:
        """As with labelled texts."""
        return self._as_rows.faults(valid._as_rows, test._as_rows)

    @property
    def _as_rows(self) -> Rows:
        return Rows(self.inputs, self.labels, self.source, self.lines)


def load_images(
    source: str | Path | Memory, *, image: str | None = None, label: str | None = None, labels: bool = True
) -> Images:
    """The images of a folder, a table, rows in memory, an archive of arrays, or the demo. `labels=False` leaves labels
    unread.

    A path in a table's cell begins beside it, one in memory in the working directory; there a cell may also hold an
    image of Pillow or uint8 pixels.
    """
    name, path = str(source), Path(str(source))
    if name == _DIGITS:
        return _digits(labels)
    if ".npz" in path.suffix or name.rpartition(":")[0].endswith(".npz"):
        return _of_archive(name, labels)
    if path.is_dir() and not is_dataset(path):
        return _of_folder(path) if labels else _all_of_folder(path)
    columns, table = open_table(source)
    of_image = column_of(name, columns, image, IMAGE_NAMES, "image")
    of_label = column_of(name, columns, label, LABEL_NAMES, "label") if labels else ""
    apart(name, ("image", of_image), ("label", of_label))
    images: list[Picture] = []
    names: list[str] = []
    found: list[str] = []
    lines: list[int] = []
    faults: list[tuple[int, str]] = []
    for line, row in table:
        try:
            picture = from_cell(row.get(of_image), path.parent)
        except DataError as error:
            faults.append((line, f"column '{of_image}' {error}"))
            continue
        try:
            found.append(label_in(row, of_label) if labels else "")
        except DataError as error:
            faults.append((line, str(error)))
            continue
        images.append(picture)
        lines.append(line)
        names.append(str(row[of_image]) if isinstance(row[of_image], str | Path) else f"row {line}")
    leave_out(name, faults, left=len(images))
    if not images:
        raise DataError(f"'{name}' has no rows")
    return Images(tuple(images), tuple(names), tuple(found) if labels else None, name, tuple(lines))


def make_images(given: Sequence[Any]) -> Images:
    """Images from Python: paths, bytes of files, uint8 arrays or tensors, Pillow images; no labels."""
    images = tuple(from_python(one, f"image {number}") for number, one in enumerate(given, 1))
    names = tuple(str(one) if isinstance(one, str | Path) else f"image {n}" for n, one in enumerate(given, 1))
    return Images(images, names, None, "images", tuple(range(1, len(images) + 1)))


def parts_of_archive(source: str | Path) -> dict[str, str | Path]:
    """Parts that an .npz brings by itself: train, valid, test -> `file.npz:part`."""
    if not str(source).endswith(".npz") or not Path(source).is_file():
        return {}
    words = {word for key in _opened_archive(Path(source)) for word in key.lower().split("_")}
    return {part: f"{source}:{part}" for part, known in PARTS.items() if words & set(known)}


def _files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    return sorted(file for file in found if file.is_file())


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _called_part(entry: Path) -> bool:
    return any(entry.name in names for names in PARTS.values())


def is_class(place: Path) -> bool:
    """Is it a folder of images beside others, and is only called like a part: `train` beside `plane` and `car`?"""
    if not place.is_dir() or _folders(place) or all(map(_called_part, _folders(place.parent))):
        return False
    return any(file.suffix.lower() in ENDINGS for file in place.iterdir())


def _of_folder(folder: Path) -> Images:
    """One class for each folder in it."""
    classes = _folders(folder)
    nested = [entry.name for entry in classes if _called_part(entry) and _folders(entry)]
    if nested:
        raise DataError(f"'{folder}' holds the parts {', '.join(nested)}; name one of them, as '{folder / nested[0]}'")
    if not classes:
        _refuse_beside(folder)
        raise DataError(
            f"'{folder}' holds no folders of classes; put the images of each class into a folder of its own, or give a "
            "table with the columns image and label"
        )
    empty = [entry.name for entry in classes if not _files(entry)]
    if empty:
        raise DataError(
            f"'{folder}': {listed([f'the folder {name!r} holds no images' for name in empty], 5)}; remove it, or look "
            f"whether its files end in {', '.join(ENDINGS[:4])} or the like"
        )
    files = [(file, entry.name) for entry in classes for file in _files(entry)]
    return _of_files(folder, [file for file, _ in files], tuple(name for _, name in files))


def _all_of_folder(folder: Path) -> Images:
    files = _files(folder)
    if not files:
        _refuse_beside(folder)
        raise DataError(f"'{folder}' holds no images ({', '.join(ENDINGS[:4])} ...)")
    return _of_files(folder, files, None)


def _refuse_beside(folder: Path) -> None:
    """DataError for a folder without images that holds tables or archives."""
    held, way = inside(folder, lambda entry: entry.suffix == ".npz")
    if held:
        raise DataError(f"'{folder}' holds {held}, and no images in folders{way}")


def _of_files(folder: Path, files: Sequence[Path], labels: tuple[str, ...] | None) -> Images:
    names = tuple(str(file.relative_to(folder)) for file in files)
    return Images(tuple(files), names, labels, str(folder), tuple(range(1, len(files) + 1)))


def _opened_archive(path: Path) -> Any:
    if not path.exists():
        raise DataError(f"'{path}' does not exist")
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is cut short, or no .npz")
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' is not a readable NumPy archive ({error})") from None


def _of_archive(name: str, labels: bool) -> Images:
    file, _, part = (name, "", "") if name.endswith(".npz") else name.rpartition(":")
    archive = _opened_archive(Path(file))
    keys = {key.lower(): key for key in archive}

    def array(usual: tuple[str, ...], noun: str) -> Any:
        words = PARTS.get(part, (part,))
        wanted = [*(f"{word}_{key}" for word in words for key in usual if part)]
        wanted += [*(f"{key}_{word}" for word in words for key in usual if part)] or list(usual)
        hit = next((keys[key] for key in wanted if key in keys), None)
        if hit is None:
            parts = parts_of_archive(file)
            way = f"; name one of its parts, as '{parts.get('test') or next(iter(parts.values()))}'" if parts else ""
            known = f"it has {', '.join(keys)}{way}"
            raise DataError(f"'{name}' has no array {' or '.join(wanted[:3])} for its {noun}; {known}")
        try:
            return archive[hit]
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # damaged, or of Python objects
            raise DataError(f"'{name}': array '{hit}' cannot be read ({error})") from None

    pixels = _stacked(array(_IMAGE_KEYS, "images"), name)
    if not labels:
        return _of_arrays(name, pixels, None)
    found = np.asarray(array(_LABEL_KEYS, "labels")).reshape(-1)
    if len(found) != len(pixels):
        raise DataError(f"'{name}' has {len(pixels)} images and {len(found)} labels; each image needs one")
    return _of_arrays(name, pixels, tuple(map(str, found.tolist())))


def _stacked(pixels: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """`(n, height, width)` or `(n, height, width, channels)`, 0 to 255."""
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 1, 3)
    found = as_bytes(pixels)
    if pixels.ndim not in (3, 4) or found.dtype != np.uint8 or not len(pixels):
        shape = " x ".join(map(str, pixels.shape))
        raise DataError(
            f"'{name}': its images are {pixels.dtype} {shape}; they must be (images, height, width) or (images, "
            "height, width, channels), uint8 from 0 to 255 or floats from 0 to 1"
        )
    return found


def _of_arrays(name: str, pixels: NDArray[np.uint8], labels: tuple[str, ...] | None) -> Images:
    lines = tuple(range(1, len(pixels) + 1))
    return Images(tuple(pixels), tuple(f"image {n}" for n in lines), labels, name, lines)


def _digits(labels: bool) -> Images:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin & Kaynak, 1998), as scikit-learn has them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "digits") from None
    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _of_arrays(_DIGITS, pixels, tuple(map(str, found.target.tolist())) if labels else None)
