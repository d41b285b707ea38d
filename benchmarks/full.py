"""LoRA beside full fine-tuning: held-out metrics of both, and the share of parameters that LoRA learns.

Both train by `lorakit.fit` from the same base on the same rows, for as many epochs, with a cosine schedule; each at the
better of its learning rates, chosen by the validation rows with seed 0 alone. Names of jobs select.

python benchmarks/full.py tag
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lorakit as lk
from common import Bench, named
from jobs import answer, complete, tag
from lorakit.data import Splits, load_dialogues
from lorakit.data.rows import split
from lorakit.plan import Plan
from lorakit.tasks.base import Base, load_base
from lorakit.tasks.task import TASKS, task_of
from sides import digits
from sides.jobs import DATA

LORA, FULL = "LoRA", "full fine-tuning"


class Job(NamedTuple):
    """What is trained on what, and how long; the metrics that are told, the first of which chooses.

    With `write` answers are written too, and measured. `others`: further sides, and their rules of a plan.
    """

    task: str
    data: Callable[[], Splits[Any]]
    base: Callable[[], Base]
    metrics: tuple[str, ...]
    epochs: int
    batch: int
    rank: int
    rates: tuple[float, ...]  # of LoRA
    full_rates: tuple[float, ...]
    choices: Mapping[str, Any] = {}
    write: bool = False
    others: Mapping[str, Mapping[str, Any]] = {}
    seeds: int = 3


_STORIES = {  # a base so small that rank 8 is 18 % of it, with 512 tokens that were learned on stories
    "LoRA of rank 1 on few matrices": {"rank": 1, "layers": ("q", "o", "mlp")},
    "LoRA and the embeddings": {"trained": ("model.embed_tokens.weight", "lm_head.weight")},
}


def _minilm() -> Base:
    return load_base("minilm")


def _restaurants() -> Splits[Any]:
    """Meaning representations, and a sentence for each; the same meaning is in one part only, as in the challenge."""
    rows, test = (load_dialogues(DATA / "e2e_official" / f"{name}.csv.gz") for name in ("devset", "testset_w_refs"))
    parts = split(rows, test=0.0)
    return Splits(parts.train, parts.valid, test).checked()


JOBS = {
    "tag": Job("tag", tag.splits, _minilm, ("f1",), 3, 32, 8, (2e-3, 4e-3), (1e-4, 3e-4)),
    "answer": Job("answer", answer.splits, _minilm, ("f1", "exact_match"), 10, 8, 8, (1e-3, 3e-3), (3e-5, 1e-4, 3e-4)),
    "image": Job("image", digits.data, digits.vit, ("accuracy",), 30, 32, 1, (2e-3, 5e-3), (3e-4, 1e-3), seeds=6),
    "complete": Job(
        "complete", complete.splits, complete.stories_base, ("perplexity",), 4, 16, 8, (5e-3, 1e-2), (1e-3, 2e-3),
        complete.CHOICES, others=_STORIES,
    ),
    "generate": Job(
        "generate", _restaurants, complete.stories_base, ("loss", "bleu"), 6, 16, 8, (5e-3, 1e-2), (1e-3, 2e-3),
        write=True, others=_STORIES,
    ),
}  # fmt: skip


class Run(NamedTuple):
    """Held-out metrics, the first one on the validation rows, and the share of parameters that learn, in per cent."""

    metrics: dict[str, float]
    valid: float
    share: float


def trained(job: Job, side: str, rate: float, seed: int) -> Run:
    """One fit: of the whole base, of LoRA on every matrix, or by other rules."""
    base, data = job.base(), job.data()
    rules = {"rank": job.rank, "scale": 2.0, **job.others.get(side, {})}
    plan = Plan({}, ("*",)) if side == FULL else TASKS[job.task].plan(base.model, **rules)
    settings = {"epochs": job.epochs, "batch_size": job.batch, "learning_rate": rate, "seed": seed, "patience": 100}
    found = lk.fit(base, data, job.task, plan=plan, **settings, **job.choices)
    metrics = found.metrics
    if job.write:
        opened = found.adapter, task_of(found.adapter.meta["task"])
        metrics = lk.evaluate(opened, data.test, base=base, write=True).metrics
    share = 100 * found.summary["learned_parameters"] / found.summary["base_parameters"]
    return Run(metrics, found.summary["best_valid"][job.metrics[0]], share)


def compare(bench: Bench, name: str) -> None:
    """One job."""
    job = JOBS[name]
    best_of = min if job.metrics[0] in ("loss", "perplexity") else max
    found: dict[str, list[Run]] = {}
    for side in (FULL, LORA, *job.others):
        rates = job.full_rates if side == FULL else job.rates
        tried = {rate: trained(job, side, rate, 0) for rate in (rates[:1] if bench.quick else rates)}
        best = best_of(tried, key=lambda rate: tried[rate].valid)
        bench.fact(f"{name}, {side}: learning rate of {', '.join(map(str, tried))}", best)
        found[side] = [
            tried[best],
            *(trained(job, side, best, seed) for seed in range(1, 1 if bench.quick else job.seeds)),
        ]
        if side != FULL:
            bench.fact(f"{name}, {side}: parameters that learn, per cent", round(found[side][0].share, 2))
        for metric in job.metrics:
            values = [run.metrics[metric] for run in found[side]]
            bench.fact(f"{name}, {side}: held-out {metric}", [round(value, 4) for value in values])
            gaps = [a - b.metrics[metric] for a, b in zip(values, found[FULL])]
            if side != FULL:
                bench.fact(f"{name}, {side}: {metric} minus that of the whole, mean", round(statistics.mean(gaps), 4))


def main() -> None:
    """All jobs, or those that are named."""
    wanted = named(JOBS)
    bench = Bench(__doc__ or "")
    for name in wanted:
        compare(bench, name)
        bench.keep()
    bench.done()


if __name__ == "__main__":
    main()
