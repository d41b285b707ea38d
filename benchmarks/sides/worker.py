"""One side of a race, in a process of its own: it waits for a command, runs some steps, and says what they took."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from sides.jobs import Row, rows

Steps = Callable[[int], tuple[int, list[float]]]  # number of steps -> real tokens, loss of every step
Score = Callable[[], dict[str, float]]  # held-out metrics
Told = Callable[[], dict[str, float]]  # what else there is to say of the steps


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that it had in memory."""
    with open("/proc/self/status", encoding="ascii") as stream:
        line = next(line for line in stream if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def n_learning(model: torch.nn.Module, head: str) -> int:
    """Numbers that learn beside the head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and head not in name.split("."))


def warm_up() -> None:
    """What every side loads, and what torch keeps for itself once it has multiplied and differentiated."""
    import transformers

    assert transformers.AutoModel
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, dtype=dtype)
        layer(torch.randn(64, 64, dtype=dtype)).sum().backward()


def serve(make: Callable[[dict[str, Any], list[Row], list[Row]], tuple[Any, ...]]) -> None:
    """Reads commands from stdin, one JSON object a line; answers on stdout.

    `make` gives Steps, Score and perhaps Told.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    setting = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    data = rows(setting["job"])
    warm_up()
    before = resident()
    steps, score, *more = make(setting, *data)
    for line in sys.stdin:
        command = json.loads(line)
        torch.set_num_threads(command["threads"])
        if "steps" not in command:
            print(json.dumps(score()), file=answers, flush=True)
            continue
        began, used = time.perf_counter(), time.process_time()
        n_tokens, losses = steps(command["steps"])
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - used,
            "tokens": n_tokens,
            "losses": losses,
            "peak": peak() - before,
            **{name: value for told in more for name, value in told().items()},
        }
        print(json.dumps(answer), file=answers, flush=True)
