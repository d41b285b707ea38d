"""Digits of scikit-learn at 32 x 32, a base that has learned 0 to 4 alone, and the two sides that adapt it to all ten.

The base is trained once in every process, with a fixed seed and one thread, so all sides and seeds begin with the same.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTModel

import lorakit as lk
from lorakit.data import Splits
from lorakit.data.images import Images, load_images
from lorakit.data.rows import split
from lorakit.tasks.base import Base
from lorakit.tasks.image import Image
from lorakit.tasks.vision import pooled
from sides.recipe import StepClock, arguments

RANK, SCALE, BATCH = 8, 2.0, 32
_PRETRAINING, _RATE = 200, 5e-4  # steps; of AdamW

Make = Callable[[], nn.Module]


def data() -> Splits[Images]:
    """All ten digits, 1,437 to learn from."""
    small = load_images("demo:digits")
    large = tuple(np.asarray(Pillow.fromarray(image).resize((32, 32), 2)) for image in small.images)  # type: ignore[arg-type]
    return split(replace(small, images=large, known={}), seed=0)


def base_of(make: Make, name: str, pool: str) -> Base:
    """The model, trained as a whole on the training digits 0 to 4."""
    torch.manual_seed(0)
    base = Base(make(), None, name, pool, 0)
    known = data().train
    known = known.take([i for i, label in enumerate(known.labels or ()) if label < "5"])
    goal = Image.for_images(("0", "1", "2", "3", "4"), known, base)
    pixels = goal.examples(known, None, truncate=False)
    model = base.model.train()
    head = nn.Linear(goal.width, 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=_RATE)
    for _ in range(_PRETRAINING):
        batch = pixels.gather(torch.randint(len(pixels), (BATCH,)).tolist())
        loss = F.cross_entropy(head(pooled(model(pixel_values=batch.pixels), pool)), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    return base


def vit() -> Base:
    """A small Vision Transformer (16 patches)."""
    return base_of(_vit, "vit", "cls")


def _vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        image_size=32, patch_size=8, num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def ours(base: Base, seed: int, steps: int, rate: float) -> dict[str, float]:
    """lorakit."""
    clock, rows = StepClock(steps), data()

    plan = Image.plan(base.model, RANK, scale=SCALE)
    epochs = -(-steps * BATCH // len(rows.train)) + 1
    own: dict[str, Any] = {
        "schedule": "linear",
        "warmup": 0.0,
        "patience": epochs,
        "threads": torch.get_num_threads(),
    }
    result = lk.fit(
        base, rows, "image", plan=plan, epochs=epochs, max_steps=steps, batch_size=BATCH, seed=seed,
        learning_rate=rate, weight_decay=0.01, watch=clock.watch, **own,
    )  # fmt: skip
    return {"metric": result.metrics["accuracy"], **clock.spent()}


class Classifier(nn.Module):
    """The base and a head that begins at zero: the very model that lorakit trains."""

    def __init__(self, base: Base, width: int) -> None:
        super().__init__()
        self.trunk, self.pool = base.model, base.pool
        self.classifier = nn.Linear(width, 10)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(pooled(self.trunk(pixel_values=pixel_values), self.pool))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def train(self, mode: bool = True) -> "Classifier":
        """Batch norms stay in eval mode, as on our side."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


def peer(base: Base, seed: int, steps: int, rate: float) -> dict[str, float]:
    """peft and Trainer."""
    clock, rows = StepClock(steps), data()
    goal = Image.of(rows, base)
    train, test = (goal.examples(part, None, truncate=False) for part in (rows.train, rows.test))
    paths = [f"trunk.{path}" for path in Image.plan(base.model, RANK).layers]
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=paths, modules_to_save=["classifier"])
    model = get_peft_model(Classifier(base, goal.width), config)

    examples = train.gather(range(len(train)))
    listed = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(examples.pixels, examples.labels)]
    args = TrainingArguments(**arguments(BATCH, steps, rate, seed))
    Trainer(model=model, args=args, train_dataset=listed, callbacks=[clock]).train()  # type: ignore[arg-type]
    model.eval()
    held_out = test.gather(range(len(test)))
    with torch.no_grad():
        guess = model(pixel_values=held_out.pixels)["logits"].argmax(-1)
    return {"metric": float((guess == held_out.labels).double().mean()), **clock.spent()}
