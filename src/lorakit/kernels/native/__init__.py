"""Our C functions: compiled once on this machine, with its own compiler and for its own processor, kept in a cache.

`library()` gives them, or None where there is no compiler (or `LORAKIT_NATIVE=0` says so): whoever calls has a way in
plain torch besides. They run on torch's own threads: torch's OpenMP library is loaded already, and its symbols are the
first that the linker finds.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lorakit.cache import cache_folder

_SOURCES = (
    "lanes.h",
    "threads.h",
    "strips.h",
    "segments.c",
    "labels.c",
    "rows.c",
    "gains.c",
    "thin.c",
    "maps.c",
    "pairs.c",
    "codes.c",
)
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")
_TRIES = (("-fopenmp",), ())  # without OpenMP: one thread


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None."""
    return _loaded()[0]


def takes(x: Tensor) -> bool:
    """They are there, and take a tensor of this dtype and device."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and library() is not None


def place(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, as C takes it; no place for none."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def reason() -> str:
    """Why there are none; "" if they are there."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LORAKIT_NATIVE", "1") == "0":
        return None, "switched off by LORAKIT_NATIVE=0"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) was found"
    texts = {name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in _SOURCES}
    try:
        return ctypes.CDLL(str(_built(texts, compiler))), ""
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, subprocess.CalledProcessError):
            last = (error.stderr or "").strip().splitlines()[-1:]
            return None, f"{compiler} could not build them: {''.join(last) or f'it ended with code {error.returncode}'}"
        return None, f"{compiler} could not build them: {error}"


def _built(texts: dict[str, str], compiler: str) -> Path:
    """The shared library for these texts, compiler and processor; built if it is not in the cache."""
    key = hashlib.sha256("\n".join([*texts.values(), compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:24]
    folder = cache_folder()
    target = folder / f"{key}.so"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "lorakit.so"
        for name, text in texts.items():
            (Path(work) / name).write_text(text, encoding="utf-8")
        sources = [str(Path(work) / name) for name in texts if name.endswith(".c")]
        for number, extra in enumerate(_TRIES, 1):
            command = [*compiler.split(), *_FLAGS, *extra, *sources, "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=number == len(_TRIES))
            if done.returncode == 0:
                break
        os.replace(made, target)
    return target


def _processor() -> str:
    """What `-march=native` would see: a home directory may be shared by unlike machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            lines = [line for line in stream if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "".join(dict.fromkeys(lines))
    except OSError:
        return platform.processor() + platform.machine()
