"""image_text: a digit and a sentence of a film review, and one of four labels: below five or not, liked or not.

MiniLM (the mean of its states) and the small Vision Transformer of sides/digits.py, a linear head on both vectors.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BatchEncoding, DataCollatorWithPadding, Trainer, TrainingArguments

import lorakit as lk
from lorakit.data import Rows, Splits
from lorakit.data.captioned import Captioned
from lorakit.tasks.base import load_base
from lorakit.tasks.image_text import ImageText, both
from sides import digits
from sides.digits import BATCH, RANK, SCALE
from sides.jobs import sentences
from sides.recipe import StepClock, arguments

PEER = "peft, Trainer, two encoders"
METRIC = "accuracy"
STEPS = 80
SEEDS = 6

_RATE = 2e-3
_SENTENCES = 8


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    base, data, clock = both(load_base("minilm"), digits.vit()), _splits(), StepClock(steps)
    settings = {"epochs": 1000, "max_steps": steps, "batch_size": BATCH, "seed": seed, "learning_rate": _RATE}
    settings |= {"schedule": "linear", "warmup": 0.0, "patience": 1000, "threads": torch.get_num_threads()}
    plan = ImageText.plan(base.model, RANK, scale=SCALE)
    result = lk.fit(base, data, "image_text", plan=plan, watch=clock.watch, **settings)
    return {"metric": result.metrics["accuracy"], **clock.spent()}


class Classifier(nn.Module):
    """Both encoders and a head that begins at zero: the very model that lorakit trains."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, image
        widths = [int(model.config.hidden_size) for model in (text, image)]  # type: ignore[union-attr,arg-type]
        self.classifier = nn.Linear(sum(widths), 4)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits, and their mean loss."""
        states = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].float()
        text = (states * weights).sum(1) / weights.sum(1)
        image = digits.pooled(self.image(pixel_values=pixel_values), "cls")
        logits = self.classifier(torch.cat([text, image], -1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    text, image, data, clock = load_base("minilm"), digits.vit(), _splits(), StepClock(steps)
    base = both(text, image)
    goal = ImageText.of(data, base)
    train, test = (goal.examples(rows, base.tokenizer, truncate=False) for rows in (data.train, data.test))
    paths = list(ImageText.plan(base.model, RANK).layers)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=paths, modules_to_save=["classifier"])
    model: Any = get_peft_model(Classifier(text.model, image.model), config)  # type: ignore[arg-type]
    pad = DataCollatorWithPadding(text.tokenizer)

    def row(part: Any, i: int) -> dict[str, Any]:
        own = part.gather([i])
        ids = own.tokens.ids.tolist()
        pixels, label = own.pixels.pixels[0], int(own.labels[0])
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "pixel_values": pixels, "labels": label}

    def collate(rows: list[dict[str, Any]]) -> BatchEncoding:
        found = pad([{key: one[key] for key in ("input_ids", "attention_mask")} for one in rows])
        found["pixel_values"] = torch.stack([one["pixel_values"] for one in rows])
        found["labels"] = torch.tensor([one["labels"] for one in rows])
        return found

    listed = [row(train, i) for i in range(len(train))]
    args = TrainingArguments(**arguments(BATCH, steps, _RATE, seed), remove_unused_columns=False)
    Trainer(model=model, args=args, train_dataset=listed, data_collator=collate, callbacks=[clock]).train()  # type: ignore[arg-type]
    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(len(test)):
            one = collate([row(test, i)])
            right += int(model(**one)["logits"].argmax(-1) == one["labels"])
    return {"metric": right / len(test), **clock.spent()}


def _splits() -> Splits[Captioned]:
    """Every digit with a sentence of its own; those to report on with several, for there are few of them."""
    images, (texts, liked) = digits.data(), sentences()
    parts, begin = [], 0
    for part in (images.train, images.valid, images.test.take([*range(len(images.test))] * _SENTENCES)):
        own = slice(begin, begin + len(part))
        size = ["small" if label < "5" else "large" for label in part.labels or ()]
        labels = tuple(map(" ".join, zip(size, liked[own])))
        rows = Rows(tuple(texts[own]), labels, "digits and reviews", part.lines)
        parts.append(Captioned(replace(part, labels=None), rows))
        begin += len(part)
    return Splits(*parts).checked()
