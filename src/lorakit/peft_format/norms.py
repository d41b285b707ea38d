"""PEFT's LN_TUNING: normalisation layers that learn whole, without any low-rank layer.

A file holds the learned values themselves, `<layer>.ln_tuning_layers.weight` and `.bias`. PEFT takes any layer there.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakit.errors import AdapterError, listed
from lorakit.peft_format.names import PREFIX, NoTwinError

TYPE = "LN_TUNING"
_INFIX = ".ln_tuning_layers."


def encode(trained: Mapping[str, Tensor], base_name: str, kept: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Tensors and configuration. NoTwinError where it is not norms alone that learn."""
    parts = {name: name.rpartition(".") for name in trained}
    hosts = sorted({host for host, _, _ in parts.values()})
    strange = [
        name
        for name, (host, _, leaf) in parts.items()
        if leaf not in ("weight", "bias") or trained[name].ndim != 1 or f"{host}.weight" not in trained or not host
    ]
    if strange or not trained:
        what = f", and '{strange[0]}' is none" if strange else ""
        raise NoTwinError(f"without low-rank layers PEFT has only norms that learn{what}")
    config = {
        "peft_type": TYPE,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "task_type": kept.get("task_type"),
        "target_modules": "|".join(re.escape(host) for host in hosts),
        "modules_to_save": None,
    }
    return {f"{PREFIX}{host}{_INFIX}{leaf}": trained[name] for name, (host, _, leaf) in parts.items()}, config


def decode(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Parameter -> its learned value. AdapterError names every tensor that is none."""
    found: dict[str, Tensor] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        host, infix, leaf = key.removeprefix(PREFIX).partition(_INFIX)
        if key.startswith(PREFIX) and infix and tensor.is_floating_point():
            found[f"{host}.{leaf}"] = tensor
        else:
            faults.append(f"unknown tensor '{key}' {tuple(tensor.shape)}")
    if faults or not found:
        raise AdapterError(f"{source}: {listed(faults or ['no tensor in the file'])}")
    return found
