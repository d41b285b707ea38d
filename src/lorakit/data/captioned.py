"""Images with a text each, and one label for both: rows of a table with columns image, text and label."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.data.batches import Batch, Examples, TextBatch, Tokens
from lorakit.data.cells import text_of
from lorakit.data.images import IMAGE_NAMES, Images, load_images, make_images
from lorakit.data.memory import Memory
from lorakit.data.pixels import PixelBatch, Pixels
from lorakit.data.ragged import Ragged
from lorakit.data.rows import Part, Rows
from lorakit.data.sources import LABEL_NAMES, apart, column_of, load_rows, text_column
from lorakit.data.tables import open_table
from lorakit.errors import DataError, NoRowsError, listed


@dataclass(frozen=True, eq=False)
class Captioned(Part):
    """`images` and `texts` of the same rows; the labels are those of the texts."""

    images: Images
    texts: Rows

    def __repr__(self) -> str:
        return f"Captioned({len(self)} images with texts, '{self.source}')"

    @property
    def source(self) -> str:  # type: ignore[override]
        """Where they come from."""
        return self.texts.source

    @property
    def lines(self) -> tuple[int, ...]:  # type: ignore[override]
        """Row numbers."""
        return self.texts.lines

    @property
    def names(self) -> tuple[str, ...]:
        """Each row for people."""
        return tuple(f"{name} | {text}" for name, text in zip(self.images.names, self.texts.texts))

    @cached_property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """A hash of the image, and the text."""
        return tuple(map("\n".join, zip(self.images.inputs, self.texts.texts)))

    def take(self, indices: Sequence[int]) -> "Captioned":
        """The rows at these positions."""
        return Captioned(self.images.take(indices), self.texts.take(indices))

    def digest(self) -> str:
        """A hash of images, texts and labels, in their order."""
        return Rows(self.inputs, self.texts.labels, self.source, self.lines).digest()

    def about(self) -> str:
        """How many labels, and the first row."""
        return f"{self.texts.about()}; its image: {self.images.names[0]}"

    def classes(self) -> tuple[str, ...] | None:
        """The labels."""
        return self.texts.labels

    def faults(self, valid: "Captioned", test: "Captioned") -> list[str]:
        """As with labelled texts."""
        return self.texts.faults(valid.texts, test.texts)


def load_captioned(
    source: str | Path | Memory,
    *,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    labels: bool = True,
) -> Captioned:
    """The rows of one table, also in memory; `labels=False` reads no labels. DataError names every row that cannot be
    used, and why."""
    name, (columns, table) = str(source), open_table(source)
    of_image = column_of(name, columns, image, IMAGE_NAMES, "image")
    of_label = column_of(name, columns, label, LABEL_NAMES, "label") if labels else ""
    of_text = text_column(name, columns, text)
    apart(name, ("image", of_image), ("text", of_text), ("label", of_label))
    numbered = list(table)  # for both halves it is read once
    held = Memory([row for _, row in numbered], name, columns, [line for line, _ in numbered])
    texts = load_rows(held, text=of_text, label=of_label or None, labels=labels)
    images = load_images(held, image=of_image, labels=False)
    both = {*images.lines} & {*texts.lines}  # of each half other rows may have been left out
    if not both:
        raise NoRowsError(f"'{source}': no row has an image and a text that can be used")
    of_images, of_texts = ([i for i, line in enumerate(part.lines) if line in both] for part in (images, texts))
    return Captioned(images.take(of_images), texts.take(of_texts))


def make_captioned(given: Sequence[Any]) -> Captioned:
    """From Python: pairs of an image (as with `make_images`) and a text; no labels."""
    faults = [
        f"row {number} is no pair of an image and a text"
        for number, one in enumerate(given, 1)
        if not (isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[1], str) and one[1].strip())
    ]
    if faults:
        raise DataError(f"{listed(faults, 5)}; give (image, text) for each, or rows that were read from a table")
    texts = tuple(text_of(text, f"the text of row {number}") for number, (_, text) in enumerate(given, 1))
    images = make_images([image for image, _ in given])
    return Captioned(images, Rows(texts, None, images.source, images.lines))


@dataclass(frozen=True, eq=False)
class PixelsAndTokens(Examples):
    """The same rows as images and as texts."""

    pixels: Pixels
    tokens: Tokens

    @property
    def lines(self) -> Sequence[int]:  # type: ignore[override]
        """Row numbers."""
        return self.tokens.lines

    @property
    def pad(self) -> int:  # type: ignore[override]
        """Of the texts."""
        return self.tokens.pad

    @property
    def labels(self) -> Ragged:
        """The number of each row's label."""
        return self.tokens.labels

    @cached_property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """What the text and the image cost together."""
        return [a + b for a, b in zip(self.tokens.lengths, self.pixels.lengths)]

    def n_labels(self, indices: Sequence[int]) -> int:
        """Labels that count in the loss."""
        return self.tokens.n_labels(indices)

    def gather(self, indices: Sequence[int]) -> "PixelsAndTokensBatch":
        """The rows at these places."""
        return PixelsAndTokensBatch(self.pixels.gather(indices), self.tokens.gather(indices))


@dataclass(frozen=True)
class PixelsAndTokensBatch(Batch):
    """A batch of images, and one of their texts."""

    pixels: PixelBatch
    tokens: TextBatch

    @property
    def examples(self) -> tuple[int, ...]:  # type: ignore[override]
        """Places in the data."""
        return self.tokens.examples

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """Numbers of the labels `(b,)`."""
        return self.tokens.labels

    @property
    def n_tokens(self) -> int:
        """Of texts and images."""
        return self.tokens.n_tokens + self.pixels.n_tokens

    def hidden(self, trunk: Any, prefix: Any = None) -> Any:
        """What the two models give."""
        texts = self.tokens
        return trunk.both(texts.ids, texts.segments, texts.reads, texts.types, self.pixels.pixels)
