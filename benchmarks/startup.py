"""What starting costs in fresh processes: `import lorakit` beyond torch, against peft's, and `lorakit --help`."""

import os
import statistics
import subprocess
import sys
import time

from common import Bench


def seconds(code: str) -> float:
    """Processor time of a fresh Python that runs the code."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Turn by turn."""
    bench = Bench(__doc__)
    n = bench.rounds(9, 5)
    verbs = "import lorakit as lk; lk.plan, lk.attach, lk.load, lk.merge, lk.truncate"
    codes = {"torch": "import torch", "lorakit": f"import torch; {verbs}", "peft": "import torch; import peft"}
    spent: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(n):
        for name, code in codes.items():
            spent[name].append(seconds(code))
    beyond = {name: [max(x - t, 1e-4) for x, t in zip(spent[name], spent["torch"])] for name in ("lorakit", "peft")}
    bench.ratio("import beyond torch vs import peft (cpu)", [p / o for p, o in zip(beyond["peft"], beyond["lorakit"])])
    bench.fact(
        "import of lorakit and its main verbs beyond torch, s (cpu)", round(statistics.median(beyond["lorakit"]), 3)
    )
    walls = []
    for _ in range(n):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lorakit", "--help"], check=True, capture_output=True)
        walls.append(time.perf_counter() - began)
    bench.fact("lorakit --help, s (wall)", round(statistics.median(walls), 3))
    bench.done()


if __name__ == "__main__":
    main()
