"""Training on a CPU: lorakit against peft with Trainer, on the same base, rows, hyperparameters and tokens.

Each side is a process of its own; they take turns, so that a noisy moment of the machine hits both. A ratio is real
tokens per second of lorakit over those of the peer in the same turn. Trainer's own start is inside its time (about
0.05 s a turn). Memory is the most that a side had resident beyond what its imports and its rows took.

Besides the peers: full fine-tuning by Trainer; the frozen base, forward and input gradient, on lorakit's own trunk; the
base's matrix products alone, for as many rows; and lorakit with adapters in the top quarter of the blocks, whose frozen
prefix is kept over three epochs, against itself with adapters in all of them.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import Bench

HERE = Path(__file__).parent
OURS = "lorakit"
FROZEN = "its frozen base, forward and input gradient"
FULL = "full fine-tuning bf16, grouped by length"
FLOOR = "its matrix products alone"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("ours", {}),
    FROZEN: ("ours", {"frozen": True}),
    FLOOR: ("ours", {"floor": True}),
    "peft default": ("peft_trainer", {"dtype": "fp32", "order": "random"}),
    "peft grouped by length": ("peft_trainer", {"dtype": "fp32", "order": "grouped"}),
    "peft bf16": ("peft_trainer", {"dtype": "bf16", "order": "random"}),
    "peft bf16, grouped by length": ("peft_trainer", {"dtype": "bf16", "order": "grouped"}),
    FULL: ("peft_trainer", {"dtype": "bf16", "order": "grouped", "full": True}),
}


class Side:
    """A process that waits for commands."""

    def __init__(self, name: str, job: str, **more: Any) -> None:
        script, setting = SIDES[name]
        paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        setting = {"seed": 0, "job": job, **setting, **more}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"sides.{script}", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SHOW") else subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def run(self, steps: int, threads: int = 2) -> dict[str, Any]:
        """Some optimizer steps."""
        return self._ask({"steps": steps, "threads": threads})

    def score(self, threads: int = 2) -> dict[str, float]:
        """Held-out metrics now."""
        return self._ask({"threads": threads})

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        self.tell(command)
        return self.answer()

    def tell(self, command: dict[str, Any]) -> None:
        """A command, whose answer is to be asked for."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the process has to say to the last command."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side died: {self.process.args}; SHOW=1 shows why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def opened(names: Iterable[str], job: str) -> Iterator[dict[str, Side]]:
    """The processes of these sides, warm."""
    sides = {name: Side(name, job) for name in names}
    for side in sides.values():
        side.run(4)
    yield sides
    for side in sides.values():
        side.close()


class Turns(NamedTuple):
    """Of every side: tokens per second of each turn, and the most bytes that it had in memory."""

    rates: dict[str, list[float]]
    peaks: dict[str, int]

    def over(self, one: str, other: str) -> list[float]:
        """How much faster the one is than the other, turn by turn."""
        return [a / b for a, b in zip(self.rates[one], self.rates[other])]


def in_turn(sides: dict[str, Side], turns: int, steps: int, threads: int = 2, clock: str = "seconds") -> Turns:
    """Every side runs some steps in every turn, first forwards, then backwards."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    for turn in range(turns):
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            answer = sides[name].run(steps, threads)
            rates[name].append(answer["tokens"] / answer[clock])
            peaks[name] = answer["peak"]
    return Turns(rates, peaks)


def race(bench: Bench, job: str, names: list[str], turns: int, steps: int) -> None:
    """One job: lorakit and others in turn."""
    with opened([OURS, *names], job) as sides:
        done = in_turn(sides, turns, steps)
    for name in names:
        bench.ratio(f"{job} vs {name}", done.over(OURS, name))
        if name not in (FROZEN, FLOOR):
            bench.ratio(f"{job} peak memory vs {name}", [done.peaks[name] / done.peaks[OURS]])
    for name in sides:
        bench.fact(f"{job} tokens/s, {name}", round(statistics.median(done.rates[name])))
        bench.fact(f"{job} peak MiB, {name}", round(done.peaks[name] / 2**20))


def padding(bench: Bench, job: str) -> None:
    """Rows that are padding: in random batches, and in batches grouped by length as Trainer does it."""
    from sides.jobs import JOBS, rows

    size = JOBS[job]["batch"]
    lengths = [len(ids) for ids, _ in rows(job)[0]]
    window = 50 * size
    grouped = [n for k in range(0, len(lengths), window) for n in sorted(lengths[k : k + window], reverse=True)]
    for name, order in (("random batches", lengths), ("batches grouped by length", grouped)):
        batches = [order[k : k + size] for k in range(0, len(order), size)]
        filled = sum(max(batch) * len(batch) for batch in batches)
        bench.fact(f"{job} padding in {name}", f"{1 - sum(lengths) / filled:.1%}")


def prefix_race(bench: Bench, job: str, turns: int, rows: int) -> None:
    """Three epochs over a few rows: adapters in the top quarter with the prefix kept, against adapters everywhere."""
    from sides.jobs import JOBS

    n_steps = rows // JOBS[job]["batch"]
    values, spent = [], {"top": 0.0, "all": 0.0}
    for turn in range(turns):
        took = {}
        for name in ("top", "all") if turn % 2 else ("all", "top"):
            more: dict[str, Any] = {"plan": {"blocks": "last 3"}} if name == "top" else {"settings": {"prefix": "off"}}
            side = Side(OURS, job, rows=rows, **more)
            side.run(0)  # built
            took[name] = sum(side.run(n_steps)["seconds"] for _ in range(3))
            side.close()
            spent[name] += took[name]
        values.append(took["all"] / took["top"])
    bench.ratio(f"{job} top quarter with kept prefix, 3 epochs, vs all layers", values)


FEW = [FROZEN, FLOOR, "peft default", "peft bf16, grouped by length", FULL]  # the default, and the best of the settings
JOB_SIDES = {  # others than lorakit; turns and steps, all and quick
    "minilm rt_polarity": (list(SIDES)[1:], (7, 12), (3, 8)),
    "llama 8x512 instructions": (FEW, (5, 6), (2, 4)),
    "gpt2 12x768 e2e": (FEW, (5, 3), (2, 2)),
}


def main() -> None:
    """All jobs, or those that JOBS names."""
    bench = Bench(__doc__ or "")
    for job in os.environ.get("JOBS", ",".join(JOB_SIDES)).split(","):
        names, full, quick = JOB_SIDES[job]
        padding(bench, job)
        if bench.quick and len(names) == len(FEW):
            names = [name for name in names if name not in (FLOOR, FULL)]
        race(bench, job, names, *(quick if bench.quick else full))
    prefix_race(bench, "bert 12x384 rt_polarity", bench.rounds(3, 1), bench.rounds(1600, 320))
    bench.done()


if __name__ == "__main__":
    main()
