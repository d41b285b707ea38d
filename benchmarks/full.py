"""LoRA beside full fine-tuning: held-out metrics of both, and the share of parameters that LoRA learns.

Both train by `lorakit.fit` from the same base on the same rows, for as many epochs, with a cosine schedule; each at the
better of its learning rates, chosen by the validation rows with seed 0 alone. Names of jobs select.

python benchmarks/full.py tag
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lorakit as lk
from common import Bench
from lorakit.data import Splits
from lorakit.data.questions import load_questions
from lorakit.data.rows import split
from lorakit.data.tagged import load_tagged
from lorakit.plan import Plan
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.task import TASKS
from sides import digits
from sides.jobs import DATA


class Job(NamedTuple):
    """What is trained on what, and how long; the metrics that are told, the first of which chooses."""

    task: str
    data: Callable[[], Splits[Any]]
    base: Callable[[], Base]
    metrics: tuple[str, ...]
    epochs: int
    batch: int
    rank: int
    rates: tuple[float, ...]  # of LoRA
    full_rates: tuple[float, ...]


def _snips() -> Splits[Any]:
    return Splits(*(load_tagged(Path(DATA) / "snips" / name) for name in ("train", "valid", "test"))).checked()


def _xquad() -> Splits[Any]:
    return split(load_questions(Path(DATA) / "xquad" / "xquad.en.json.gz"), valid=0.1, test=0.25).checked()


def _minilm() -> Base:
    return load_base("minilm")


JOBS = {
    "tag": Job("tag", _snips, _minilm, ("f1",), 3, 32, 8, (2e-3, 4e-3), (1e-4, 3e-4)),
    "answer": Job("answer", _xquad, _minilm, ("f1", "exact"), 10, 8, 8, (1e-3, 3e-3), (1e-4, 3e-4)),
    "image": Job("image", digits.data, digits.vit, ("accuracy",), 30, 32, 1, (2e-3, 5e-3), (3e-4, 1e-3)),
}


def trained(job: Job, whole: bool, rate: float, seed: int) -> Any:
    """The result of one fit: of the whole base, or of LoRA on every matrix."""
    base = job.base()
    plan = Plan({}, ("*",)) if whole else TASKS[job.task].plan(base.model, job.rank, scale=2.0)
    settings = {"epochs": job.epochs, "batch_size": job.batch, "learning_rate": rate, "seed": seed, "patience": 100}
    return lk.fit(base, job.data(), job.task, plan=plan, consume=True, **settings)


def compare(bench: Bench, name: str) -> None:
    """One job."""
    job = JOBS[name]
    found: dict[str, list[Any]] = {}
    for side, whole, rates in (("LoRA", False, job.rates), ("full fine-tuning", True, job.full_rates)):
        tried = {rate: trained(job, whole, rate, 0) for rate in (rates[:1] if bench.quick else rates)}
        best = max(tried, key=lambda rate: tried[rate].summary["best_valid"][job.metrics[0]])
        bench.fact(f"{name}, {side}: learning rate of {', '.join(map(str, tried))}", best)
        found[side] = [tried[best], *(trained(job, whole, best, seed) for seed in range(1, 1 if bench.quick else 3))]
        for metric in job.metrics:
            values = [round(result.metrics[metric], 4) for result in found[side]]
            bench.fact(f"{name}, {side}: held-out {metric}", values)
    for metric in job.metrics:
        gaps = [100 * (a.metrics[metric] - b.metrics[metric]) for a, b in zip(*found.values())]
        bench.fact(f"{name}, {metric}: LoRA minus full, mean, points", round(statistics.mean(gaps), 2))
    summary = found["LoRA"][0].summary
    share = 100 * summary["adapter_parameters"] / summary["base_parameters"]
    bench.fact(f"{name}, parameters that LoRA and the head learn, per cent of the base's", round(share, 2))


def main() -> None:
    """All jobs, or those that are named."""
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word.startswith("-"))]
    bench = Bench(__doc__ or "")
    for name in wanted or JOBS:
        compare(bench, name)
    bench.done()


if __name__ == "__main__":
    main()
