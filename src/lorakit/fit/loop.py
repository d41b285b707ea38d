"""The loop: batches in, records out. Everything it needs to go on after a kill is in `State` and in the Learner.

Whatever is random (order of rows, factors, head) is drawn from the seed and the epoch, so that a run continued from a
checkpoint takes the very steps it would have taken. The trunk stays in eval mode: what is frozen is not disturbed.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.data.batches import Examples
from lorakit.errors import NotFiniteError
from lorakit.fit.learner import Learner
from lorakit.fit.settings import Settings


@dataclass
class State:
    """Where a run stands: steps done, and the best so far (`best_values` as `Learner.best` gives them)."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    stale: int = 0  # evaluations since the best
    seconds: float = 0.0
    settled: dict[str, Any] = field(default_factory=dict)  # settings that were left open (settle.py)
    best: dict[str, float] | None = None
    best_epoch: int = 0
    best_values: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """One line of records.jsonl, of kind "step" or "valid"; or of kind "start", for whoever watches."""

    kind: str
    step: int
    epoch: int
    values: Mapping[str, Any]


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Linear warm-up, then the schedule: a cosine or a line down to 0, or constant. `step` counts from 0."""
    warm = max(1, round(settings.warmup * total))
    if step < warm:
        return settings.rate * (step + 1) / warm
    share = min(1.0, (step - warm) / max(1, total - warm))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
    return settings.rate * fall[settings.schedule]


def total_steps(n_rows: int, settings: Settings) -> int:
    """Optimizer steps of the longest possible run."""
    steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def train(learner: Learner, examples: Examples, valid: Examples, state: State) -> Iterator[Record]:
    """Trains from `state` on, yielding a record for every step and every evaluation; `state` moves along.

    Raises NoEffectError if an update never ran in the first step or got no gradient, NotFiniteError if the loss
    is not finite.
    """
    settings = learner.settings
    total = total_steps(len(examples), settings)
    if state.step == 0:
        learner.probe(examples, learner.batches(examples)[0])
    while state.epoch < settings.epochs and state.stale < settings.patience and (state.step < total or state.batch):
        batches = learner.batches(examples, state.epoch)
        for indices in batches[state.batch :]:
            if state.step >= total:
                break
            began = time.perf_counter()
            rate = learning_rate(settings, state.step, total)
            try:
                done = learner.step(examples, indices, rate, state.step + 1)
            except NotFiniteError as error:
                way = f"lower the learning rate (now {settings.rate:g}) or look for broken rows there"
                if broken := learner.broken():
                    way = f"the weight '{broken}' of the base is not finite: get its files again"
                told = f"{error} at step {state.step + 1}; {way}; nothing was changed by that batch"
                raise NotFiniteError(told) from None
            state.step += 1
            state.batch += 1
            spent = time.perf_counter() - began
            state.seconds += spent
            values = {**done._asdict(), "learning_rate": rate, "step_s": spent}
            yield Record("step", state.step, state.epoch, values)
        metrics = learner.evaluate(valid)
        state.epoch += 1
        final = all(course.is_done(state.step) for course in learner.courses.values())  # the form of what is learned
        if final and learner.task.better(metrics, state.best):
            state.best, state.best_epoch, state.stale, state.best_values = metrics, state.epoch, 0, learner.best()
        elif final:
            state.stale += 1
        state.batch = 0
        yield Record("valid", state.step, state.epoch, metrics)
