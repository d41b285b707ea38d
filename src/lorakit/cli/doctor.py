"""Say what this machine can do: processors, memory, precisions that pay, accelerators, installed extras.

example: lorakit doctor
"""

import argparse
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorakit._version import __version__
from lorakit.cli import Reply

_EXTRAS = {  # those of pyproject.toml that are for users
    "text": ("transformers", "tqdm"),
    "data": ("pyarrow",),
    "translate": ("sacrebleu", "rouge-score"),
    "harness": ("lm-eval",),
    "image": ("pillow",),
    "digits": ("scikit-learn",),
    "report": ("matplotlib",),
    "gpu": ("triton",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""


def run(args: argparse.Namespace) -> Reply:
    """Looks around and measures one matrix product."""
    import torch

    from lorakit.device import gpus, why_no_gpu
    from lorakit.fit.threads import processors
    from lorakit.kernels.native import reason

    found: dict[str, Any] = {
        "lorakit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": processors(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpus": gpus(),
        "no_gpu": "" if torch.cuda.is_available() else why_no_gpu().removeprefix("and "),
        "gflops": {name: _gflops(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))},
        "kernels": reason() or "compiled here",
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
    }
    found["bf16_speedup"] = round(found["gflops"]["bf16"] / found["gflops"]["fp32"], 2)
    return Reply(_text(found), found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next((line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gflops(dtype: Any, n: int = 768) -> float:
    """Best of a few products of a size that occurs in small models."""
    import torch

    x, y = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        x @ y
        best = min(best, time.perf_counter() - began)
    return round(2 * n**3 / best / 1e9, 1)


def _gpu(one: dict[str, Any]) -> str:
    kernels = f"Triton {one['triton']}" if one["triton"] else "no Triton: torch's operations are used"
    attention = "attention over packed texts" if one["varlen"] else "attention once for each length of texts"
    return (
        f"{one['name']}, {one['memory_gb']} GB, capability {one['capability']}, {one['dtype']}; {kernels}; {attention}"
    )


def _text(found: dict[str, Any]) -> str:
    speeds, gain = found["gflops"], found["bf16_speedup"]
    slow = "" if found["kernels"] == "compiled here" else "; torch's own are used, which train slower"
    verdict = "pays" if gain > 1.2 else "does not pay"
    lines = [
        f"lorakit {found['lorakit']}, torch {found['torch']}, Python {found['python']}",
        f"processor   {found['processor']}, {found['usable_cores']} of {found['cores']} cores usable, "
        f"{found['threads']} threads",
        f"memory      {found['memory_gb']} GB",
        f"precision   fp32 {speeds['fp32']} GFLOP/s, bf16 {speeds['bf16']} GFLOP/s: bf16 {verdict} here ({gain}x)",
        f"kernels     {found['kernels']}{slow}",
        *(f"GPU         {_gpu(one)}" for one in found["gpus"]),
        *([f"GPU         none: {found['no_gpu']}"] if found["no_gpu"] else []),
    ]
    for extra, libraries in found["extras"].items():
        have = ", ".join(f"{name} {number}" for name, number in libraries.items() if number)
        lack = [name for name, number in libraries.items() if not number]
        hint = f"missing {', '.join(lack)}: pip install 'lorakit[{extra}]'" if lack else ""
        lines.append(f"{'[' + extra + ']':<11} {'; '.join(part for part in (have, hint) if part)}")
    return "\n".join(lines)
