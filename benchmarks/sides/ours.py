"""lorakit's side."""

import random
from typing import Any

import torch

import lorakit as lk
from lorakit.data.batches import Tokens
from lorakit.fit.learner import Learner
from lorakit.fit.settings import Settings
from lorakit.tasks.classify import Classify
from lorakit.trunk import Trunk, resolve_dtype
from sides.jobs import JOBS, Row, base
from sides.worker import Steps, serve


def make(setting: dict[str, Any], train: list[Row]) -> Steps:
    """The trainer of one job."""
    job = JOBS[setting["job"]]
    dtype = resolve_dtype(setting.get("dtype", "auto"), torch.device("cpu"))
    model = base(setting["job"], torch.float32)
    if job["task"] == "classify":
        task = Classify(("0", "1"), "mean")
        task.prepare(model)
        tokens = Tokens(
            tuple(tuple(ids) for ids, _ in train),
            tuple(tuple(labels) for _, labels in train),
            ((),) * len(train),
            tuple(range(len(train))),
            0,
        )
        lk.attach(model, lk.plan(model, rank=job["rank"], trained=("classifier",)), seed=setting["seed"])
    settings = Settings(learning_rate=job["rate"], batch_size=job["batch"], dtype=dtype, **setting.get("settings", {}))
    trunk = Trunk(model, dtype=dtype, head=task.head).__enter__()
    learner = Learner(model, task, trunk, settings)
    order = list(range(len(train)))
    random.Random(setting["seed"]).shuffle(order)
    at = 0

    def steps(n: int) -> tuple[int, list[float]]:
        nonlocal at
        total, losses = 0, []
        for _ in range(n):
            if at + job["batch"] > len(order):
                at = 0
            done = learner.step(tokens, order[at : at + job["batch"]], job["rate"])
            at += job["batch"]
            total += done.n_tokens
            losses.append(done.loss)
        return total, losses

    return steps


if __name__ == "__main__":
    serve(make)
