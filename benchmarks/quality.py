"""Is it as good? lorakit and peft with Trainer train the same model on the same rows for one epoch, with three seeds.

Held-out metrics of both, seed by seed, and the training loss over each tenth of the epoch. lorakit at its default (bf16
where the processor has it, packed, random batches), peft at its own (fp32, padded, random batches).
"""

import statistics

from common import Bench
from sides.jobs import JOBS, rows
from train import OURS, Side

PEER = "peft default"


def compare(bench: Bench, job: str, seeds: range, most: int) -> None:
    """One job."""
    n_steps = min(most, len(rows(job)[0]) // JOBS[job]["batch"])
    found: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    curves: dict[str, list[list[float]]] = {OURS: [], PEER: []}
    for seed in seeds:
        for name in found:
            more = {} if name == OURS else {"log": True, "span": n_steps}
            side = Side(name, job, seed=seed, **more)
            losses = side.run(n_steps)["losses"]
            found[name].append(side.score())
            curves[name].append(
                [statistics.mean(losses[k * n_steps // 10 : (k + 1) * n_steps // 10]) for k in range(10)]
            )
            side.close()
    for metric in found[PEER][0]:
        for name, scores in found.items():
            values = [score[metric] for score in scores]
            bench.fact(f"{job}, {n_steps} steps, held-out {metric}, {name}", [round(value, 4) for value in values])
        gaps = [a[metric] - b[metric] for a, b in zip(found[OURS], found[PEER])]
        bench.fact(
            f"{job}, {metric}: mean difference, and its spread over seeds",
            [round(statistics.mean(gaps), 4), round(statistics.stdev(gaps), 4)],
        )
    for name, values in curves.items():
        bench.fact(
            f"{job}, training loss by tenths, {name}", [round(statistics.mean(part), 4) for part in zip(*values)]
        )


def main() -> None:
    """All jobs."""
    bench = Bench(__doc__ or "")
    compare(bench, "minilm rt_polarity", range(3), bench.rounds(300, 60))
    if not bench.quick:
        compare(bench, "llama 8x512 instructions", range(3), 40)
    bench.done()


if __name__ == "__main__":
    main()
