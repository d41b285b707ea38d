"""The loop: batches in, records out. Everything it needs to go on after a kill is in `State`.

Whatever is random (order of rows, factors, head) is drawn from the seed and the epoch, so that a run continued from a
checkpoint takes the very steps it would have taken. The trunk stays in eval mode: what is frozen is not disturbed.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach import recorded, refuse_unseen
from lorakit.data.batches import Tokens, gather, plain_batches, training_batches
from lorakit.errors import FitError, NoEffectError
from lorakit.fit.settings import Settings
from lorakit.tasks.classify import Classify


@dataclass
class State:
    """Where a run stands: steps done, the optimizer's memory, the best so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0
    best: dict[str, float] | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One line of records.jsonl. `kind` is "step" or "valid"."""

    kind: str
    step: int
    epoch: int
    values: dict[str, float]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over what learns."""
    parameters = list(trainable(model).values())
    if not parameters:
        raise FitError("nothing in the model requires a gradient, so there is nothing to train")
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True
    )


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to 0. `step` counts from 0."""
    warm = max(1, round(settings.warmup * total))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def total_steps(n_rows: int, settings: Settings) -> int:
    """Optimizer steps of the longest possible run."""
    steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def train(
    model: nn.Module,
    task: Classify,
    tokens: Tokens,
    valid: Tokens,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    state: State,
) -> Iterator[Record]:
    """Trains from `state` on, yielding a record for every step and every evaluation; `state` moves along.

    Raises NoEffectError if an update never ran in the first step or got no gradient, FitError if the loss is not
    finite.
    """
    total = total_steps(len(tokens), settings)
    learning = trainable(model)
    device = next(model.parameters()).device
    if state.step == 0:
        _probe(model, task, tokens, settings, learning)
    while state.epoch < settings.epochs and state.step < total:
        batches = training_batches(tokens, settings.batch_size, settings.seed, state.epoch)
        for indices in batches[state.batch :]:
            began = time.perf_counter()
            batch = gather(tokens, indices)
            rate = learning_rate(settings, state.step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = task.loss(task.logits(model, batch), batch.labels.to(device))
            if not bool(torch.isfinite(loss)):
                raise FitError(
                    f"the loss is {float(loss.detach())} at step {state.step + 1}; lower the learning rate "
                    f"(now {settings.learning_rate:g}) or look for broken rows"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(learning.values(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.batch += 1
            spent = time.perf_counter() - began
            state.seconds += spent
            yield Record(
                "step",
                state.step,
                state.epoch,
                {
                    "loss": float(loss.detach()),
                    "learning_rate": rate,
                    "gradient_norm": float(norm),
                    "n_tokens": batch.n_tokens,
                    "step_s": spent,
                },
            )
            if state.step >= total:
                break
        metrics = evaluate_tokens(model, task, valid, settings.eval_batch_size)[0]
        if task.better(metrics, state.best):
            state.best, state.stale = metrics, 0
            state.best_tensors = {name: p.detach().clone() for name, p in learning.items()}
        else:
            state.stale += 1
        state.epoch += 1
        state.batch = 0
        yield Record("valid", state.step, state.epoch, metrics)
        if state.stale >= settings.patience:
            return


def _probe(
    model: nn.Module, task: Classify, tokens: Tokens, settings: Settings, learning: dict[str, nn.Parameter]
) -> None:
    """The first batch, before any step: every update must run, and reach the loss."""
    batch = gather(tokens, training_batches(tokens, settings.batch_size, settings.seed, 0)[0])
    with recorded(model) as unseen:
        loss = task.loss(task.logits(model, batch), batch.labels)
    refuse_unseen(model, unseen)
    gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    idle = [name for name, gradient in zip(learning, gradients) if gradient is None]
    if idle:
        raise NoEffectError(
            f"{len(idle)} of {len(learning)} trainable tensors do not reach the loss, e.g. '{idle[0]}'; "
            "take their layers out of the plan"
        )


def evaluate_tokens(
    model: nn.Module, task: Classify, tokens: Tokens, batch_size: int
) -> tuple[dict[str, float], Tensor]:
    """Metrics and the logits in the order of the rows."""
    with torch.no_grad():
        rows: list[int] = []
        parts: list[Tensor] = []
        for batch in plain_batches(tokens, batch_size):
            parts.append(task.logits(model, batch).cpu())
            rows.extend(batch.indices)
    logits = torch.empty_like(torch.cat(parts))
    logits[rows] = torch.cat(parts)
    known = bool((tokens.labels >= 0).all())
    return (task.metrics(logits, tokens.labels) if known else {}), logits


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Writes values over what learns."""
    learning: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            learning[name].copy_(tensor)
