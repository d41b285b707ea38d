"""lorakit's side: the trunk and the learner that `lorakit fit` runs; or the frozen base alone (`frozen`).

Or only its matrix products (`floor`): what no training step of this base can be faster than, however it is written.
"""

import atexit
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach import groups
from lorakit.data.batches import IGNORED, Tokens, training_batches
from lorakit.fit.begin import Beginning
from lorakit.fit.courses import courses_of
from lorakit.fit.learner import Learner, scores_of
from lorakit.fit.settings import Settings
from lorakit.fit.workers import Workers
from lorakit.kernels.products import input_gradient, linear, pack
from lorakit.tasks.classify import Classify
from lorakit.tasks.generate import Generate
from lorakit.tasks.task import Task
from lorakit.trunk import Trunk, lean, resolve_dtype
from lorakit.trunk import trunk as trunk_module
from lorakit.trunk.memory import keep_few_kernels
from lorakit.trunk.packing import CannotPackError
from lorakit.trunk.shards import Peers, frozen_bytes
from sides.jobs import JOBS, SCALE, Row, base
from sides.worker import Score, Steps, Told, n_learning, serve

keep_few_kernels()  # before anything is multiplied here, as in a fit


def job_of(name: str, train: list[Row], model: nn.Module) -> tuple[Task, Tokens]:
    """The task, and its tokens."""
    ids, labels = tuple(tuple(ids) for ids, _ in train), tuple(tuple(labels) for _, labels in train)
    lines = tuple(range(len(ids)))
    if JOBS[name]["task"] == "generate":
        reads = tuple(tuple(t - 1 for t, label in enumerate(row) if label != IGNORED) for row in labels)
        wanted = tuple(tuple(label for label in row if label != IGNORED) for row in labels)
        return Generate(), Tokens(ids, wanted, reads, lines, 0)
    task = Classify(tuple(map(str, range(JOBS[name].get("labels", 2)))), "mean")
    task.prepare(model)
    return task, Tokens(ids, labels, ((),) * len(ids), lines, 0)


def make(setting: dict[str, Any], train: list[Row], test: list[Row]) -> tuple[Steps, Score, Told]:
    """The trainer of one job."""
    job = JOBS[setting["job"]]
    dtype = resolve_dtype(setting.get("dtype", "auto"), torch.device("cpu"))
    model = base(setting["job"], torch.float32)
    if setting.get("quantize"):
        lk.quantize(model, setting["quantize"], keep=setting.get("family", "")[:4] in ("loft", "eora"))
    task, tokens = job_of(setting["job"], train[: setting.get("rows")], model)
    own = {"learning_rate": job["rate"], "batch_size": job["batch"], "dtype": dtype, **setting.get("settings", {})}
    settings = Settings(**own)
    less(set(setting.get("without", ())))
    if "half precision" in setting.get("without", ()):
        dtype = "fp32"
    if setting.get("family"):
        begun(setting["family"], model, task, tokens, settings)
    elif not setting.get("frozen") and not setting.get("floor"):
        trained = (task.head,) if task.head else ()
        plan = lk.plan(model, rank=job["rank"], scale=SCALE, trained=trained, **setting.get("plan", {}))
        lk.attach(model, plan, seed=setting["seed"])
    workers = Timed(setting.get("processes", 1), setting.get("number", 0)).__enter__()
    trunk = Trunk(model, dtype=dtype, head=task.head, keep=False)
    if settings.shard:
        trunk.share_out(Peers(workers.size, workers.number, workers.join))
    trunk.__enter__()
    batches = training_batches(tokens, job["batch"], setting["seed"], 0, bool(trunk.why_padded))
    batches = [batch for batch in batches if len(batch) == job["batch"]]
    if setting.get("floor"):
        step = products(model, trunk, tokens)
    elif setting.get("frozen"):
        step = frozen(model, task, trunk, tokens)
    else:
        step = learning(model, task, trunk, tokens, settings, workers, setting.get("falling", 0))
    at = 0

    def steps(n: int) -> tuple[int, list[float]]:
        nonlocal at
        workers.spent.update(waiting=0.0, talking=0.0)
        done = [step(batches[(at + i) % len(batches)]) for i in range(n)]
        at += n
        return sum(tokens for tokens, _ in done), [loss for _, loss in done]

    def score() -> dict[str, float]:
        held_out = job_of(setting["job"], test, model)[1]
        return task.metrics(scores_of(model, task, trunk, held_out, settings), held_out)

    def told() -> dict[str, float]:
        frozen = frozen_bytes(model, trunk.shards)
        return {**workers.spent, "frozen": frozen, "learning": n_learning(model, task.head)}

    return steps, score, told


