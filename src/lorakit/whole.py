"""What learns whole, beside low-rank layers or instead of them: names and words -> parameters.

- "*": every parameter of the model.
- "norms": weights and biases of all normalisation layers (Zhao et al., 2023, "Tuning LayerNorm in attention").
- "blocks last 2", "blocks 0-3": all of these blocks of the stack, the rest stays frozen.
- "re:REGEX": parameters whose whole name fits.
- else the name of a module or a parameter.

Biases alone (Ben Zaken et al., 2021, BitFit) are `bias="all"` with `layers="none"`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from lorakit.describe import block_of, describe, locate, walk
from lorakit.errors import PlanError, listed, nearest
from lorakit.kinds import kind_of
from lorakit.kinds.parameter import bias_name
from lorakit.plan import LayerPlan
from lorakit.update import LayerSpec


def resolve_trained(model: nn.Module, trained: Iterable[str]) -> dict[str, nn.Parameter]:
    """Names of modules or parameters, or words for them (see the module), -> the parameters themselves."""
    trained = tuple(trained)
    if not trained:
        return {}
    everything = {
        f"{path}.{name}" if path else name: parameter
        for path, module in walk(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    chosen: dict[str, nn.Parameter] = {}
    faults: list[str] = []
    for wanted in trained:
        try:
            names = _named(model, wanted, everything)
        except PlanError as error:
            faults.append(str(error))
            continue
        found = {name: everything[name] for name in names}
        if not found:
            modules = {path for path, _ in walk(model)}
            faults.append(
                f"trained '{wanted}' is neither a module nor a parameter"
                f"{nearest(wanted, {*modules, *everything, 'norms'})}"
            )
        integers = [name for name, parameter in found.items() if not parameter.is_floating_point()]
        if integers:
            faults.append(f"trained '{wanted}': '{integers[0]}' is not a floating-point parameter and cannot learn")
        chosen |= found
    if faults:
        raise PlanError(f"{type(model).__name__}: {listed(faults)}")
    return chosen


def _named(model: nn.Module, wanted: str, everything: Mapping[str, nn.Parameter]) -> list[str]:
    if wanted == "norms":
        norms = tuple(f"{path}." for path in _norms(model))
        return [name for name in everything if name.startswith(norms)]
    if wanted.startswith("blocks "):
        specs = describe(model)
        inside = blocks_of(wanted.removeprefix("blocks "), specs) or set()
        return [name for name in everything if block_of(name) in inside]
    if wanted.startswith("re:"):
        try:
            pattern = re.compile(wanted.removeprefix("re:"))
        except re.error as error:
            raise PlanError(f"trained '{wanted}' is not a regular expression: {error}") from None
        return [name for name in everything if pattern.fullmatch(name)]
    return [name for name in everything if wanted == "*" or name == wanted or name.startswith(wanted + ".")]


def _norms(model: nn.Module) -> Iterator[str]:
    """Layers of their own whose weight is one vector."""
    for path, module in walk(model):
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 1 and path and kind_of(module) is None:
            yield path


def biases(model: nn.Module, entries: Mapping[str, LayerPlan], bias: str) -> tuple[str, ...]:
    """Names of the biases that a plan lets learn: "none", those of its layers ("adapted"), or "all"."""
    if bias == "none":
        return ()
    places = (locate(model, path) for path in entries)
    adapted = {(id(place.module), bias_name(place.module, place.parameter)) for place in places if place is not None}
    names = [
        f"{path}.{name}" if path else name
        for path, module in walk(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and "bias" in name and (bias == "all" or (id(module), name) in adapted)
    ]
    if not names:
        raise PlanError(f"bias is {bias!r}, and the chosen layers have none")
    return tuple(names)


def blocks_of(blocks: str | Iterable[int] | None, specs: Sequence[LayerSpec]) -> set[int] | None:
    """Indices of blocks from "0-3", "4-", "last 2", "1,5" or a list; None for all."""
    if blocks is None:
        return None
    present = {spec.block for spec in specs if spec.block is not None}
    top = max(present, default=-1)
    if not isinstance(blocks, str):
        chosen = set(blocks)
    elif match := re.fullmatch(r"\s*last\s+(\d+)\s*", blocks):
        chosen = set(range(top + 1 - int(match[1]), top + 1))
    elif match := re.fullmatch(r"\s*(\d+)?\s*-\s*(\d+)?\s*", blocks):
        chosen = set(range(int(match[1] or 0), int(match[2]) + 1 if match[2] else top + 1))
    elif re.fullmatch(r"[\d,\s]+", blocks):
        chosen = {int(part) for part in blocks.split(",") if part.strip()}
    else:
        raise PlanError(f'blocks {blocks!r} is not understood; use "0-3", "4-", "last 2" or "1,5"')
    if not chosen or min(chosen) < 0 or max(chosen) > top:
        has = f"blocks 0 to {top}" if present else "no blocks"
        raise PlanError(f"blocks {blocks!r}: the model has {has}")
    return chosen
