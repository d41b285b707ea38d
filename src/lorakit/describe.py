"""Looks at a model and says what can be adapted: LayerSpecs. Changes nothing.

Roles are read off the last parts of the layer path, as the common architectures name them: q k v qkv o (attention),
up gate down (MLP), embedding, head, pooler, conv, other. A block is the first number in the path. Patterns are always
taken from the live model: the same architecture has other names in other versions of its library.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.kinds import KINDS, Kind, kind_of
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
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


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

    @property
    def numbers(self) -> Tensor:
        """A plain tensor by which the weight can be told from others."""
        return self.kind.numbers(self.module, self.weight)


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
        parameter = kind.parameter if kind is not None else parameter
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
    role = role_of(path, kind.family or kind.name)
    bare = kind.name == "parameter"
    if bare and isinstance(module, nn.RNNBase):
        role = "recurrent"
    elif bare and len(shapes.shape) == 3 and 1 < shapes.shape[0] == getattr(module, "num_experts", None):
        role = "experts" if role == "other" else role
    called = not bare and owner_of(model, module, path) is module
    peculiar = shapes.peculiar or ("" if bare or called else "its weight is read without a call")
    return LayerSpec(
        path, kind.family or kind.name, *shapes[:4], role, block_of(path), shapes.has_bias, called, tied, peculiar
    )


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
            found.append((module, kind.parameter, kind, path))
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
