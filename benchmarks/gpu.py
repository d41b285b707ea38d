"""Training on a GPU: lorakit against peft with Trainer, on the same base, rows and steps; each a process, in turns.

First it is checked that what runs there is right: the Triton kernels and the packed attention against float64, and the
losses of some steps against those of the CPU in float32. Without a GPU nothing is measured. Liger, Unsloth and flash
attention 2 take part where they are installed; a side that fails is named with its last words. All in at most 8
minutes: turns that would begin after 6 are left out.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
if importlib.util.find_spec("lorakit") is None:  # a bare checkout
    sys.path.insert(0, str(HERE.parent / "src"))

from common import Bench  # noqa: E402

OURS = "lorakit"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {  # what must be installed, and how the side runs
    OURS: ("lorakit", {"side": "lorakit"}),
    "lorakit without Triton": ("triton", {"side": "lorakit", "env": {"LORAKIT_TRITON": "0"}}),
    "peft": ("peft", {"side": "peft"}),
    "peft, factors in bf16": ("peft", {"side": "peft", "plain": True}),
    "peft, rows end to end": ("flash_attn", {"side": "peft", "plain": True, "flat": True}),
    "peft and Liger": ("liger_kernel", {"side": "peft", "plain": True, "liger": True}),
    "Unsloth": ("unsloth", {"side": "peft", "unsloth": True}),
}
BASES = {"llama 24x1024": [24, 1024], "llama 32x2048": [32, 2048]}
LAST_TURN_S = 360.0


class Side:
    """A process that waits for a number of steps. `why` says why it cannot; "" while it can."""

    def __init__(self, name: str, shape: list[int], device: str, **more: Any) -> None:
        setting = {"shape": shape, "device": device, "made_on": device, **SIDES[name][1], **more}
        path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, **setting.pop("env", {}), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self.why = ""
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed with the side
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "sides.on_gpu", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=env,
        )

    def run(self, steps: int) -> dict[str, Any] | None:
        """Some steps; None if it fails."""
        if self.why:
            return None
        assert self.process.stdin and self.process.stdout
        with suppress(OSError):  # it has ended: then it says nothing
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            self.why = said[-1] if said else "it ended without a word"
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self._said.close()


def kernels(bench: Bench, device: torch.device) -> None:
    """The Triton kernels against float64, and the time of the same by torch over theirs."""
    from lorakit.device import has_triton
    from lorakit.kernels import thin

    if not has_triton(device):
        bench.fact("Triton", "not here: torch's operations are used")
        return
    from lorakit.kernels import triton_pairs

    for n, i, o, ranks in ((4096, 1024, 1024, [16, 16, 16]), (4096, 2048, 5632, [16, 16]), (777, 2048, 2048, [64])):
        made = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, like: torch.Generator = made) -> torch.Tensor:
            return torch.randn(*shape, generator=like, device=device).to(torch.bfloat16)

        x, a, dx = draw(n, i), draw(sum(ranks), i), draw(n, i)
        b, dys = [draw(r, o) for r in ranks], [draw(n, o) for _ in ranks]
        s = x @ a.T
        into = [(torch.zeros(r, i, device=device), torch.zeros(o, r, device=device)) for r in ranks]
        scales = [1.0] * len(ranks)
        ds = torch.cat([dy.double() @ w.double().T for dy, w in zip(dys, b)], 1)
        wanted = [dx.double() + ds @ a.double()]
        for dy, thin_s, part in zip(dys, s.double().split(ranks, 1), (ds.T @ x.double()).split(ranks)):
            wanted += [part, dy.double().T @ thin_s]
        mine = dx.clone()
        triton_pairs.gradients(x, s, a, b, dys, into, scales, mine)
        found = [mine, *(t for pair in into for t in pair)]
        errors = [float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted)]
        require(max(errors) < 2e-2, f"the Triton kernels are off by {max(errors):.1e} at {n} x {i} -> {o}, {ranks}")

        run = partial(thin.pair_gradients, x, s, a, b, dys, into, scales, mine)
        times = [milliseconds(run, False) / milliseconds(run, True) for _ in range(bench.rounds(7, 3))]
        bench.ratio(f"backward of pairs, torch over Triton: {n} x {i} -> {len(ranks)} x {o}, rank {ranks[0]}", times)


def milliseconds(run: Callable[[], Any], by_triton: bool) -> float:
    """Of one run, by the GPU's own clock."""
    os.environ["LORAKIT_TRITON"] = "1" if by_triton else "0"
    try:
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 20
    finally:
        os.environ.pop("LORAKIT_TRITON")


