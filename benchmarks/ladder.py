"""What each trick adds: MiniLM on rt_polarity, from the plain way to all of it, one step of the ladder at a time.

Every rung is a process of its own that trains the same rows with everything up to its trick; they take turns. The time
of a rung over the rung before is what the trick is worth there.
"""

import statistics

from common import Bench
from train import SIDES, Side

# each rung: what is still missing on it
ALL = ("compiled functions", "half precision", "packed rows", "packed weights", "groups", "few rows")
RUNGS = {
    "plain: hooks, padded rows grouped by length, float32": ALL,
    "+ packed rows, torch's attention for each length": tuple(x for x in ALL if x != "packed rows"),
    "+ compiled functions": tuple(x for x in ALL if x not in ("packed rows", "compiled functions")),
    "+ half precision": ("packed weights", "groups", "few rows"),
    "+ groups, gradients in place": ("packed weights", "few rows"),
    "+ weights in oneDNN's order": ("few rows",),
    "+ the last block only for the rows that are read": (),
}


def climb(bench: Bench, job: str, turns: int, steps: int) -> None:
    """One job."""
    for name, missing in RUNGS.items():
        SIDES[name] = ("ours", {"without": list(missing)})
    sides = {name: Side(name, job) for name in RUNGS}
    for side in sides.values():
        side.run(4)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            answer = sides[name].run(steps)
            rates[name].append(answer["tokens"] / answer["seconds"])
    for side in sides.values():
        side.close()
    before = first = next(iter(rates.values()))
    for name, values in rates.items():
        bench.fact(f"{job} tokens/s, {name}", round(statistics.median(values)))
        bench.ratio(f"{job} {name}, vs the rung before", [a / b for a, b in zip(values, before)])
        before = values
    bench.ratio(f"{job} all, vs plain", [a / b for a, b in zip(before, first)])


def main() -> None:
    """All jobs."""
    bench = Bench(__doc__ or "")
    climb(bench, "minilm rt_polarity", bench.rounds(5, 3), bench.rounds(12, 6))
    if not bench.quick:
        climb(bench, "llama 8x512 instructions", 3, 4)
    bench.done()


if __name__ == "__main__":
    main()
