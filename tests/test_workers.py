"""Several processes on one run: they end as one does, and when one is killed the others say so and nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.fit.workers import Workers
from tiny_chat import CHATML, chat_table, pairs, tiny_causal
from tiny_text import small_task, table, tiny_bert

FIT = ["-m", "lorakit", "fit", "base", "data.csv", "--epochs", "6", "--batch-size", "7", "--learning-rate", "0.003"]
FIT += ["--dtype", "fp32", "--checkpoint-steps", "4", "--threads", "1"]

place, _, _ = small_task(180)


@pytest.mark.parametrize("fixed", [False, True])
def test_shares_are_all_texts_once_and_about_equal(fixed: bool) -> None:
    sizes = [3, 50, 7, 7, 20, 1, 9, 30, 11]
    shares = [Workers(3, number).share(range(9), sizes, fixed) for number in range(3)]
    assert sorted(text for share in shares for text in share) == list(range(9))
    loads = [sum(sizes[text] for text in share) for share in shares]
    assert fixed or max(loads) - min(loads) <= max(sizes) - sum(sizes) // 3 + 7
    assert Workers().share(range(9), sizes, fixed) == list(range(9))


def test_one_process_needs_nobody() -> None:
    with Workers() as alone:
        tensor = torch.ones(3)
        alone.add(tensor)
        assert tensor.tolist() == [1, 1, 1]
        assert alone.gather("x") == ["x"]
        assert alone.agreed(5) == 5
        assert alone.first


def begin(place: Path, out: str, *more: str, size: int = 2, words: Sequence[str] = FIT) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them, but none is killed because another ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [sys.executable, *words, "--out", out, *more],
            cwd=place,
            env={**os.environ, **shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    told = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), told
    return told


def losses(run: Path) -> list[float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


@pytest.mark.slow
def test_two_processes_end_as_one_and_a_lost_one_costs_nothing(place: Path) -> None:
    end(begin(place, "one", size=1))
    told = end(begin(place, "two"))
    assert "held-out accuracy" in told[0][0]
    assert told[1] == ("", "")
    found, wanted = losses(place / "two"), losses(place / "one")
    assert len(found) == len(wanted) > 20
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5
    summary = json.loads((place / "two" / "summary.json").read_text())
    assert summary["processes"] == 2

    for lost in (0, 1):
        out = f"lost_{lost}"
        run = begin(place, out)
        waited(lambda out=out: (place / out / "checkpoint" / "state.json").is_file())  # type: ignore[misc]
        run[lost].send_signal(signal.SIGKILL)
        told_last = run[1 - lost].communicate(timeout=120)[1]
        run[lost].communicate()
        assert run[1 - lost].returncode == 1, told_last
        assert "has lost another one" in told_last
        assert "--resume" in told_last
        assert "Traceback" not in told_last
        end(begin(place, out, "--resume"))
        assert lk.load(place / out / "adapter") == lk.load(place / "two" / "adapter")
        assert losses(place / out) == found


@pytest.mark.slow
def test_two_processes_learn_to_write_as_one_does(tmp_path: Path) -> None:
    tiny_causal(tmp_path / "base", "llama", CHATML)
    chat_table(tmp_path / "data.jsonl", 60)
    words = ["-m", "lorakit", "fit", "base", "data.jsonl", "--task", "generate", "--epochs", "2", "--dtype", "fp32"]
    end(begin(tmp_path, "one", size=1, words=words))
    told = end(begin(tmp_path, "two", words=words))
    assert "ends by itself" in told[0][0]
    assert told[1] == ("", "")
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) == 8
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["24", "1"])  # with one text a step the second process has none
def test_two_processes_learn_to_embed_as_one_does(tmp_path: Path, batch: str) -> None:
    tiny_bert(tmp_path / "base")
    table(tmp_path / "data.csv", 90)
    words = ["-m", "lorakit", "fit", "base", "data.csv", "--task", "embed", "--epochs", "2", "--dtype", "fp32"]
    words += ["--batch-size", batch, "--max-steps", "6", "--learning-rate", "0.003"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", "--tokens-per-pass", "64", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) > 6
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-4
    two, one = (lk.load(tmp_path / name / "adapter").layers for name in ("two", "one"))
    for path, layer in one.items():
        for name, tensor in layer.factors.items():
            assert float((two[path].factors[name] - tensor).abs().max()) < 1e-3


@pytest.mark.slow
def test_two_processes_learn_to_prefer_as_one_does(tmp_path: Path) -> None:
    tiny_causal(tmp_path / "base", "llama", CHATML)
    rows = [{"prompt": p, "chosen": a, "rejected": f"{a} again"} for p, a in pairs(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["-m", "lorakit", "fit", "base", "data.jsonl", "--task", "prefer", "--epochs", "2", "--dtype", "fp32"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) == 8
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-4


def waited(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)
