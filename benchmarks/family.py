"""Every method, start and prompt beside peft's own: accuracy, time of a step, memory, with as many numbers to train.

MiniLM on rt_polarity (film reviews, two classes) and banking77 (77 intents), 32 texts a step, every row at one rate on
both sides, held-out accuracy of three seeds. Times are tokens per second of both, in turn, each a process of its own:
lorakit as it is, peft in bf16 with rows grouped by length, its fastest. Accuracy of peft is that of its default (fp32).
Without a name on the command line all rows run, the accuracy of those first that are not in the results yet.
"""

import json
import statistics
import sys
from typing import Any

from common import RESULTS, Bench, named
from sides.family import FAMILY, Row
from sides.jobs import JOBS
from train import SIDES, Side

HOW = ("accuracy", "time")
TASKS = ("minilm rt_polarity", "minilm banking77")
SEEDS, STEPS = 3, 150


def sides_of(name: str, row: Row) -> list[str]:
    """The names of both sides, known to `train` from now on."""
    own = {"family": name, "quantize": row.bits}
    SIDES[f"{name}, lorakit"] = ("ours", own)
    if isinstance(row.peft, dict):
        more = {"family": name, "steps": STEPS, "bits": row.bits}
        SIDES[f"{name}, peft"] = ("peft_trainer", {"dtype": "fp32", "order": "random", **more})
        SIDES[f"{name}, peft fast"] = ("peft_trainer", {"dtype": "bf16", "order": "grouped", **more})
    return [side for side in (f"{name}, lorakit", f"{name}, peft") if side in SIDES]


def accuracy(bench: Bench, name: str, row: Row) -> None:
    """Held-out metrics of every seed."""
    for job in TASKS:
        for side in sides_of(name, row):
            scores, numbers = [], 0
            for seed in range(SEEDS):
                rate = JOBS[job]["rate"] * row.rate
                more: dict[str, Any] = {"span": STEPS}
                if side.endswith("lorakit"):
                    more = {"settings": {"learning_rate": rate, "max_steps": STEPS}}
                process = Side(side, job, seed=seed, rate=rate, **more)
                numbers = process.run(STEPS).get("learning", 0)
                scores.append(process.score())
                process.close()
            bench.fact(f"{job}, {side}, accuracy", [round(score["accuracy"], 4) for score in scores])
            bench.fact(f"{job}, {side}, loss", [round(score["loss"], 4) for score in scores])
            bench.fact(f"{job}, {side}, numbers", numbers)
            bench.keep()


def time(bench: Bench, name: str, row: Row, turns: int, steps: int) -> None:
    """Both sides in turn, and lorakit's LoRA."""
    job = TASKS[0]
    sides_of("lora", FAMILY["lora"])
    sides_of(name, row)
    wanted = {"lorakit": f"{name}, lorakit", "lora": "lora, lorakit", "peft": f"{name}, peft fast"}
    sides = {key: Side(side, job) for key, side in wanted.items() if side in SIDES}
    for side in sides.values():
        side.run(3)
    rates: dict[str, list[float]] = {key: [] for key in sides}
    peaks: dict[str, float] = {}
    for turn in range(turns):
        for key in list(sides) if turn % 2 else list(reversed(sides)):
            answer = sides[key].run(steps)
            rates[key].append(answer["tokens"] / answer["seconds"])
            peaks[key] = answer["peak"]
    for side in sides.values():
        side.close()
    bench.ratio(f"{name}: step beside lora's", [a / b for a, b in zip(rates["lora"], rates["lorakit"])])
    bench.fact(f"{name}: peak MiB, lorakit", round(peaks["lorakit"] / 2**20))
    if "peft" in sides:
        bench.ratio(f"{name}: faster than peft", [a / b for a, b in zip(rates["lorakit"], rates["peft"])])
        bench.ratio(f"{name}: smaller than peft", [peaks["peft"] / peaks["lorakit"]])
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
