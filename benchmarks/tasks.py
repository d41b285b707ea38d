"""Every task against peft with the usual recipe: the same base, rows, rank and steps, a few seeds, in turn.

A module in jobs/ has both sides: `ours(seed, steps)` and `peer(seed, steps)` train and give `metric` (held-out, higher
is better), `seconds` (of the training steps alone) and `cpu` (processor seconds of them); `PEER` names the recipe,
`METRIC` the metric, `STEPS` how many; `SEEDS`, how many runs, where three tell too little. Each side of each seed is a
process of its own. Names of jobs select.

python benchmarks/tasks.py --quick
"""

import json
import os
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Bench, named

HERE = Path(__file__).parent
_RUN = "import json, sys; from importlib import import_module as load; "
_RUN += "print(json.dumps(getattr(load(sys.argv[1]), sys.argv[2])(int(sys.argv[3]), int(sys.argv[4]))))"


def side(job: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """One side, trained and measured."""
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", _RUN, f"jobs.{job}", name, str(seed), str(steps)]
    error = None if os.environ.get("SHOW") else subprocess.DEVNULL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=error, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{job}, {name}, seed {seed} failed; SHOW=1 shows why")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def race(bench: Bench, job: str) -> None:
    """One task: ratios of speed, seed by seed, and both sides' metrics."""
    about: Any = import_module(f"jobs.{job}")
    steps = about.STEPS // 4 if bench.quick else about.STEPS
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for seed in range(1 if bench.quick else getattr(about, "SEEDS", 3)):
        for name in found if seed % 2 else reversed(found):
            found[name].append(side(job, name, seed, steps))
    for clock, label in (("seconds", "wall"), ("cpu", "cpu")):
        ratios = [theirs[clock] / ours[clock] for ours, theirs in zip(found["ours"], found["peer"])]
        bench.ratio(f"{job} vs {about.PEER} ({label})", ratios)
    for name, runs in found.items():
        bench.fact(f"{job}, {steps} steps, held-out {about.METRIC}, {name}", [round(run["metric"], 4) for run in runs])
    gaps = [ours["metric"] - theirs["metric"] for ours, theirs in zip(found["ours"], found["peer"])]
    spread = round(statistics.stdev(gaps), 4) if len(gaps) > 1 else None
    bench.fact(f"{job}, {about.METRIC}: mean difference, and its spread", [round(statistics.mean(gaps), 4), spread])


def main() -> None:
    """All tasks, or those that are named."""
    wanted = named(sorted(file.stem for file in (HERE / "jobs").glob("*.py") if file.stem != "__init__"))
    bench = Bench(__doc__ or "")
    for job in wanted:
        race(bench, job)
        bench.keep()
    bench.done()


if __name__ == "__main__":
    main()
