"""Both sides of a task with a linear head on MiniLM's pooled vector: lorakit's fit, and peft with transformers.Trainer.

The same rows, batches of 32 in random order, rank 8, scale 2, a learning rate that falls to 0, the same head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import lorakit as lk
from lorakit.data import Splits
from lorakit.tasks.base import load_base
from lorakit.tasks.task import TASKS
from sides.jobs import package_model
from sides.recipe import StepClock, arguments

BATCH, RATE, RANK, SCALE = 32, 1e-3, 8, 2.0


def fitted(task: str, data: Splits[Any], seed: int, steps: int) -> tuple[lk.Adapter, Any, dict[str, float]]:
    """lorakit: the adapter, its base, and what the steps took."""
    clock, base = StepClock(steps), load_base("minilm")

    settings = {"epochs": 1, "batch_size": BATCH, "max_steps": steps, "learning_rate": RATE, "seed": seed}
    settings |= {"schedule": "linear", "warmup": 0.0, "threads": torch.get_num_threads()}
    result = lk.fit(base, data, task, plan=lk.plan(base.model, RANK, scale=SCALE), watch=clock.watch, **settings)
    return result.adapter, base, clock.spent()


class Headed(nn.Module):
    """MiniLM, the mean of its states, and a head whose weight begins at zero: the very model that lorakit trains."""

    def __init__(self, bias: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk: Any = AutoModel.from_pretrained(package_model(), dtype=torch.float32)
        self.trunk.pooler = None
        self.config = self.trunk.config
        self.classifier = nn.Linear(self.config.hidden_size, len(bias))
        nn.init.zeros_(self.classifier.weight)
        self.classifier.bias.data.copy_(bias)
        self.loss = loss

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The head's outputs, and their mean loss."""
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        states, weights = self.trunk(**rows).last_hidden_state, attention_mask.unsqueeze(-1).float()
        logits = self.classifier((states * weights).sum(1) / weights.sum(1))
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def trained(
    texts: Sequence[Sequence[str]],
    labels: Sequence[Sequence[float]],
    loss: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor,
    seed: int,
    steps: int,
) -> tuple[nn.Module, dict[str, float]]:
    """peft with Trainer: the model, and what the steps took. `texts` has one or two columns; `bias` is the head's."""
    tokenizer, clock = AutoTokenizer.from_pretrained(package_model()), StepClock(steps)
    torch.manual_seed(seed)
    model = Headed(bias, loss)
    matrices = [f"trunk.{path}" for path, module in model.trunk.named_modules() if isinstance(module, nn.Linear)]
    lora = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=matrices, modules_to_save=["classifier"])
    encoded = tokenizer(*map(list, texts))
    rows = [dict(zip(encoded, values)) | {"labels": own} for *values, own in zip(*encoded.values(), labels)]
    args = TrainingArguments(**arguments(BATCH, steps, RATE, seed))
    adapted: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(model=adapted, args=args, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()  # type: ignore[arg-type]
    return adapted.eval(), clock.spent()


@torch.no_grad()
def outputs(model: nn.Module, texts: Sequence[Sequence[str]]) -> Tensor:
    """What the peer's head gives, text by text: no padding can disturb it."""
    tokenizer = AutoTokenizer.from_pretrained(package_model())
    return torch.cat([model(**tokenizer(*map(list, zip(row)), return_tensors="pt"))["logits"] for row in zip(*texts)])


def measured(task: str, data: Splits[Any], scores: Tensor) -> dict[str, float]:
    """Metrics of scores of the test rows."""
    base = load_base("minilm")
    goal = TASKS[task].of(data, base)
    found: dict[str, float] = goal.metrics(scores, goal.examples(data.test, base.tokenizer, truncate=False))
    return found
