"""Two processes on one run, one thread each, against one process with one thread: same base, rows and steps.

A ratio is real tokens per second of two over those of one in the same turn. Beside it stands what two processes reach
that have nothing to do with each other: no way to share the work is faster on this machine; and the processor time of
one over that of the busier of two, which a busy machine disturbs least, and which leaves waiting out. The losses of all
steps are compared. A further turn is taken with a clock on what the processes ask of each other: waiting (the shares of
a step are unlike, or the processors are) and talking (the sum of gradients; with a sharded base, its blocks).

JOBS="minilm rt_polarity" python benchmarks/processes.py --quick
"""

import os
import socket
import statistics
from typing import Any

from common import Bench
from train import OURS, Side

JOBS = {"minilm rt_polarity": 8, "llama 8x512 instructions": 3}  # steps of a turn
DTYPES = ("fp32", "bf16")


class Team:
    """Several processes that take each step together."""

    def __init__(self, job: str, size: int, **settings: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        os.environ.update(WORLD_SIZE=str(size))
        self.sides = []
        for number in range(size):
            os.environ.update(RANK=str(number))
            self.sides.append(
                Side(OURS, job, processes=size, number=number, settings=settings, dtype=settings["dtype"])
            )

    def run(self, steps: int) -> dict[str, Any]:
        """Some steps; what all of them say together."""
        return together(self.sides, steps)

    def close(self) -> None:
        """Ends them, all at once."""
        for side in self.sides:
            assert side.process.stdin is not None
            side.process.stdin.close()
        for side in self.sides:
            side.process.wait()


def together(sides: list[Side], steps: int) -> dict[str, Any]:
    """The same steps on all of these at the same time."""
    for side in sides:
        side.tell({"steps": steps, "threads": 1})
    found = [side.answer() for side in sides]
    return {
        **found[0],
        **{name: max(answer[name] for answer in found) for name in ("seconds", "cpu", "frozen")},
        **{name: statistics.fmean(answer[name] for answer in found) for name in ("waiting", "talking")},
    }


def race(bench: Bench, job: str, dtype: str, turns: int) -> None:
    """One job in one precision."""
    steps, name = JOBS[job], f"{job} {dtype}"
    teams = {"one": Team(job, 1, dtype=dtype), "two": Team(job, 2, dtype=dtype)}
    if not bench.quick:
        teams["two, sharded"] = Team(job, 2, dtype=dtype, shard=True)
        teams["another"] = Team(job, 1, dtype=dtype)
    rates: dict[str, list[float]] = {team: [] for team in (*teams, "apart")}
    losses: dict[str, list[float]] = {team: [] for team in teams}
    used: dict[str, list[float]] = {team: [] for team in teams}
    for team, members in teams.items():
        losses[team] += members.run(2)["losses"]  # kernels are built
    for turn in range(turns):
        for team in list(teams) if turn % 2 else list(reversed(teams)):
            answer = teams[team].run(steps)
            losses[team] += answer["losses"]
            rates[team].append(answer["tokens"] / answer["seconds"])
            used[team].append(answer["cpu"])
        if "another" in teams:
            answer = together([teams["one"].sides[0], teams["another"].sides[0]], steps)
            losses["one"] += answer["losses"]
            for team in ("two", "two, sharded"):
                losses[team] += teams[team].run(steps)["losses"]
            rates["apart"].append(2 * answer["tokens"] / answer["seconds"])
    for team in [team for team in ("two", "two, sharded", "apart") if rates.get(team)]:
        bench.ratio(f"{name}, {team} over one", [a / b for a, b in zip(rates[team], rates["one"])])
    for team in [team for team in teams if team.startswith("two")]:
        bench.ratio(f"{name}, processor time of one over {team}", [b / a for a, b in zip(used[team], used["one"])])
    for team, members in teams.items():
        found = members.run(steps)
        losses[team] += found["losses"]
        if team.startswith("two"):
            difference = max(abs(a - b) for a, b in zip(losses[team], losses["one"]))
            bench.fact(f"{name}, {team}: largest difference of the loss", f"{difference:.1e}")
            bench.fact(f"{name}, {team}: MiB frozen in each", round(found["frozen"] / 2**20, 1))
        members.close()
    if not bench.quick:
        where(bench, name, job, dtype, steps)


def where(bench: Bench, name: str, job: str, dtype: str, steps: int) -> None:
    """Where two processes spend their time, by a barrier before everything that they ask of each other."""
    os.environ["WHERE"] = "1"
    for team, shard in (("two", False), ("two, sharded", True)):
        members = Team(job, 2, dtype=dtype, shard=shard)
        members.run(2)
        found = members.run(2 * steps)
        for word in ("waiting", "talking"):
            bench.fact(f"{name}, {team}: share of the time {word}", f"{found[word] / found['seconds']:.1%}")
        bench.fact(f"{name}, {team}: ms a step", round(1e3 * found["seconds"] / (2 * steps)))
        members.close()
    del os.environ["WHERE"]


def main() -> None:
    """All jobs, or those that JOBS names, in both precisions."""
    bench = Bench(__doc__ or "")
    for job in os.environ.get("JOBS", ",".join(JOBS)).split(","):
        for dtype in DTYPES:
            race(bench, job, dtype, bench.rounds(9, 2))
            bench.keep()
    bench.done()


if __name__ == "__main__":
    main()
