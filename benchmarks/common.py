"""Both sides in one process, turn by turn; the ratio of each turn, then their median.

A ratio above 1 means lorakit is faster or smaller. Each pair is measured twice: processor time on one thread, which a
busy machine disturbs least, and wall time on two threads, which is what a person waits for.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("lorakit", "torch", "transformers", "peft", "numpy", "safetensors")


class Bench:
    """Collects ratios, their spread, and facts; prints them or gives one JSON object."""

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes on two cores")
        parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
        parser.add_argument("--save", action="store_true", help="also write it to benchmarks/results/")
        args = parser.parse_args()
        self.quick: bool = args.quick
        self.json: bool = args.json
        self.save: bool = args.save
        self.ratios: dict[str, float] = {}
        self.spread: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {}

    def rounds(self, full: int, quick: int) -> int:
        """How many turns."""
        return quick if self.quick else full

    def ratio(self, name: str, values: list[float]) -> None:
        """Records the ratios of all turns under one name."""
        self.ratios[name] = round(statistics.median(values), 3)
        low, high = _quartiles(values)
        self.spread[name] = [round(low, 3), round(high, 3)]
        self.note(f"{name:<66} {self.ratios[name]:8.2f}   [{low:.2f}, {high:.2f}]")

    def fact(self, name: str, value: Any) -> None:
        """Records a number that is no ratio."""
        self.facts[name] = value
        self.note(f"{name:<66} {value}")

    def note(self, line: str) -> None:
        """For people; on stderr when JSON is asked for."""
        print(line, file=sys.stderr if self.json else sys.stdout, flush=True)

    def race(self, name: str, theirs: Callable[[], Any], ours: Callable[[], Any], *, n: int, inner: int = 1) -> None:
        """Runs both sides turn by turn, on one thread by processor time and on two by wall time."""
        for label, threads, clock in (("1 thread cpu", 1, time.process_time), ("2 threads wall", 2, time.perf_counter)):
            torch.set_num_threads(threads)
            theirs()
            ours()
            values = []
            for turn in range(n):
                sides = (theirs, ours) if turn % 2 else (ours, theirs)
                spent = {side: timed(side, clock, inner) for side in sides}
                values.append(spent[theirs] / spent[ours])
            self.ratio(f"{name} ({label})", values)

    def keep(self) -> dict[str, Any]:
        """What is known so far; also in a file where asked, so that a long run is not lost.

        What the file has of other jobs stays there, if it was measured on such a machine with these versions.
        """
        result = {
            "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
            "quick": self.quick,
            "ratios": self.ratios,
            "spread": self.spread,
            "facts": self.facts,
        }
        if self.save:
            RESULTS.mkdir(exist_ok=True)
            file = RESULTS / f"{Path(sys.argv[0]).stem}.json"
            known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if all(known.get(key) == result[key] for key in ("machine", "versions", "quick")):
                result |= {key: known[key] | result[key] for key in ("ratios", "spread", "facts")}
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    def done(self) -> None:
        """Prints the JSON object, and writes it where asked."""
        result = self.keep()
        if self.json:
            print(json.dumps(result))


def named(known: Iterable[str]) -> list[str]:
    """The jobs that the command line names, taken from it; all that are known if it names none. Before a Bench is."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word.startswith("-"))]
    return words or list(known)


def timed(run: Callable[[], Any], clock: Callable[[], float], inner: int = 1) -> float:
    """Seconds of `inner` calls. Python's collector runs as it does for everybody, after a clean start."""
    gc.collect()
    began = clock()
    for _ in range(inner):
        run()
    return max(clock() - began, 1e-9)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def processor() -> str:
    """Its name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next((line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
