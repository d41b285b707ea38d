"""Every method, start and prompt beside peft's own: accuracy, time of a step, memory, with as many numbers to train.

MiniLM on rt_polarity (film reviews, two classes) and banking77 (77 intents), 100 steps of 32 texts, every row at one
rate on both sides that falls to 0, held-out accuracy of three seeds. Times are tokens per second of both, in turn, each
a process of its own: lorakit as it is, peft with its base in bf16 too and rows grouped by length, its fastest.
Without a name on the command line all rows run, the accuracy of those first that are not in the results yet.
"""

import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from common import RESULTS, Bench, named
from sides.family import FAMILY, Row
from sides.jobs import JOBS
from train import SIDES, Side, in_turn, opened

HOW = ("accuracy", "time")
TASKS = ("minilm rt_polarity", "minilm banking77")
SEEDS, STEPS = 3, 100


class Learned(NamedTuple):
    """Held-out metrics of one seed, and how many numbers learned beside the head."""

    accuracy: float
    loss: float
    numbers: int


def sides_of(name: str, row: Row) -> list[str]:
    """The names of both sides, known to `train` from now on."""
    own = {"family": name, "quantize": row.bits}
    SIDES[f"{name}, lorakit"] = ("ours", own)
    if isinstance(row.peft, dict):
        more = {"family": name, "steps": STEPS, "bits": row.bits}
        SIDES[f"{name}, peft"] = ("peft_trainer", {"dtype": "bf16", "order": "grouped", **more})
    return [side for side in (f"{name}, lorakit", f"{name}, peft") if side in SIDES]


def accuracy(bench: Bench, name: str, row: Row) -> None:
    """Held-out metrics of every seed; as many at a time as there are cores, on one thread each."""
    cases = [(job, side, seed) for job in TASKS for side in sides_of(name, row) for seed in range(SEEDS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        learned = dict(zip(cases, pool.map(lambda case: learn(row, *case), cases)))
    for job, side, _ in cases[::SEEDS]:
        every = [learned[job, side, seed] for seed in range(SEEDS)]
        bench.fact(f"{job}, {side}, accuracy", [round(one.accuracy, 4) for one in every])
        bench.fact(f"{job}, {side}, loss", [round(one.loss, 4) for one in every])
        bench.fact(f"{job}, {side}, numbers", every[0].numbers)
    bench.keep()


def learn(row: Row, job: str, side: str, seed: int) -> Learned:
    """One seed of one side."""
    rate = JOBS[job]["rate"] * row.pace
    more: dict[str, Any] = {"span": STEPS}
    if side.endswith("lorakit"):
        more = {"settings": {"learning_rate": rate, "max_steps": STEPS}}
    process = Side(side, job, seed=seed, rate=rate, falling=STEPS, **more)
    numbers = process.run(STEPS, threads=1)["learning"]
    found = process.score(threads=1)
    process.close()
    return Learned(found["accuracy"], found["loss"], numbers)


def time(bench: Bench, name: str, row: Row, turns: int, steps: int) -> None:
    """Both sides in turn, and lorakit's LoRA."""
    job = TASKS[0]
    sides_of("lora", FAMILY["lora"])
    sides_of(name, row)
    own, peer = f"{name}, lorakit", f"{name}, peft"
    wanted = {own: None, "lora, lorakit": None, **({peer: None} if peer in SIDES else {})}
    with opened(wanted, job) as sides:
        done = in_turn(sides, turns, steps)
    bench.ratio(f"{name}: step beside lora's", done.over("lora, lorakit", own))
    bench.fact(f"{name}: peak MiB, lorakit", round(done.peaks[own] / 2**20))
    if peer in SIDES:
        bench.ratio(f"{name}: faster than peft", done.over(own, peer))
        bench.ratio(f"{name}: smaller than peft", [done.peaks[peer] / done.peaks[own]])
    bench.keep()


def main() -> None:
    """What the command line names: rows, or "accuracy" or "time" alone."""
    words = named([])
    wanted = [word for word in words if word not in HOW] or list(FAMILY)
    how = [word for word in words if word in HOW] or HOW
    bench = Bench(__doc__ or "")
    file = RESULTS / "family.json"
    known = json.loads(file.read_text(encoding="utf-8"))["facts"] if file.exists() and len(words) < 2 else {}
    for name in wanted:
        if "accuracy" in how and not bench.quick and f"{TASKS[-1]}, {name}, lorakit, loss" not in known:
            accuracy(bench, name, FAMILY[name])
    for name in wanted if not bench.quick else wanted[:3]:
        if "time" in how:
            time(bench, name, FAMILY[name], bench.rounds(9, 3), 6)
    bench.done()
    lines = [f"{statistics.mean(value):.3f}  {key}" for key, value in bench.facts.items() if key.endswith("accuracy")]
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
