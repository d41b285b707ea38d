"""What each trick adds: MiniLM on rt_polarity, from the plain way to all of it, one step of the ladder at a time.

Every rung is a process of its own that trains the same rows with everything up to its trick; they take turns. The time
of a rung over the rung before is what the trick is worth there.
"""

import statistics

from common import Bench
from train import SIDES, in_turn, opened

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
    with opened(RUNGS, job) as sides:
        done = in_turn(sides, turns, steps)
    before = first = next(iter(RUNGS))
    for name in RUNGS:
        bench.fact(f"{job} tokens/s, {name}", round(statistics.median(done.rates[name])))
        bench.ratio(f"{job} {name}, vs the rung before", done.over(name, before))
        before = name
    bench.ratio(f"{job} all, vs plain", done.over(before, first))


def main() -> None:
    """All jobs."""
    bench = Bench(__doc__ or "")
    climb(bench, "minilm rt_polarity", bench.rounds(5, 3), bench.rounds(12, 6))
    if not bench.quick:
        climb(bench, "llama 8x512 instructions", 3, 4)
    bench.done()


if __name__ == "__main__":
    main()
