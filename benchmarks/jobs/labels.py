"""labels: which of 39 slots an utterance fills (artist, city, time ...), none included; from the tags of snips."""

import os
from dataclasses import replace
from pathlib import Path

from torch.nn.functional import binary_cross_entropy_with_logits

import lorakit as lk
from lorakit.data import LabelSets, Splits
from lorakit.tasks.base import load_base
from lorakit.tasks.labels import Labels
from lorakit.tasks.task import task_of
from sides.pooled import fitted, measured, outputs, trained

PEER = "peft, Trainer, BCE"
METRIC = "micro F1 at a threshold of 1/2"
STEPS = 150

_DATA = Path(os.environ.get("LORAKIT_DATA", "../shared/data")) / "snips"


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    data = _splits()
    adapter, base, spent = fitted("labels", data, seed, steps)
    task = replace(task_of(adapter.meta["task"]), threshold=0.5)  # type: ignore[type-var]
    return {"metric": lk.evaluate((adapter, task), data.test, base=base).metrics["micro_f1"], **spent}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    data = _splits()
    goal = Labels.of(data, load_base("minilm"))
    truth = [[float(label in own) for label in goal.labels] for own in data.train.labels or ()]
    model, spent = trained([data.train.texts], truth, binary_cross_entropy_with_logits, goal.first_bias(), seed, steps)
    return {"metric": measured("labels", data, outputs(model, [data.test.texts]))["micro_f1"], **spent}


def _splits() -> Splits[LabelSets]:
    return Splits(*(_part(name) for name in ("train", "valid", "test"))).checked()


def _part(name: str) -> LabelSets:
    texts = (_DATA / name / "seq.in").read_text(encoding="utf-8").splitlines()
    tags = (_DATA / name / "seq.out").read_text(encoding="utf-8").splitlines()
    labels = tuple(tuple(sorted({tag[2:] for tag in row.split() if tag != "O"})) for row in tags)
    return LabelSets(tuple(text.strip() for text in texts), labels, name, tuple(range(1, len(texts) + 1)))
