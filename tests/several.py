"""Fits of several processes, as torchrun would start them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FIT = ["-m", "lorakit", "fit", "base", "data.csv", "--epochs", "6", "--batch-size", "7", "--learning-rate", "0.003"]
FIT += ["--dtype", "fp32", "--checkpoint-steps", "4", "--threads", "1"]


def free_port() -> str:
    """A port that nobody has yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment() -> dict[str, str]:
    """Ours, with one thread for each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def begin(place: Path, out: str, *more: str, size: int = 2, words: Sequence[str] = FIT) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them, but none is killed because another ended."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *words, "--out", out, *more],
            cwd=place,
            env={**environment(), **shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    told = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), told
    return told


def losses(run: Path) -> list[float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


def waited(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)
