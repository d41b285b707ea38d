"""One linear layer with LoRA, forward and backward, against peft and against the frozen layer; bytes kept for backward.

Every cell runs frozen, peft and lorakit in turn. The theory of a step: 6 thin products against 4 big ones, that is
1 + 3 r (i + o) / (2 i o) of the frozen step's operations without merging.
"""

import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorakit as lk
from common import Bench, timed

warnings.filterwarnings("ignore")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer(width: int, dtype: torch.dtype) -> nn.Sequential:
    """One frozen matrix."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width, dtype=dtype)).requires_grad_(False)


def sides(width: int, rank: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Frozen, peft, lorakit: the same weights."""
    frozen, base, ours = layer(width, dtype), layer(width, dtype), layer(width, dtype)
    peft_model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules=["0"]))
    lk.attach(ours, lk.plan(ours, rank=rank))
    return frozen, peft_model, ours


def step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    model(x).backward(dy)
    for parameter in model.parameters():
        parameter.grad = None


def kept_bytes(models: list[nn.Module], x: torch.Tensor) -> int:
    """Bytes that q, k and v on one input keep for their backward, each memory once, weights and factors not counted."""
    own = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [model(x) for model in models]
    del outputs
    return sum(kept.values())


def main() -> None:
    """All cells."""
    bench = Bench(__doc__)
    for name, dtype in DTYPES.items():
        for width in (384, 768):
            for n_tokens in (512, 2048):
                for rank in (8, 16, 64):
                    cell(bench, name, dtype, width, n_tokens, rank)
    for name, dtype in DTYPES.items():
        width, n_tokens, rank = 1024, 2048, 16
        x = torch.randn(n_tokens, width, dtype=dtype, requires_grad=True)
        _, peer, ours = zip(*(sides(width, rank, dtype) for _ in range(3)))
        theirs_bytes, our_bytes = kept_bytes(list(peer), x), kept_bytes(list(ours), x)
        bench.ratio(f"bytes kept for backward, q k v, {name} vs peft", [theirs_bytes / our_bytes])
        bench.fact(
            f"bytes kept for backward, q k v, {name}, MiB",
            [round(theirs_bytes / 2**20, 1), round(our_bytes / 2**20, 1)],
        )
    bench.done()


def cell(bench: Bench, name: str, dtype: torch.dtype, width: int, n_tokens: int, rank: int) -> None:
    """One cell: both ratios, and our step over the frozen one."""
    frozen, peer, ours = sides(width, rank, dtype)
    x = torch.randn(n_tokens, width, dtype=dtype, requires_grad=True)
    dy = torch.randn(n_tokens, width, dtype=dtype)
    inner = max(1, int((8e9 if bench.quick else 2e10) / (n_tokens * width * width * 4)))
    label = f"linear {name} d={width} T={n_tokens} r={rank}"
    for clock_name, threads, clock in (
        ("1 thread cpu", 1, time.process_time),
        ("2 threads wall", 2, time.perf_counter),
    ):
        torch.set_num_threads(threads)
        runs = [lambda m=m: step(m, x, dy) for m in (frozen, peer, ours)]
        for run in runs:
            timed(run, clock, 2)
        values, over_frozen = [], []
        for turn in range(bench.rounds(15, 7)):
            order = [(turn + k) % 3 for k in range(3)]
            spent = dict(zip(order, (timed(runs[k], clock, inner) for k in order)))
            values.append(spent[1] / spent[2])
            over_frozen.append(spent[2] / spent[0])
        bench.ratio(f"{label} vs peft ({clock_name})", values)
        if threads == 1:
            over_frozen.sort()
            theory = 1 + 3 * rank * 2 * width / (2 * width * width)
            bench.fact(
                f"{label}: our step over frozen, and its theory",
                [round(over_frozen[len(over_frozen) // 2], 3), round(theory, 3)],
            )


if __name__ == "__main__":
    main()
