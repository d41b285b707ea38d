"""A base in few bits against the same base in floats: training steps, resident bytes, error of the weights.

Sides take turns, each a process of its own. Time is that of lorakit's bf16 LoRA step over that of the step on the
quantized base: 0.8 is a step 1.25 times as long. Bytes are what a process has resident once the base is loaded and
quantized, beyond what it had before, over those of the fp32 base. The peer is peft with bitsandbytes and Trainer.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import Bench
from train import OURS, SIDES, in_turn, opened

HERE = Path(__file__).parent
FORMS = ("int8", "nf4", "int4")
PEERS = {"nf4": "peft, bitsandbytes nf4", "int8": "peft, bitsandbytes int8"}


def race(bench: Bench, job: str, turns: int, steps: int) -> None:
    """Steps on every base, in turn."""
    for form in FORMS:
        SIDES[form] = ("ours", {"quantize": form})
    for form, name in PEERS.items():
        SIDES[name] = ("peft_trainer", {"dtype": "bf16", "order": "grouped", "bits": form})
    with opened((OURS, *FORMS, *PEERS.values()), job) as sides:
        for label, threads, clock in (("1 thread cpu", 1, "cpu"), ("2 threads wall", 2, "seconds")):
            done = in_turn(sides, turns, steps, threads, clock)
            for form in FORMS:
                bench.ratio(f"{job} {form} vs bf16 ({label})", done.over(form, OURS))
            for form, name in PEERS.items():
                bench.ratio(f"{job} {form} vs {name} ({label})", done.over(form, name))
    for name, values in done.rates.items():
        bench.fact(f"{job} tokens/s, {name}", round(statistics.median(values)))


def loaded(job: str, form: str) -> dict[str, float]:
    """Bytes resident after the base is there, and the error of its weights."""
    import ctypes

    import torch

    import lorakit as lk
    from sides.jobs import base
    from sides.worker import resident, warm_up

    warm_up()
    base("minilm", torch.float32)  # what loading itself leaves behind
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    before = resident()
    model = base(job, torch.float32)
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()  # read from the file, which is else mapped
    costs = None if form == "fp32" else lk.quantize(model, form)
    trim(0)
    return {"bytes": resident() - before, "error": costs.error if costs else 0.0}


def main() -> None:
    """Every job."""
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(loaded(*sys.argv[2:])))
        return
    bench = Bench(__doc__ or "")
    for job in ("minilm rt_polarity", "llama 8x512 instructions"):
        held = {}
        for form in ("fp32", *FORMS):
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
            command = [sys.executable, "-W", "ignore", __file__, "--case", job, form]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            held[form] = found["bytes"]
            bench.fact(f"{job} resident MiB, {form}", round(found["bytes"] / 2**20, 1))
            if form != "fp32":
                bench.fact(f"{job} error of the weights, {form}", round(found["error"], 4))
                bench.ratio(f"{job} resident, fp32 over {form}", [held["fp32"] / found["bytes"]])
        race(bench, job, bench.rounds(7, 3), bench.rounds(12, 5) if job.startswith("minilm") else 3)
        bench.keep()
    bench.done()


if __name__ == "__main__":
    main()
