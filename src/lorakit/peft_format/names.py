"""Where PEFT's wrappers put things: layer paths and parameter names <-> module paths inside a PEFT model.

Every key on disk is `base_model.model.` + module path + leaf. A wrapped module stands under `.base_layer` of its
wrapper. An `nn.MultiheadAttention` is wrapped together with its `out_proj`, and only together. Adapted bare parameters
(PEFT's target_parameters) wrap their module one around the other, the first registered one innermost, and their names
are not in the keys. Read from peft 0.21.2 (tuners/tuners_utils.py, tuners/lora/layer.py).
"""

import re
from collections.abc import Collection, Iterable, Mapping

from lorakit.errors import AdapterError
from lorakit.update import AdaptedLayer

PREFIX = "base_model.model."
_INNER = ".base_layer"
# how models register the weights of their experts: every such class in transformers 5.23 follows one of the first three
_ORDERS = (("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj"), ("w1", "v1", "w2"), ("wi", "wo"))
_OWN_READER = re.compile(r"in_proj_weight|[qkv]_proj_weight|weight_[ih][hr]_l\d+(_reverse)?")


class NoTwinError(Exception):
    """Why PEFT has no twin of an adapter. Never leaves the package: such an adapter is written under our own names."""


def attention_hosts(paths: Collection[str]) -> set[str]:
    """Paths of the nn.MultiheadAttention modules of which both projections are adapted."""
    hosts = {path.removesuffix(".in_proj_weight") for path in paths if path.endswith(".in_proj_weight")}
    return {host for host in hosts if f"{host}.out_proj" in paths}


def attention_host(path: str, hosts: Collection[str]) -> str | None:
    """The attention module that this layer is a projection of; None if it is of none."""
    host, _, leaf = path.rpartition(".")
    return host if host in hosts and leaf in ("in_proj_weight", "out_proj") else None


def in_registration_order(names: Iterable[str]) -> list[str] | None:
    """Parameters of one module in the order in which models register them; None where their names do not tell."""
    wanted = sorted(set(names))
    if len(wanted) < 2:
        return wanted
    order = next((order for order in _ORDERS if set(wanted) <= set(order)), None)
    return None if order is None else sorted(wanted, key=order.index)


class Wrapped:
    """The wrappers that PEFT needs for these layers. Raises NoTwinError where it has none.

    `hosts`: the attention modules; `modules`: layers that are modules; `parameters`: module path -> its adapted bare
    parameters in the order of registration; `depth`: module path -> how many wrappers stand around it.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer]) -> None:
        self.hosts = attention_hosts(layers)
        self.modules = [path for path, layer in layers.items() if layer.kind != "parameter"]
        self.parameters: dict[str, list[str]] = {}
        for path, layer in layers.items():
            host, _, name = path.rpartition(".")
            if layer.kind == "parameter" and host not in self.hosts:
                if not host or _OWN_READER.fullmatch(name):
                    raise NoTwinError(f"'{path}' is a weight that PEFT cannot reach alone")
                self.parameters.setdefault(host, []).append(name)
            if layer.peculiar and not attention_host(path, self.hosts):
                raise NoTwinError(f"PEFT cannot say what is peculiar about '{path}': {layer.peculiar}")
        for host, names in self.parameters.items():
            order = in_registration_order(names)
            if order is None or host in self.modules:
                raise NoTwinError(f"PEFT's keys cannot tell {', '.join(names)} of '{host}' apart")
            self.parameters[host] = order
        if "" in self.modules or "" in self.hosts:
            raise NoTwinError("the adapted layer is the whole model, which PEFT cannot wrap")
        self.depth = dict.fromkeys([*self.modules, *self.hosts], 1)
        self.depth |= {host: len(names) for host, names in self.parameters.items()}

    def inside(self, name: str) -> str:
        """Name of a module or parameter of the original model within the wrapped one."""
        path, *parts = name.split(".")
        result = path
        for part in parts:
            result += _INNER * self.depth.get(path, 0) + f".{part}"
            path += f".{part}"
        return result

    def module_of(self, path: str) -> str:
        """Path of the wrapper that holds this layer's factors."""
        host, _, name = path.rpartition(".")
        if name == "in_proj_weight" and host in self.hosts:
            return self.inside(host)
        order = self.parameters.get(host, [])
        if name in order:
            return self.inside(host) + _INNER * (len(order) - 1 - order.index(name))
        return self.inside(path)

    def pattern_key(self, path: str) -> str:
        """The name by which PEFT looks a layer up in rank_pattern and alpha_pattern."""
        return attention_host(path, self.hosts) or path

    @property
    def target_modules(self) -> list[str]:
        """Modules that PEFT must wrap for their own sake."""
        return sorted([*(path for path in self.modules if not attention_host(path, self.hosts)), *self.hosts])

    @property
    def target_parameters(self) -> list[str]:
        """Bare parameters that PEFT must wrap."""
        return sorted(f"{host}.{name}" for host, names in self.parameters.items() for name in names)


def original(name: str) -> str:
    """A module or parameter name without PEFT's wrappers."""
    return name.replace(_INNER, "")


def wrapped_parameter(wrapper: str, n_wrappers: int, target_parameters: Iterable[str]) -> str | None:
    """The bare parameter whose factors a wrapper holds, where only the file and target_parameters are known.

    None where the wrapper is that of a module. `n_wrappers` stand around the same module. Raises AdapterError where
    nothing tells which parameter it is.
    """
    path = original(wrapper)
    names: set[str] = set()
    for target in target_parameters:
        host, _, name = target.rpartition(".")
        if not host or path == host or path.endswith(f".{host}"):
            names.add(name)
    if n_wrappers == 1 and not names:
        return None
    order = in_registration_order(names)
    if order is None or len(order) != n_wrappers:
        raise AdapterError(
            f"'{path}' has {n_wrappers} wrapped parameters, and target_parameters names "
            f"{', '.join(sorted(names)) or 'none'} there; the file does not say which is which"
        )
    bare = wrapper
    while bare.endswith(_INNER):
        bare = bare.removesuffix(_INNER)
    return f"{path}.{order[n_wrappers - 1 - wrapper.removeprefix(bare).count(_INNER)]}"
