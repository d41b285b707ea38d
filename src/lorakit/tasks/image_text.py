"""image_text: one label for an image with its text. Two bases side by side; one linear head on both pooled vectors.

On the command line the bases are named TEXT+IMAGE; from Python `both` joins two. Layer paths begin with `text.` and
`image.`. Each half is used as `classify` and `image` use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.batches import IGNORED
from lorakit.data.captioned import (
    Captioned,
    PixelsAndTokens,
    PixelsAndTokensBatch,
    load_captioned,
    make_captioned,
)
from lorakit.data.rows import Splits
from lorakit.errors import UsageError
from lorakit.plan import Plan
from lorakit.rules import Rules
from lorakit.rules import plan as make_plan
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.classify import (
    Classify,
    Evaluation,
    Prediction,
    evaluation,
    known_labels,
    label_metrics,
    most_probable,
    shown,
)
from lorakit.tasks.heads import give_head, run_head
from lorakit.tasks.image import Image, weighty
from lorakit.tasks.pooled import HEAD, vectors
from lorakit.tasks.task import TASKS, Scores, Task
from lorakit.trunk.two import TextImage, TextImageTrunk


class Tools(NamedTuple):
    """A tokenizer, and what prepares images."""

    text: Any
    image: Any

    def save_pretrained(self, place: Any) -> None:
        """Each in a folder of its own."""
        for name in self._fields:
            getattr(self, name).save_pretrained(Path(place) / name)


def both(text: Base, image: Base) -> Base:
    """One base of two: one for texts, one for images."""
    model = TextImage(text.model, image.model)
    name, pool = (f"{getattr(text, key)}+{getattr(image, key)}" for key in ("name", "pool"))
    dtype = torch.promote_types(text.dtype, image.dtype)
    return Base(model, Tools(text.tokenizer, image.tokenizer), name, pool, text.max_length, dtype=dtype)


def load_both(name: str) -> Base:
    """Two bases by their names, "TEXT+IMAGE"; or the two that `lorakit merge` wrote into one directory."""
    if all((Path(name) / part / "config.json").is_file() for part in ("text", "image")):
        names = [str(Path(name) / part) for part in ("text", "image")]
    else:
        names = name.split("+")
    if len(names) != 2 or not all(names):
        raise UsageError(
            f"'{name}' does not name two bases; write TEXT+IMAGE, such as minilm+google/vit-base-patch16-224"
        )
    return both(load_base(names[0]), load_base(names[1], head="vision"))


@TASKS.add_class
@dataclass(frozen=True)
class ImageText(Task):
    """How each half is used; both know the labels, in the order of the head's outputs."""

    name = "image_text"
    part = Captioned
    metric = "accuracy"
    drawn = "accuracy"
    head = HEAD
    output = "both"
    columns = ("image", "text", "label")
    try_it = ""

    text: Classify
    image: Image

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the head's outputs."""
        return self.image.labels

    @classmethod
    def read(cls, source: Any, /, *, answers: bool = True, **columns: str | None) -> Captioned:
        """Images, texts and labels of one table."""
        return load_captioned(source, labels=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[Any]) -> Captioned:
        """Pairs of an image and a text."""
        return make_captioned(given)

    @classmethod
    def plan(cls, model: nn.Module, rank: int = 8, layers: Rules | None = None, **rules: Any) -> Plan:
        """Every matrix, and the convolutions of an image base of which they hold most of the weights."""
        default = sorted({"all-linear", *weighty(model.get_submodule("image"))})
        return make_plan(model, rank, layers or default, **rules)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "ImageText":
        """With the labels of the training rows, each half as its base wants it."""
        if not isinstance(base.model, TextImage):
            raise UsageError(
                f"image_text needs two bases, and this is one {type(base.model).__name__}: both(text, image)"
            )
        pools = base.pool.split("+")
        halves = (base.model.text, base.model.image)
        text, image = (
            Base(model, tool, base.name, pool, base.max_length)
            for model, tool, pool in zip(halves, base.tokenizer, pools)
        )
        labels = data.labels
        classify = Classify(labels, text.pool, text.max_length)
        return cls(classify, Image.for_images(labels, data.train.images, image))

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "ImageText":
        """The inverse of `note`."""
        shared = {"labels": note["labels"]}
        return cls(Classify.from_note({**note["text"], **shared}), Image.from_note({**note["image"], **shared}))

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        halves = {"text": self.text.note(), "image": self.image.note()}
        parts = {key: {k: v for k, v in half.items() if k not in ("name", "labels")} for key, half in halves.items()}
        return {"name": self.name, "labels": list(self.labels), **parts}

    def prepare(self, model: nn.Module) -> None:
        """Gives the two their head, which begins at zero."""
        config: Any = model.get_submodule("text").config
        give_head(model, HEAD, len(self.labels), width=int(config.hidden_size) + self.image.width)

    def trunk(self, model: Any, *, dtype: str, pad: int, keep: bool = True) -> TextImageTrunk:
        """What runs both fast."""
        return TextImageTrunk(model, dtype=dtype, pad=pad, keep=keep, shape=self.image.shape)

    def examples(self, rows: Captioned, tokenizer: Any, *, truncate: bool) -> PixelsAndTokens:
        """All rows, one label each (-100 where it is unknown)."""
        tokens = self.text.examples(rows.texts, tokenizer.text, truncate=truncate)
        return PixelsAndTokens(self.image.examples(rows.images, tokenizer.image, truncate=truncate), tokens)

    def scores(self, model: nn.Module, hidden: Any, batch: PixelsAndTokensBatch) -> Tensor:
        """The logits `(rows, labels)`, float32."""
        texts, images = hidden
        return run_head(model, HEAD, torch.cat([vectors(texts, batch.tokens), self.image.vectors(images)], -1))

    def loss(self, model: nn.Module, hidden: Any, batch: PixelsAndTokensBatch) -> Tensor:
        """Summed cross-entropy in nats."""
        logits = self.scores(model, hidden, batch)
        return F.cross_entropy(logits, batch.labels.to(logits.device), ignore_index=IGNORED, reduction="sum")

    def metrics(self, scores: Tensor, examples: PixelsAndTokens) -> dict[str, float]:
        """Accuracy, macro F1 (labels that occur), mean loss."""
        return label_metrics(scores, [int(label) for (label,) in examples.labels])

    def predict(
        self, rows: Captioned, base: Base, scores: Scores, *, truncate: bool, **options: Any
    ) -> list[Prediction]:
        """The most probable label of each row."""
        return most_probable(scores(self.examples(rows, base.tokenizer, truncate=truncate)), rows.names, self.labels)

    def evaluate(self, rows: Captioned, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics on labelled rows. DataError for labels it has not learned."""
        wanted = known_labels(rows, rows.classes(), self.labels)
        return evaluation(scores(self.examples(rows, base.tokenizer, truncate=truncate)), wanted, self.labels)

    def shown(self, found: Sequence[Prediction]) -> str:
        """A line for each row: label, probability, image and text."""
        return shown(found)
