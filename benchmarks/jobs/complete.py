"""complete: a model that writes stories (stories260K) goes on with Shakespeare. The last tenth of it is held out."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import lorakit as lk
from lorakit.data import Documents, Splits, load_documents
from lorakit.data.batches import Tokens
from lorakit.data.rows import split
from lorakit.tasks.base import Base
from lorakit.tasks.complete import Complete
from sides.jobs import DATA, SCALE
from sides.recipe import StepClock, arguments
from sides.stories import stories

PEER = "peft, Trainer"
METRIC = "perplexity, below 0"
STEPS = 100

_BATCH, _RANK, _RATE, _WINDOW = 16, 8, 5e-3, 256
CHOICES = {"window": _WINDOW}


def ours(seed: int, steps: int) -> dict[str, float]:
    """lorakit."""
    base, clock = stories_base(), StepClock(steps)

    settings = {"epochs": 9, "batch_size": _BATCH, "max_steps": steps, "learning_rate": _RATE, "seed": seed}
    settings |= {"schedule": "linear", "warmup": 0.0, "threads": torch.get_num_threads(), **CHOICES}
    plan = lk.plan(base.model, _RANK, scale=SCALE)
    result = lk.fit(base, splits(), "complete", plan=plan, watch=clock.watch, **settings)
    return {"metric": -result.metrics["perplexity"], **clock.spent()}


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft."""
    base = stories_base()
    torch.manual_seed(seed)
    rank = {"r": _RANK, "lora_alpha": int(SCALE * _RANK), "lora_dropout": 0.0}
    model: Any = get_peft_model(
        base.model,  # type: ignore[arg-type]
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **rank),
    )
    clock, data = StepClock(steps), splits()
    goal = Complete.of(data, base).chosen(CHOICES)
    train, test = (goal.examples(rows, base.tokenizer, truncate=False) for rows in (data.train, data.test))
    rows = [{"input_ids": [*map(int, ids), int(labels[-1])]} for ids, labels in zip(train.ids, train.labels)]
    Trainer(
        model=model,
        args=TrainingArguments(**arguments(_BATCH, steps, _RATE, seed)),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(base.tokenizer, mlm=False),
        callbacks=[clock],
    ).train()
    return {"metric": -_perplexity(model.eval(), test), **clock.spent()}


@torch.no_grad()
def _perplexity(model: Any, test: Tokens) -> float:
    """Window by window, by Transformers' own forward."""
    nats, count = 0.0, 0
    for ids, seen, labels in _read(test):
        logits = model(torch.tensor([ids])).logits[0, seen:].float()
        nats += float(F.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
        count += len(labels)
    return math.exp(nats / count)


def _read(test: Tokens) -> Iterable[tuple[list[int], int, list[int]]]:
    for ids, labels in zip(test.ids, test.labels):
        yield [int(x) for x in ids], len(ids) - len(labels), [int(x) for x in labels]


def stories_base() -> Base:
    """The base."""
    model, tokenizer = stories()
    return Base(model, tokenizer, "stories260K", "last", 512)


def splits() -> Splits[Documents]:
    """Stretches of his text."""
    parts = split(load_documents(DATA / "tiny_shakespeare" / "input.txt.gz"))
    return Splits(parts.train, parts.valid.take([0, 1]), parts.test)
