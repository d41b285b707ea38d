"""Looks at a model and says what can be adapted (LayerSpecs), and turns rules into a Plan. Changes nothing.

Roles are read off the last parts of the layer path, as the common architectures name them: q k v qkv o (attention),
up gate down (MLP), embedding, head, pooler, conv, other. A block is the first number in the path. Patterns are always
taken from the live model: the same architecture has other names in other versions of its library.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from lorakit.errors import PlanError, listed, nearest
from lorakit.kinds import KINDS, Kind, kind_of
from lorakit.kinds.parameter import bias_name
from lorakit.method import METHODS, STARTS, check_plan
from lorakit.plan import LayerPlan, Plan
from lorakit.update import LayerSpec

_ROLES: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)(lm_head|classifier|pre_classifier|vocab_projector|predictions\.decoder|score|qa_outputs|head|proj_out|logits_proj|output_projection)(\.\w+)?$",
        "head",
    ),
    (r"(^|\.)pooler\.", "pooler"),
    (r"(^|\.)(c_attn|query_key_value|qkv|qkv_proj|wqkv|in_proj_weight|in_proj)$", "qkv"),
    (r"(^|\.)(query|q_proj|q_lin|wq|to_q|q|q_proj_weight)$", "q"),
    (r"(^|\.)(key|k_proj|k_lin|wk|to_k|k|k_proj_weight)$", "k"),
    (r"(^|\.)(value|v_proj|v_lin|wv|to_v|v|v_proj_weight)$", "v"),
    (r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.(output\.dense|c_proj|proj|dense|wo)$", "o"),
    (r"(^|\.)(o_proj|out_proj|out_lin|to_out\.0|o)$", "o"),
    (r"(^|\.)(gate_proj|w1|wi_0)$", "gate"),
    (r"(^|\.)(up_proj|gate_up_proj|w3|c_fc|fc1|fc_in|wi|wi_1|lin1|linear1|dense_h_to_4h|intermediate\.dense)$", "up"),
    (r"(^|\.)(down_proj|w2|fc2|fc_out|wo|lin2|linear2|dense_4h_to_h)$", "down"),
    (r"(^|\.)(mlp\.c_proj|output\.dense)$", "down"),
)
GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "qkv", "o"}),
    "attn": frozenset({"q", "k", "v", "qkv", "o"}),
    "mlp": frozenset({"up", "gate", "down"}),
    "embeddings": frozenset({"embedding"}),
}
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_MATRICES = frozenset({"linear", "hf_conv1d", "parameter"})
_BARE_ROLES = frozenset({"experts", "recurrent", "qkv", "q", "k", "v", "up", "gate", "down"})  # in "all-linear"


@lru_cache(maxsize=1 << 16)
def role_of(path: str, kind: str) -> str:
    """What a layer does in its network, by its name."""
    if kind == "embedding":
        return "embedding"
    role = _role_by_name(".".join(path.rsplit(".", 3)[-3:]))
    return role if role != "other" or not kind.startswith("conv") else "conv"


@lru_cache(maxsize=4096)
def _role_by_name(tail: str) -> str:
    return next((role for pattern, role in _ROLES if re.search(pattern, tail, re.IGNORECASE)), "other")


@lru_cache(maxsize=1 << 16)
def block_of(path: str) -> int | None:
    """First number in the path: the index in the stack of layers."""
    match = _NUMBER.search(path)
    return int(match[1]) if match else None


class Found(NamedTuple):
    """A weight in a model: its module, the parameter's name there, the kind, and what is known of it."""

    module: nn.Module
    parameter: str
    kind: Kind
    spec: LayerSpec

    @property
    def weight(self) -> nn.Parameter:
        """The stored parameter."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight


def locate(model: nn.Module, path: str) -> Found | None:
    """The weight at a layer path; None where the model has no such layer.

    Costs the depth of the path, whatever the size of the model.
    """
    module = submodule(model, path)
    parameter = "weight"
    if module is None:
        host, _, parameter = path.rpartition(".")
        module = submodule(model, host)
        if module is None or not _is_bare_matrix(module, parameter):
            return None
        kind: Kind | None = KINDS["parameter"]
    else:
        kind = kind_of(module)
    return None if kind is None else Found(module, parameter, kind, _spec(model, module, parameter, kind, path))


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path; None where there is none."""
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return module


