"""Which device the work is done on, and what that device can do: the one place that asks.

Everything else follows the tensors it is given. A device is "cpu" or one GPU of CUDA (also ROCm's, which torch calls
so): "cuda:0". What pays on a processor only (functions in C, oneDNN's order of weights, memory kept by the C library)
asks for a tensor on the CPU, and is off elsewhere.
"""

import importlib.util
import os
import re
from functools import cache
from typing import Any

import torch

from lorakit.errors import UsageError, nearest

CPU = torch.device("cpu")
DEVICES = ("auto", "cpu", "cuda")
_FORM = re.compile(r"auto|cpu|cuda(:\d+)?")
_AMPERE = (8, 0)  # the first with bf16 in its matrix units; flash attention and our Triton kernels begin there


def is_device(name: str) -> bool:
    """Whether it is the name of one: auto, cpu, cuda, cuda:1."""
    return bool(_FORM.fullmatch(name))


def resolve_device(name: str, now: torch.device = CPU) -> torch.device:
    """The device of this name. "auto": where the model is `now`, if that is not the CPU; else a GPU, if there is one.

    Of processes that torchrun started on one machine each takes a GPU of its own by "auto" and "cuda"; where there are
    fewer GPUs, they share them. UsageError for a name that is none, or one that is not here.
    """
    if not is_device(name):
        raise UsageError(f"unknown device '{name}'{nearest(name, DEVICES)}; one GPU of several is cuda:1")
    if name == "auto" and now.type != "cpu":
        return now
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UsageError(f"device '{name}' was asked for, {why_no_gpu()}, or take --device cpu")
    n = torch.cuda.device_count()
    local, n_local = (
        int(os.environ.get(key, default)) for key, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if ":" not in name:
        return torch.device("cuda", local % n)
    number = int(name.partition(":")[2])
    if number >= n:
        raise UsageError(f"device '{name}' was asked for, and there are {n} GPUs here: cuda:0 to cuda:{n - 1}")
    if n_local > 1:
        raise UsageError(f"device '{name}' is one GPU for {n_local} processes; --device cuda gives each its own")
    return torch.device("cuda", number)


def why_no_gpu() -> str:
    """Why torch cannot use one, and the way out; a part of a sentence."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"and this torch ({torch.__version__}) was built without CUDA; install a build with it "
            "(https://pytorch.org/get-started/locally)"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    told = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is '{hidden}')"
    return f"and torch finds no GPU{told}; see whether nvidia-smi does, and update the driver"


def backend(device: torch.device) -> str:
    """What processes of one run talk by: NCCL for tensors on GPUs, where each process has one of its own; else gloo."""
    own = device.type == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def fast_dtype(device: torch.device) -> str:
    """ "bf16" where the device multiplies it faster than fp32, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, check, bool)() for check in fast) else "fp32"


def has_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton run there; `LORAKIT_TRITON=0` says no."""
    if device.type != "cuda" or os.environ.get("LORAKIT_TRITON", "1") == "0":
        return False
    return _triton_version() != "" and _is_modern(device.index or 0)


def has_varlen(device: torch.device) -> bool:
    """Whether torch's attention over texts of unlike lengths runs there, gradients and all."""
    return device.type == "cuda" and varlen() is not None and _is_modern(device.index or 0)


@cache
def varlen() -> Any:
    """`varlen_attn` of this torch, or None where there is none with windows and shared heads."""
    try:
        from inspect import signature

        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys() else None


@cache
def _is_modern(number: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(number) >= _AMPERE


@cache
def _triton_version() -> str:
    """The installed one; "" for none."""
    if importlib.util.find_spec("triton") is None:
        return ""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def gpus() -> list[dict[str, Any]]:
    """What is known of each GPU: for `lorakit doctor`."""
    found = []
    for number in range(torch.cuda.device_count()):
        about, device = torch.cuda.get_device_properties(number), torch.device("cuda", number)
        found.append(
            {
                "name": about.name,
                "memory_gb": round(about.total_memory / 1e9, 1),
                "capability": f"{about.major}.{about.minor}",
                "dtype": fast_dtype(device),
                "triton": _triton_version() if has_triton(device) else "",
                "varlen": has_varlen(device),
            }
        )
    return found


def name_of(device: torch.device) -> str:
    """For people: the GPU's name; "" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
