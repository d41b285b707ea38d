"""Training on a CPU: lorakit against peft with Trainer, on the same base, rows, hyperparameters and tokens.

Each side is a process of its own; they take turns, so that a noisy moment of the machine hits both. A ratio is real
tokens per second of lorakit over those of the peer in the same turn. Trainer's own start is inside its time (about
0.05 s a turn). Memory is the most that a side had resident beyond what its imports took.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Bench

HERE = Path(__file__).parent
PEERS: dict[str, dict[str, Any]] = {
    "peft default": {"dtype": "fp32", "order": "random"},
    "peft grouped by length": {"dtype": "fp32", "order": "grouped"},
    "peft bf16": {"dtype": "bf16", "order": "random"},
    "peft bf16, grouped by length": {"dtype": "bf16", "order": "grouped"},
    "full fine-tuning bf16, grouped by length": {"dtype": "bf16", "order": "grouped", "full": True},
}


class Side:
    """A process that waits for commands."""

    def __init__(self, script: str, setting: dict[str, Any]) -> None:
        env = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"sides.{script}", json.dumps({"seed": 0, **setting})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SHOW") else subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def run(self, steps: int, threads: int) -> dict[str, Any]:
        """Some optimizer steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"steps": steps, "threads": threads}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side died: {self.process.args}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(bench: Bench, job: str, peers: list[str], turns: int, steps: int) -> None:
    """One job: lorakit and all peers in turn."""
    ours = {"lorakit": Side("ours", {"job": job})}
    sides = ours | {name: Side("peft_trainer", {"job": job, **PEERS[name]}) for name in peers}
    for side in sides.values():
        side.run(2, 2)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    for turn in range(turns):
        names = list(sides) if turn % 2 else list(reversed(sides))
        for name in names:
            answer = sides[name].run(steps, 2)
            rates[name].append(answer["tokens"] / answer["seconds"])
            peaks[name] = answer["peak"]
    for name in peers:
        bench.ratio(f"{job} vs {name}", [a / b for a, b in zip(rates["lorakit"], rates[name])])
        bench.ratio(f"{job} peak memory vs {name}", [peaks[name] / peaks["lorakit"]])
    for name in sides:
        bench.fact(f"{job} tokens/s, {name}", round(sorted(rates[name])[len(rates[name]) // 2]))
        bench.fact(f"{job} peak MiB, {name}", round(peaks[name] / 2**20))
    for side in sides.values():
        side.close()


def main() -> None:
    """All jobs."""
    bench = Bench(__doc__)
    for job in ("minilm rt_polarity",):
        race(bench, job, list(PEERS), bench.rounds(9, 3), bench.rounds(20, 8))
    bench.done()


if __name__ == "__main__":
    main()
