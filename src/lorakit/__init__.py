"""lorakit: low-rank adaptation on the machine you have.

>>> import torch, lorakit as lk
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
>>> paths = lk.attach(model, lk.plan(model, rank=2), seed=0)
>>> adapter = lk.collect(model)
>>> adapter
Adapter(lora, 2 layers, rank 2, 84 numbers, 0.00 MB)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorakit._version import __version__ as __version__

if TYPE_CHECKING:
    from lorakit.adapter import Adapter as Adapter
    from lorakit.adapter import load as load
    from lorakit.algebra.combine import combine as combine
    from lorakit.algebra.compare import compare as compare
    from lorakit.algebra.truncate import truncate as truncate
    from lorakit.attach import activate as activate
    from lorakit.attach import attach as attach  # type: ignore[no-redef]
    from lorakit.attach import collect as collect  # type: ignore[no-redef]
    from lorakit.attach import detach as detach
    from lorakit.attach import disabled as disabled
    from lorakit.attach import init as init
    from lorakit.attach import merge as merge  # type: ignore[no-redef]
    from lorakit.attach import moments as moments  # type: ignore[no-redef]
    from lorakit.attach import probe as probe  # type: ignore[no-redef]
    from lorakit.attach import unmerge as unmerge
    from lorakit.describe import describe as describe
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.fit import evaluate as evaluate
    from lorakit.fit import fit as fit
    from lorakit.fit import predict as predict
    from lorakit.inspect import inspect as inspect
    from lorakit.measure import measure as measure  # type: ignore[no-redef]
    from lorakit.method import Method as Method
    from lorakit.plan import Plan as Plan
    from lorakit.quantize import dequantize as dequantize
    from lorakit.quantize import quantize as quantize  # type: ignore[no-redef]
    from lorakit.rules import plan as plan
    from lorakit.update import Update as Update

_HOMES = {
    "Adapter": "adapter",
    "LorakitError": "errors",
    "Method": "method",
    "Plan": "plan",
    "Update": "update",
    "activate": "attach",
    "attach": "attach",
    "collect": "attach",
    "combine": "algebra.combine",
    "compare": "algebra.compare",
    "dequantize": "quantize",
    "describe": "describe",
    "detach": "attach",
    "disabled": "attach",
    "evaluate": "fit",
    "fit": "fit",
    "init": "attach",
    "inspect": "inspect",
    "load": "adapter",
    "measure": "measure",
    "merge": "attach",
    "moments": "attach",
    "plan": "rules",
    "predict": "fit",
    "probe": "attach",
    "quantize": "quantize",
    "truncate": "algebra.truncate",
    "unmerge": "attach",
}

__all__ = sorted([*_HOMES, "__version__"])


class _Face(ModuleType):
    """Public verbs are imported on first use. A verb may be called like its room (`lorakit.attach` is the function;
    rooms are reached by `from lorakit.attach import ...`), so the import system must not put the room in its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
        value = getattr(import_module(f"lorakit.{_HOMES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Face
