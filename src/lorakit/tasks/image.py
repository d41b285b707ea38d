"""image: one label for each image. A linear head on the pooled vector of the base, trained fully beside the adapter.

Vision Transformers run packed like texts (trunk/); convolutions as they are. Batch norms keep their statistics. Where
convolutions hold most of the weights they are adapted too, unless the plan says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED
from lorakit.data.faults import refuse_rows
from lorakit.data.images import Images, load_images, make_images
from lorakit.data.pictures import opened
from lorakit.data.pixels import PixelBatch, Pixels
from lorakit.data.rows import Splits
from lorakit.describe import describe
from lorakit.errors import DataError
from lorakit.plan import Plan
from lorakit.rules import Rules
from lorakit.rules import plan as make_plan
from lorakit.tasks.base import Base
from lorakit.tasks.classify import (
    Evaluation,
    Prediction,
    evaluation,
    known_labels,
    label_metrics,
    most_probable,
    numbered,
    shown,
)
from lorakit.tasks.heads import give_head, run_head
from lorakit.tasks.pooled import HEAD
from lorakit.tasks.task import TASKS, Scores, Task
from lorakit.tasks.vision import channels_of, lens_of, pooled, sight_of, size_of
from lorakit.trunk import Trunk


@TASKS.add_class
@dataclass(frozen=True)
class Image(Task):
    """Labels in the order of the head's outputs; the pooling, and how wide its vector is; the shape of an image.

    `cost` is that of an image in tokens; `resizes` whether images of another size are made to fit.
    """

    name = "image"
    part = Images
    metric = "accuracy"
    drawn = "accuracy"
    head = HEAD
    output = "vision"
    wishes = ("pool",)
    columns = ("image", "label")
    try_it = "photo.jpg"

    labels: tuple[str, ...]
    pool: str
    shape: tuple[int, int, int]
    width: int
    cost: int
    resizes: bool = True

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Images:
        """Images and labels of a folder, a table, an archive or the demo."""
        return load_images(source, labels=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Images:
        """Images without labels: paths, bytes of files, Pillow images or uint8 pixels."""
        return make_images(given)

    @classmethod
    def plan(cls, model: nn.Module, rank: int = 8, layers: Rules | None = None, **rules: Any) -> Plan:
        """Every matrix, and every convolution where these hold most of the weights."""
        return make_plan(model, rank, layers or weighty(model), **rules)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Image":
        """With the labels of the training rows, images as the base wants them, or as large as the first one."""
        return cls.for_images(data.labels, data.train, base)

    @classmethod
    def for_images(cls, labels: tuple[str, ...], rows: Images, base: Base) -> "Image":
        """With these labels."""
        lens = lens_of(base.tokenizer, channels_of(base.model), size_of(base.model))
        size = lens.size or _first_size(rows)
        shape = (lens.channels, *size)
        return cls(labels, base.pool, shape, *sight_of(base.model, shape, base.pool), lens.size is not None)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Image":
        """The inverse of `note`."""
        channels, height, width = note["shape"]
        shape = (int(channels), int(height), int(width))
        return cls(tuple(note["labels"]), note["pool"], shape, int(note["width"]), int(note["cost"]), note["resizes"])

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        seen = {"pool": self.pool, "shape": list(self.shape), "width": self.width, "cost": self.cost}
        seen["resizes"] = self.resizes
        return {"name": self.name, "labels": list(self.labels), **seen}

    def prepare(self, model: nn.Module) -> None:
        """Gives the model its head, which begins at zero."""
        give_head(model, HEAD, len(self.labels), width=self.width)

    def trunk(self, model: nn.Module, *, dtype: str, pad: int, keep: bool = True) -> Trunk:
        """What runs the model fast."""
        return Trunk(model, dtype=dtype, head=HEAD, keep=keep, shape=self.shape)

    def examples(self, rows: Images, tokenizer: Any, *, truncate: bool) -> Pixels:
        """All images as bytes of pixels, one label each (-100 where it is unknown)."""
        lens = lens_of(tokenizer, self.shape[0])
        if lens.size is None:
            lens = replace(lens, size=self.shape[1:], resizes=self.resizes)
        numbers = numbered(rows.labels, self.labels) if rows.labels is not None else [IGNORED] * len(rows)
        return Pixels.of(rows, numbers, lens, self.cost)

    def scores(self, model: nn.Module, hidden: Any, batch: PixelBatch) -> Tensor:
        """The logits `(images, labels)`, float32."""
        return run_head(model, HEAD, self.vectors(hidden))

    def vectors(self, hidden: Any) -> Tensor:
        """The pooled vector of each image: `(images, width)`, float32."""
        return pooled(hidden, self.pool)

    def loss(self, model: nn.Module, hidden: Any, batch: PixelBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        logits = self.scores(model, hidden, batch)
        return F.cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    def metrics(self, scores: Tensor, pixels: Pixels) -> dict[str, float]:
        """Accuracy, macro F1 (labels that occur), mean loss."""
        return label_metrics(scores, [label for (label,) in pixels.labels])

    def predict(self, rows: Images, base: Base, scores: Scores, *, truncate: bool, **options: Any) -> list[Prediction]:
        """The most probable label of each image."""
        return most_probable(scores(self.examples(rows, base.tokenizer, truncate=truncate)), rows.names, self.labels)

    def evaluate(self, rows: Images, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on labelled images. DataError for labels it has not learned."""
        wanted = known_labels(rows, rows.labels, self.labels)
        return evaluation(scores(self.examples(rows, base.tokenizer, truncate=truncate)), wanted, self.labels)

    def shown(self, found: Sequence[Prediction]) -> str:
        """A line for each image: label, probability, name."""
        return shown(found)


def weighty(model: nn.Module) -> list[str]:
    """Rules for the kinds of layer that hold the weights: matrices, and convolutions where they hold more."""
    sizes = {"all-linear": 0, "all-conv": 0}
    for spec in describe(model):
        if spec.role != "head" and spec.kind in ("linear", "conv1d", "conv2d", "conv3d"):
            sizes["all-conv" if spec.kind.startswith("conv") else "all-linear"] += int(np.prod(spec.shape))
    if sizes["all-conv"] <= sizes["all-linear"]:
        return ["all-linear"]
    return [rule for rule, size in sizes.items() if size]


def _first_size(rows: Images) -> tuple[int, int]:
    """Height and width of the first image."""
    try:
        first = opened(rows.images[0], rows.names[0])
    except DataError as error:
        refuse_rows(rows.source, [(rows.lines[0], str(error))])
        raise
    height, width = first.shape[:2] if isinstance(first, np.ndarray) else first.size[::-1]
    return int(height), int(width)
