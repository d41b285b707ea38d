"""answer: questions on paragraphs of Wikipedia (XQuAD's English part, split by paragraph), MiniLM."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from lorakit.data import Splits
from lorakit.data.questions import Questions, load_questions
from lorakit.data.rows import split
from sides.jobs import DATA, package_model
from sides.tokens import fitted, measured, prepared, trained

PEER = "peft, Trainer, question answering"
METRIC = "F1 of answers"
STEPS = 400  # about two epochs
SEEDS = 6

_BATCH = 4


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    return fitted("answer", splits(), seed, steps, _BATCH)


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    goal, train, test = prepared("answer", splits())
    rows: list[dict[str, Any]] = []
    for k, ids in enumerate(train.ids):
        begin, end = (int(train.reads[k][int(label)]) for label in train.labels[k])
        own = {"input_ids": list(ids), "token_type_ids": list(train.types[k]), "attention_mask": [1] * len(ids)}
        rows.append({**own, "start_positions": begin, "end_positions": end})
    base = AutoModelForQuestionAnswering.from_pretrained(package_model())
    model, spent = trained(base, "QUESTION_ANS", rows, DataCollatorWithPadding, seed, steps, _BATCH)

    def logits(batch: Any) -> Any:
        found = model(input_ids=batch.ids[None], token_type_ids=batch.types[None])
        return torch.stack([found.start_logits[0], found.end_logits[0]], -1)

    return {"metric": measured(goal, test, logits), **spent}


def splits() -> Splits[Questions]:
    """A quarter of the paragraphs is held out."""
    return split(load_questions(Path(DATA) / "xquad" / "xquad.en.json.gz"), valid=0.05, test=0.25).checked()
