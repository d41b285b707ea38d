"""Rules -> a Plan for one model: which layers, which rank, what is trained fully. Changes nothing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from torch import nn

from lorakit.describe import describe, locate, walk
from lorakit.errors import PlanError, UsageError, listed, nearest
from lorakit.kinds.parameter import bias_name
from lorakit.method import METHODS, STARTS, check_plan, settled
from lorakit.plan import LayerPlan, Plan, resolve_scale
from lorakit.update import LayerSpec

GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "qkv", "o"}),
    "attn": frozenset({"q", "k", "v", "qkv", "o"}),
    "mlp": frozenset({"up", "gate", "down"}),
    "embeddings": frozenset({"embedding"}),
}
_MATRICES = frozenset({"linear", "hf_conv1d", "parameter"})
_BARE_ROLES = frozenset({"experts", "recurrent", "qkv", "q", "k", "v", "up", "gate", "down"})  # in "all-linear"

Rules = str | Sequence[str] | Mapping[str, int]


def plan(
    model: nn.Module,
    rank: int = 8,
    layers: Rules = "all-linear",
    *,
    method: str = "lora",
    scale: float | str | None = None,
    start: str | None = None,
    blocks: str | Iterable[int] | None = None,
    trained: Sequence[str] = (),
    bias: str = "none",
    clip_rank: bool = False,
) -> Plan:
    """Turns rules into a Plan for this model.

    `layers`: "all-linear" (every matrix but heads and embeddings), "all-conv", "all", "attention", "mlp",
    "embeddings", a role ("q", "up", "experts" ...), the end of a layer path, a regular expression for the whole path
    ("re:" before it), a list of these, or a mapping from these to ranks: `{"attention": 8, "mlp": 16}`.
    `blocks`: "0-3", "4-", "last 2" or indices: only these layers of the stack; the others stay frozen.
    `scale` and `start`: the method's own ("16/r" and "kaiming" for lora), if not given.
    `trained`: modules or parameters trained fully. `bias`: "none", "adapted" or "all".
    `clip_rank`: lower the rank where a layer's smaller side demands it, instead of refusing.

    Raises PlanError: unknown pattern, nothing matched, rank above a side; all faults at once.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"plan takes a torch module, not {type(model).__name__}")
    refuse_rules(rank, method, scale, start, bias)
    specs = describe(model)
    wanted = {layers: rank} if isinstance(layers, str) else layers
    ranks = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, rank)
    keep = _blocks(blocks, specs)
    chosen: dict[str, int] = {}
    faults: list[str] = []
    for rule, rule_rank in ranks.items():
        try:
            matched = [spec for spec in specs if matches_rule(spec, rule)]
        except PlanError as error:
            faults.append(str(error))
            continue
        if not matched:
            faults.append(_no_match(rule, specs))
        inside = [spec for spec in matched if keep is None or spec.block in keep]
        if matched and not inside:
            faults.append(f"'{rule}' matches {len(matched)} layers, but none in blocks {sorted(keep or ())}")
        for spec in inside:
            chosen[spec.path] = min(rule_rank, spec.max_rank) if clip_rank else rule_rank
    factor = "" if scale is None else scale
    ready = {rank: settled(LayerPlan(method, rank, factor, start or "")) for rank in set(chosen.values())}
    entries = {spec.path: ready[chosen[spec.path]] for spec in specs if spec.path in chosen}
    faults += check_plan({spec.path: spec for spec in specs}, entries)
    if faults:
        raise PlanError(f"{type(model).__name__}: {listed(faults)}")
    result = Plan(entries, tuple(trained) + _biases(model, entries, bias))
    resolve_trained(model, result.trained)
    return result


def refuse_rules(rank: int, method: str, scale: float | str | None, start: str | None, bias: str) -> None:
    """PlanError or UsageError for what would be refused of any model."""
    known = METHODS[method]  # an unknown name ends here
    if start is not None and STARTS[start] is not None and not known.takes_start:
        raise PlanError(f"method '{method}' begins in its own way; leave start '{start}' out")
    if scale not in (None, known.scale) and not known.takes_scale:
        raise PlanError(f"method '{method}' has no scale; leave scale {scale} out")
    if known.takes_rank and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise PlanError(f"rank is {rank!r}; use a whole number, 1 or more")
    if known.takes_rank and scale is not None:
        resolve_scale(scale, rank)
    if bias not in ("none", "adapted", "all"):
        raise PlanError(f"bias is {bias!r}; use 'none', 'adapted' or 'all'")


def matches_rule(spec: LayerSpec, rule: str) -> bool:
    """Does one rule choose this layer?"""
    bare_other = spec.kind == "parameter" and spec.role not in _BARE_ROLES
    if rule == "all":
        return not bare_other
    if rule == "all-linear":
        return spec.kind in _MATRICES and spec.role != "head" and not bare_other
    if rule == "all-conv":
        return spec.kind.startswith("conv")
    if rule in GROUPS:
        return spec.role in GROUPS[rule] and not bare_other
    if rule.startswith("re:"):
        return _pattern(rule).fullmatch(spec.path) is not None
    if rule == "experts":
        return len(spec.batch) == 1 and spec.batch[0] > 1
    return spec.role == rule or spec.path == rule or spec.path.endswith("." + rule)


@lru_cache(maxsize=256)
def _pattern(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule.removeprefix("re:"))
    except re.error as error:
        raise PlanError(f"'{rule}' is not a regular expression: {error}") from None


def _no_match(rule: str, specs: Sequence[LayerSpec]) -> str:
    if not specs:
        return "the model has no layer that can be adapted"
    if rule == "all-linear":
        kinds = ", ".join(sorted({spec.kind for spec in specs}))
        return f"the model has no matrix but its head; its {len(specs)} layers are of kind {kinds}: use layers='all'"
    known = {"all", "all-conv", *GROUPS, *(spec.role for spec in specs)}
    known |= {spec.path.rpartition(".")[2] for spec in specs}
    known.discard(rule)
    return f"'{rule}' matches none of the {len(specs)} layers{nearest(rule, known)}"


def _blocks(blocks: str | Iterable[int] | None, specs: Sequence[LayerSpec]) -> set[int] | None:
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


def _biases(model: nn.Module, entries: Mapping[str, LayerPlan], bias: str) -> tuple[str, ...]:
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


def resolve_trained(model: nn.Module, trained: Iterable[str]) -> dict[str, nn.Parameter]:
    """Names of modules or parameters -> the parameters themselves. "*" is every parameter of the model."""
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
        found = {
            name: parameter
            for name, parameter in everything.items()
            if wanted == "*" or name == wanted or name.startswith(wanted + ".")
        }
        if not found:
            modules = {path for path, _ in walk(model)}
            faults.append(
                f"trained '{wanted}' is neither a module nor a parameter{nearest(wanted, modules | set(everything))}"
            )
        integers = [name for name, parameter in found.items() if not parameter.is_floating_point()]
        if integers:
            faults.append(f"trained '{wanted}': '{integers[0]}' is not a floating-point parameter and cannot learn")
        chosen |= found
    if faults:
        raise PlanError(f"{type(model).__name__}: {listed(faults)}")
    return chosen
