"""tag: the slots of voice commands (snips: 39 kinds of spans, 13,084 texts to learn from), MiniLM."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from lorakit.data import Splits
from lorakit.data.batches import IGNORED
from lorakit.data.tagged import Tagged, load_tagged
from sides.jobs import DATA, package_model
from sides.tokens import fitted, measured, prepared, trained

PEER = "peft, Trainer, token classification"
METRIC = "F1 of spans"
STEPS = 200

_BATCH = 32


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    return fitted("tag", splits(), seed, steps, _BATCH)


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    goal, train, test = prepared("tag", splits())
    rows: list[dict[str, Any]] = []
    for ids, reads, own in zip(train.ids, train.reads, train.labels):
        labels = [IGNORED] * len(ids)
        for place, label in zip(reads, own):
            labels[int(place)] = int(label)
        rows.append({"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": labels})
    base = AutoModelForTokenClassification.from_pretrained(package_model(), num_labels=len(goal.labels))
    collator = DataCollatorForTokenClassification
    model, spent = trained(base, "TOKEN_CLS", rows, collator, seed, steps, _BATCH)
    metric = measured(goal, test, lambda batch: model(input_ids=batch.ids[None]).logits[0])
    return {"metric": metric, **spent}


def splits() -> Splits[Tagged]:
    """As they are given."""
    folder = Path(DATA) / "snips"
    return Splits(*(load_tagged(folder / name) for name in ("train", "valid", "test"))).checked()