def begun(row: str, model: nn.Module, task: Task, tokens: Tokens, settings: Settings) -> None:
    """Attaches what a row of the family asks for, as a fit begins."""
    from sides.family import FAMILY

    rules = FAMILY[row].rules
    plan = lk.plan(model, **{**rules, "trained": [*rules.get("trained", []), task.head]}, clip_rank=True)
    beginning = Beginning(model, task, tokens, settings, Workers(), None, False).adapted(plan)
    beginning.__enter__()
    atexit.register(lambda: beginning)  # it would take the adapter off as it is collected


class Timed(Workers):
    """Workers that say how long they wait for each other, and how long they talk."""

    spent: ClassVar = {"waiting": 0.0, "talking": 0.0}

    def _ask(self, what: Any, *given: Any) -> None:
        if os.environ.get("WHERE"):
            began = time.perf_counter()
            dist.barrier()
            self.spent["waiting"] += time.perf_counter() - began
        began = time.perf_counter()
        super()._ask(what, *given)
        self.spent["talking"] += time.perf_counter() - began


def less(without: set[str]) -> None:
    """Takes tricks away, for the ladder."""
    if "compiled functions" in without:
        os.environ["LORAKIT_NATIVE"] = "0"
    if "packed rows" in without:
        trunk_module.packed = _cannot  # type: ignore[assignment]
    if "packed weights" in without:
        groups.pack = lean.pack = lambda weight: None
    if "groups" in without:
        Trunk._begin_groups = lambda self, stack: None  # type: ignore[method-assign]
    if "few rows" in without:
        Trunk._begin_blocks = lambda self, stack: None  # type: ignore[method-assign]


def _cannot(model: nn.Module) -> Any:
    raise CannotPackError("it was asked for")


def learning(
    model: nn.Module, task: Task, trunk: Trunk, tokens: Tokens, settings: Settings, workers: Workers, falling: int
) -> Callable[[Sequence[int]], tuple[int, float]]:
    """One optimizer step, at a rate that falls to 0 in so many steps (0: that stays)."""
    learner = Learner(model, task, trunk, settings, workers)
    learner.keep_prefix({"train": tokens}, None)
    learner.courses = courses_of(model, settings.max_steps or 300)

    number = 0

    def step(indices: Sequence[int]) -> tuple[int, float]:
        nonlocal number
        rate = settings.rate * (1 - number / falling if falling else 1)
        number += 1
        done = learner.step(tokens, indices, rate, number)
        return done.n_tokens, done.loss

    return step


def frozen(model: nn.Module, task: Task, trunk: Trunk, tokens: Tokens) -> Callable[[Sequence[int]], tuple[int, float]]:
    """Forward and input gradient of the frozen base: what no adapter can be faster than."""

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(ask)  # type: ignore[operator]

    def step(indices: Sequence[int]) -> tuple[int, float]:
        batch = tokens.gather(sorted(indices, key=lambda i: tokens.lengths[i]))
        loss = task.loss(model, trunk.hidden(batch.ids, batch.segments, batch.reads), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return batch.n_tokens, float(loss.detach())

    return step


@torch.no_grad()
def products(model: nn.Module, trunk: Trunk, tokens: Tokens) -> Callable[[Sequence[int]], tuple[int, float]]:
    """Every weight of the base times as many rows as a step has, and its transpose times as many: no more than that."""
    output = model.get_output_embeddings() if hasattr(model, "lm_head") else None  # type: ignore[operator]
    weights = []
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            weights.append((weight.to(trunk.dtype), pack(weight.to(trunk.dtype).contiguous()), module is output))

    def step(indices: Sequence[int]) -> tuple[int, float]:
        batch = tokens.gather(indices)
        for weight, packed, at_labels in weights:
            n = len(batch.labels) if at_labels else batch.n_tokens + -batch.n_tokens % 32
            x = torch.zeros(n, weight.shape[1], dtype=trunk.dtype)
            input_gradient(linear(x, weight, None, packed), weight, packed)
        return batch.n_tokens, 0.0

    return step


if __name__ == "__main__":
    serve(make)
