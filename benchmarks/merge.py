"""Merging into one 4096 x 4096 matrix, rank 16, in float32 and bfloat16, against merge_and_unload; peak memory too."""

import resource
import subprocess
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorakit as lk
from common import Bench

warnings.filterwarnings("ignore")
SIDE, RANK = 4096, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(dtype: torch.dtype) -> nn.Module:
    """A model with our adapter attached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype))
    lk.attach(model, lk.plan(model, rank=RANK))
    with torch.no_grad():
        model[0].adapters.default.b.normal_(std=0.02)
    return model


def theirs(dtype: torch.dtype) -> nn.Module:
    """The same with peft's."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(SIDE, SIDE, bias=False, dtype=dtype)), LoraConfig(r=RANK, target_modules=["0"])
    )
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_(std=0.02)
    return model


def extra_memory(side: str, dtype: str) -> float:
    """Peak of a merge beyond what was held before it, in dense copies of W; in a process of its own."""
    script = f"import sys; sys.argv=['merge']; import merge; merge.report_memory({side!r}, {dtype!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return float(done.stdout.split()[-1])


def report_memory(side: str, dtype: str) -> None:
    """Prints the peak beyond the start."""
    torch.set_num_threads(1)
    model = (ours if side == "ours" else theirs)(DTYPES[dtype])
    with open("/proc/self/statm", encoding="utf-8") as stream:
        held = int(stream.read().split()[1]) * resource.getpagesize()
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as stream:
        stream.write("5")  # forget the peak so far
    if side == "ours":
        lk.merge(model)
    else:
        model.merge_and_unload()
    with open("/proc/self/status", encoding="utf-8") as stream:
        peak = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM"))
    dense = SIDE * SIDE * DTYPES[dtype].itemsize
    print((peak - held) / dense)


def main() -> None:
    """Times with fresh models each turn, the making of them not counted."""
    import statistics
    import time

    from common import timed

    bench = Bench(__doc__)
    for name, dtype in DTYPES.items():
        for label, threads, clock in (("1 thread cpu", 1, time.process_time), ("2 threads wall", 2, time.perf_counter)):
            torch.set_num_threads(threads)
            values, spent = [], []
            for turn in range(bench.rounds(10, 5)):
                mine, peer = ours(dtype), theirs(dtype)
                a = timed(lambda m=mine: lk.merge(m), clock)
                b = timed(lambda m=peer: m.merge_and_unload(), clock)
                if turn:
                    values.append(b / a)
                    spent.append(a)
            bench.ratio(f"merge 4096 {name} vs merge_and_unload ({label})", values)
            bench.fact(f"merge 4096 {name}, ms ({label})", round(1e3 * statistics.median(spent), 2))
        for side in ("ours", "theirs"):
            bench.fact(
                f"peak of merging {name} beyond the start, in dense copies ({side})", round(extra_memory(side, name), 3)
            )
    bench.done()


if __name__ == "__main__":
    main()