def attention(bench: Bench, device: torch.device) -> None:
    """Packed attention and its gradients against one text at a time in float64."""
    from lorakit.device import has_varlen
    from lorakit.kernels.segments import Scores, segment_attention

    bench.fact("attention over packed texts in one call", has_varlen(device))
    starts = torch.tensor([0, 5, 6, 134, 500])
    for scores in (Scores(0.125), Scores(0.125, causal=True), Scores(0.125, causal=True, window=9)):
        q, k, v = (
            torch.randn(heads, 500, 64, device=device).to(torch.bfloat16).requires_grad_() for heads in (8, 2, 2)
        )
        y = segment_attention(q, k, v, starts, scores)
        dy = torch.randn_like(y)
        found = [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]
        exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
        whole = segment_attention(*exact, starts, scores)
        wanted = [whole.detach(), *torch.autograd.grad(whole, exact, dy.cpu().double())]
        errors = [float((f.cpu().double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted)]
        require(max(errors) < 3e-2, f"packed attention is off by {max(errors):.1e} with {scores}")


def same_losses(bench: Bench, device: str, shape: list[int] | None = None) -> None:
    """A few steps there and on the CPU in float32."""
    shape = shape or [4, 256]
    wishes: dict[str, dict[str, Any]] = {
        "the CPU, fp32": {"device": "cpu", "dtype": "fp32"},
        "fp32": {"device": device, "dtype": "fp32"},
        "bf16": {"device": device},
    }
    losses: dict[str, list[float]] = {}
    for name, wish in wishes.items():
        side = Side(OURS, shape, **{"made_on": "cpu", **wish})
        answer = side.run(6)
        side.close()
        require(answer is not None, f"lorakit fails on {name}: {side.why}")
        losses[name] = answer["losses"]  # type: ignore[index]
    right = losses.pop("the CPU, fp32")
    for name, bound in (("fp32", 2e-4), ("bf16", 1e-2)):
        error = max(abs(a - b) / b for a, b in zip(losses[name], right))
        bench.fact(f"largest distance of six losses from the CPU's, {name}", f"{error:.1e}")
        require(error < bound, f"losses in {name} are off by {error:.1e}: {losses[name]} for {right}")


def race(bench: Bench, name: str, shape: list[int], device: str, turns: int, steps: int, began: float) -> None:
    """One base: all sides in turn."""
    sides = {side: Side(side, shape, device) for side, (needs, _) in SIDES.items() if _there(needs)}
    for side in sides.values():
        side.run(3)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, int] = {}
    for turn in range(turns):
        if turn and time.perf_counter() - began > LAST_TURN_S:
            bench.note(f"{name}: {turn} turns, for the time is up")
            break
        for side in list(sides) if turn % 2 else list(reversed(sides)):
            answer = sides[side].run(steps)
            if answer is not None:
                rates[side].append(answer["tokens"] / answer["seconds"])
                peaks[side] = answer["peak"]
    for side, process in sides.items():
        process.close()
        if process.why:
            bench.fact(f"{name}, {side} failed", process.why)
    require(not sides[OURS].why, f"lorakit failed on {name}: {sides[OURS].why}")
    for side in sides:
        if side == OURS or sides[side].why:
            continue
        bench.ratio(f"{name} vs {side}", [a / b for a, b in zip(rates[OURS], rates[side])])
        if peaks[OURS]:
            bench.ratio(f"{name} peak memory vs {side}", [peaks[side] / peaks[OURS]])
    for side, found in rates.items():
        if found:
            bench.fact(f"{name} tokens/s, {side}", round(statistics.median(found)))
            bench.fact(f"{name} peak MiB, {side}", round(peaks[side] / 2**20))


def _there(needs: str) -> bool:
    return needs == OURS or importlib.util.find_spec(needs) is not None


def require(right: bool, told: str) -> None:
    """Ends the program where something is not right: a wrong result has no speed."""
    if not right:
        raise SystemExit(f"not measured: {told}")


def main() -> None:
    """Checks, then races."""
    bench = Bench(__doc__ or "")
    if not torch.cuda.is_available():
        bench.note("no CUDA here: nothing was measured")
        if bench.json:
            print(json.dumps({"measured": False, "why": "no CUDA here"}))
        return
    from lorakit.device import gpus

    began, device = time.perf_counter(), torch.device("cuda", 0)
    bench.fact("GPU", gpus()[0])
    kernels(bench, device)
    attention(bench, device)
    same_losses(bench, "cuda")
    for name, shape in BASES.items():
        race(bench, name, shape, "cuda", bench.rounds(7, 3), bench.rounds(20, 8), began)
    bench.done()


if __name__ == "__main__":
    main()
