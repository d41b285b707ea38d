"""Both sides of a task with a linear head on MiniLM's tokens: lorakit's fit, and peft with transformers.Trainer.

The same examples in batches of random order, rank 8, scale 2, a learning rate that falls to 0. The peer is the usual
one: Transformers' own model with such a head, dropout and all.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import lorakit as lk
from lorakit.data import Splits
from lorakit.data.batches import Tokens
from lorakit.tasks.base import load_base
from lorakit.tasks.task import TASKS, Task
from sides.jobs import package_model
from sides.recipe import StepClock, arguments

RATE, RANK, SCALE = 1e-3, 8, 2.0


def fitted(task: str, data: Splits[Any], seed: int, steps: int, batch: int) -> dict[str, float]:
    """lorakit."""
    clock, base = StepClock(steps), load_base("minilm")

    settings = {"epochs": 1000, "batch_size": batch, "max_steps": steps, "learning_rate": RATE, "seed": seed}
    settings |= {"schedule": "linear", "warmup": 0.0, "threads": torch.get_num_threads(), "patience": 1000}
    result = lk.fit(base, data, task, plan=lk.plan(base.model, RANK, scale=SCALE), watch=clock.watch, **settings)
    return {"metric": result.metrics["f1"], **clock.spent()}


def prepared(task: str, data: Splits[Any]) -> tuple[Any, Tokens, Tokens]:
    """The task, and its examples to learn from and to report on."""
    base = load_base("minilm")
    goal = TASKS[task].of(data, base)
    train, test = (goal.examples(rows, base.tokenizer, truncate=False) for rows in (data.train, data.test))
    return goal, train, test


def trained(
    model: nn.Module, kind: str, rows: list[dict[str, Any]], collator: Any, seed: int, steps: int, batch: int
) -> tuple[nn.Module, dict[str, float]]:
    """peft with Trainer: the model, and what the steps took."""
    torch.manual_seed(seed)
    clock, tokenizer = StepClock(steps), AutoTokenizer.from_pretrained(package_model())
    matrices = ["query", "key", "value", "dense"]
    lora = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=matrices, task_type=kind)
    args = TrainingArguments(**arguments(batch, steps, RATE, seed))
    adapted: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    collate = collator(tokenizer)
    Trainer(model=adapted, args=args, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()  # type: ignore[arg-type]
    return adapted.eval(), clock.spent()


@torch.no_grad()
def measured(goal: Task, test: Tokens, logits: Any) -> float:
    """F1 of `logits(batch)`, of all tokens of one text: no padding can disturb it."""
    same = nn.ModuleDict({goal.head: nn.Identity()})
    found: list[Tensor] = []
    for i in range(len(test)):
        batch = test.gather([i])
        found.append(goal.scores(same, logits(batch)[batch.reads], batch).float())
    widest = max(one.shape[1] for one in found)
    rows = [nn.functional.pad(one, (0, widest - one.shape[1]), value=torch.nan) for one in found]
    return goal.metrics(torch.cat(rows), test)["f1"]