def _spec(
    model: nn.Module, module: nn.Module, parameter: str, kind: Kind, path: str, tied: tuple[str, ...] = ()
) -> LayerSpec:
    shapes = kind.shapes(module, parameter)
    role = role_of(path, kind.name)
    bare = kind.name == "parameter"
    if bare and isinstance(module, nn.RNNBase):
        role = "recurrent"
    elif bare and len(shapes.shape) == 3 and 1 < shapes.shape[0] == getattr(module, "num_experts", None):
        role = "experts" if role == "other" else role
    called = not bare and owner_of(model, module, path) is module
    peculiar = shapes.peculiar or ("" if bare or called else "its weight is read without a call")
    return LayerSpec(path, kind.name, *shapes[:4], role, block_of(path), shapes.has_bias, called, tied, peculiar)


def owner_of(model: nn.Module, module: nn.Module, path: str) -> nn.Module:
    """The module whose call reads the weights of the module at `path`: mostly itself, else one around it.

    `nn.MultiheadAttention` reads its `out_proj` without calling it; `nn.ParameterList` and the like are never called.
    """
    if path.endswith("out_proj"):
        parent = parent_of(model, path)
        if isinstance(parent, nn.MultiheadAttention):
            return parent
    return module if _is_called(module) else parent_of(model, path)


def parent_of(model: nn.Module, path: str) -> nn.Module:
    """The nearest module around the one at `path` that can be called; the model itself at the latest."""
    while path:
        path = path.rpartition(".")[0]
        parent = submodule(model, path)
        if parent is not None and _is_called(parent):
            return parent
    return model


def _is_called(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _is_bare_matrix(module: nn.Module, name: str) -> bool:
    weight = module._parameters.get(name)
    return weight is not None and weight.is_floating_point() and weight.ndim in (2, 3) and kind_of(module) is None


def is_added(module: nn.Module) -> bool:
    """Did attach put this child there? Its classes say so themselves: a model may have children of any name."""
    return getattr(type(module), "added_by_lorakit", False) is True


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, each once, in the model's order, without what attach has added (`is_added`)."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        for name, child in reversed(module._modules.items()):
            if child is not None and not is_added(child):
                stack.append((f"{path}.{name}" if path else name, child))


def describe(model: nn.Module) -> list[LayerSpec]:
    """Every weight of the model that can be adapted, in the model's order.

    `tied` names the other places that share the weight. Bare matrices come as `module.parameter`.
    """
    found: list[tuple[nn.Module, str, Kind, str]] = []
    owners: dict[int, list[str]] = {}
    for path, module in walk(model):
        if not module._parameters:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
        kind = kind_of(module)
        if kind is not None:
            found.append((module, "weight", kind, path))
            continue
        for name in module._parameters:
            if _is_bare_matrix(module, name):
                found.append((module, name, KINDS["parameter"], f"{path}.{name}" if path else name))
    specs = []
    for module, name, kind, path in found:
        shared = owners[id(module._parameters[name])]
        full = path if kind.name == "parameter" else f"{path}.{name}" if path else name
        tied = tuple(other for other in shared if other != full) if len(shared) > 1 else ()
        specs.append(_spec(model, module, name, kind, path, tied))
    return specs


Rules = str | Sequence[str] | Mapping[str, int]


def plan(
    model: nn.Module,
    rank: int = 8,
    layers: Rules = "all-linear",
    *,
    method: str = "lora",
    scale: float | str = "16/r",
    start: str = "kaiming",
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
    `trained`: modules or parameters trained fully. `bias`: "none", "adapted" or "all".
    `clip_rank`: lower the rank where a layer's smaller side demands it, instead of refusing.

    Raises PlanError: unknown pattern, nothing matched, rank above a side; all faults at once.
    """
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
    takes_rank = METHODS[method].takes_rank and STARTS[start] is not None  # unknown names end here, said once
    ready = {
        rank: LayerPlan(method, rank if takes_rank else 0, scale, start if takes_rank else "")
        for rank in set(chosen.values())
    }
    entries = {spec.path: ready[chosen[spec.path]] for spec in specs if spec.path in chosen}
    faults += check_plan({spec.path: spec for spec in specs}, entries)
    if faults:
        raise PlanError(f"{type(model).__name__}: {listed(faults)}")
    result = Plan(entries, tuple(trained) + _biases(model, entries, bias))
    resolve_trained(model, result.trained)
    return result


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
    known = {"all", "all-linear", "all-conv", *GROUPS, *(spec.role for spec in specs)}
    known |= {spec.path.rpartition(".")[2] for spec in specs}
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
    if not chosen & present:
        raise PlanError(f"blocks {blocks!r}: the model has blocks 0 to {top}")
    return chosen


def _biases(model: nn.Module, entries: Mapping[str, LayerPlan], bias: str) -> tuple[str, ...]:
    if bias == "none":
        return ()
    if bias not in ("adapted", "all"):
        raise PlanError(f"bias is {bias!r}; use 'none', 'adapted' or 'all'")
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
