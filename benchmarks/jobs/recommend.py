"""recommend: two tables follow a shift of taste. Data planted here, by a fixed seed: 3,000 users, 4,000 items.

Tastes are of rank 16, and what a user takes is drawn by the softmax of taste and popularity. The base has the tables of
one season, with noise; in the next one tastes move by a matrix of rank 4, and popularity anew. Each user takes 24
items; one is held out. Both sides take the same batches, draw the same negatives by the same function within the steps
that are timed, and train the same bias of the items.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lorakit.attach import attach
from lorakit.data import Splits
from lorakit.data.batches import training_batches
from lorakit.data.interactions import Interactions
from lorakit.data.pairs import Pairs
from lorakit.fit.learner import Learner, scores_of
from lorakit.fit.settings import Settings
from lorakit.tasks.base import Base
from lorakit.tasks.recommend import Recommend
from lorakit.tasks.tables import Catalog, Tables
from sides.clock import Clock

PEER, METRIC, STEPS = "peft + torch loop", "ndcg@10", 400
USERS, ITEMS, WIDTH, TASTES, MOVES, EACH = 3000, 4000, 64, 16, 4, 24
RANK, SCALE, RATE, BATCH = 8, 2.0, 5e-3, 1024


def planted() -> tuple[Base, Splits[Interactions]]:
    """The tables of the old season, and what users took in the new one."""
    generator = torch.Generator().manual_seed(20)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    users, items = normal(USERS, TASTES) * 0.8, normal(ITEMS, TASTES) * 0.8
    move = normal(USERS, MOVES) @ normal(MOVES, TASTES) * 0.5
    old, new = normal(ITEMS) * 0.7, normal(ITEMS) * 0.7
    model = Tables(USERS, ITEMS, WIDTH)
    with torch.no_grad():
        for table, taste in ((model.users, users), (model.items, items)):
            table.weight.copy_(F.pad(taste, (0, WIDTH - TASTES)) + 0.05 * normal(len(taste), WIDTH))
        model.bias.copy_(old)
    taken = torch.multinomial(((users + move) @ items.T + new).softmax(-1), EACH, generator=generator)
    names = tuple(map(str, range(max(USERS, ITEMS))))

    def rows(columns: list[int]) -> Interactions:
        chosen = taken[:, columns]
        who = torch.arange(USERS)[:, None].expand_as(chosen).flatten().tolist()
        what = chosen.flatten().tolist()
        lines = tuple(range(1, len(who) + 1))
        return Interactions(tuple(names[i] for i in who), tuple(names[i] for i in what), None, "planted", lines)

    order = torch.randperm(EACH, generator=generator).tolist()  # multinomial draws the likely ones first
    parts = Splits(rows(order[2:]), rows(order[:1]), rows(order[1:2]))
    return Base(model.eval(), Catalog(names[:USERS], names[:ITEMS]), "planted", "", 0), parts


def given(seed: int, steps: int) -> tuple[Base, Recommend, Pairs, Pairs, list[tuple[int, ...]], Settings]:
    """What both sides have: base, task, training and test pairs, the batches of all steps, settings."""
    base, data = planted()
    task = Recommend.of(data, base)
    train, test = (task.examples(rows, base.tokenizer, truncate=False) for rows in (data.train, data.test))
    settings = Settings(batch_size=BATCH, seed=seed, learning_rate=RATE, schedule="constant", warmup=0.0)
    batches: list[tuple[int, ...]] = []
    while len(batches) < steps:
        batches += training_batches(train, BATCH, seed, len(batches), False)
    return base, task, train, test, batches[:steps], settings


def result(clock: Clock, task: Recommend, model: torch.nn.Module, test: Pairs) -> dict[str, float]:
    """What the steps took, and the metric."""
    with task.trunk(model, dtype="fp32", pad=0) as trunk:
        return {**clock.spent, "metric": task.metrics(scores_of(model, task, trunk, test, Settings()), test)[METRIC]}


def ours(seed: int, steps: int) -> dict[str, float]:
    """The learner that `lorakit fit` runs."""
    base, task, train, test, batches, settings = given(seed, steps)
    attach(base.model, task.plan(base.model, RANK, scale=SCALE), seed=seed)
    with task.trunk(base.model, dtype="fp32", pad=0) as trunk:
        learner = Learner(base.model, task, trunk, settings)
        clock = Clock()
        for batch in batches:
            learner.step(train, batch, RATE)
        clock.end()
        return result(clock, task, base.model, test)


class Plain(torch.nn.Module):
    """The same tables, multiplied by torch."""

    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.users, self.items, self.bias = tables.users, tables.items, tables.bias

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Scores of all pairs."""
        return self.users(users) @ self.items(items).T + self.bias[items]


def peer(seed: int, steps: int) -> dict[str, float]:
    """peft's LoRA on both `nn.Embedding`, and the plain loop."""
    from peft import LoraConfig, get_peft_model

    base, task, train, test, batches, _ = given(seed, steps)
    model = Plain(base.model)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    config: Any = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["users", "items"])
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    model.bias.requires_grad_(True)
    learning = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    clock = Clock()
    for batch in batches:
        pairs = train.for_step(batch, seed).gather(batch)
        logits = model(pairs.users, pairs.candidates) - pairs.log_odds
        loss = F.cross_entropy(logits, pairs.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    clock.end()
    return result(clock, task, model, test)
