"""What attach leaves on a model: a switch held once, a slot on every adapted layer, factors in the slot.

`layer.adapters` is a `Slot`; its children are the `Factors` of each named adapter, so that `.to()`, optimizers, FSDP
and Trainer see them as `....layer.adapters.<name>.a`. A bare parameter has its slot beside it, as
`adapters_<parameter>`; a fully trained parameter has a `Trained` child `trained_<parameter>`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import AttachError
from lorakit.kernels.norms import row_squares
from lorakit.kernels.products import Coded
from lorakit.kinds import Kind
from lorakit.method import Method
from lorakit.update import AdaptedLayer, Update

_HOME = "lorakit_switch"


class Switch:
    """Which of the attached adapters are active: one small list for the whole model.

    `active` is what a forward pass reads: the active names, or none while disabled. `names` maps every attached
    adapter to its paths; `frozen` remembers which base parameters required a gradient before training began.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.names: dict[str, tuple[str, ...]] = {}
        self.trained: dict[str, tuple[str, ...]] = {}
        self.meta: dict[str, Mapping[str, Any]] = {}
        self.frozen: set[str] | None = None
        self.seen: set[str] | None = None  # paths whose update ran; recorded only while probing
        self.inputs: list[tuple[Any, Tensor]] | None = None  # (slot, input) of fused calls; recorded only on request
        self.merged: Any = None
        self.prompts: Any = None  # attach/prompts.py: those of all attached adapters
        self.nested: dict[str, bool] = {}  # nn.TransformerEncoder paths whose nested-tensor path was switched off


_PLAIN = {name: value for name, value in nn.Module().__dict__.items() if not isinstance(value, dict | set)}
_EMPTY = [(name, type(value)) for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set)]


def _begin(module: nn.Module, **own: Any) -> None:
    """What `nn.Module.__init__` does, and our own attributes, written straight into `__dict__`.

    Its checked `__setattr__`, attribute by attribute, would cost as much as all the rest of attaching.
    """
    state = module.__dict__
    state.update(_PLAIN)
    for name, kind in _EMPTY:
        state[name] = kind()
    state.update(own)


class Pair(NamedTuple):
    """`a (r, i)`, `b (o, r)`, what multiplies them, and what multiplies the output `(o,)`, bias left out; None: 1."""

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None


class Factors(nn.Module):
    """The named tensors of one adapter on one layer. Frozen ones are buffers.

    A factor that several layers share belongs to the first of them; `lent` tells the others where it is: a parameter
    registered twice is one that Transformers refuses to save.
    """

    method: Method
    scale: float
    rank: int
    start: str
    lent: dict[str, tuple["Factors", str]]
    cached: tuple[Any, Update, list[Tensor]] | None
    made: Update | None  # attach/once.py: the update as it was made once for a step
    stands: bool  # it is taken in the place of the factors' own, gradients and all
    added_by_lorakit = True

    def __init__(
        self,
        method: Method,
        layer: AdaptedLayer,
        factors: Mapping[str, Tensor],
        derived: Mapping[str, Tensor],
        lent: Mapping[str, tuple["Factors", str]],
        trainable: bool,
        training: bool,
    ) -> None:
        own = {
            "scale": layer.scale,
            "rank": layer.rank,
            "start": layer.start,
            "lent": dict(lent),
            "cached": None,
            "made": None,
            "stands": False,
        }
        _begin(self, method=method, training=training, **own)
        for name, factor in factors.items():
            if name in method.frozen:
                self._buffers[name] = factor
            else:
                self._parameters[name] = nn.Parameter(factor, requires_grad=trainable)
        self._buffers.update(derived)
        self._non_persistent_buffers_set.update(derived)

    def tensors(self) -> dict[str, Tensor]:
        """Factor name -> tensor, with what the method has derived from them."""
        found: dict[str, Tensor] = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        if self._buffers:
            found |= {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        for name, (lender, theirs) in self.lent.items():
            found[name] = lender._parameters[theirs]  # type: ignore[assignment]
        return found

    def kept(self) -> dict[str, Tensor]:
        """The factors themselves: what an adapter holds."""
        return {name: x for name, x in self.tensors().items() if name not in self._non_persistent_buffers_set}

    def update(self, weight: "WeightReader") -> Update:
        """The update now. What has to be computed is kept between calls that need no gradient.

        It is made anew when the version or the memory of a tensor has changed, and after every `train()`, `eval()` or
        call that needs gradients: writes through `tensor.data` and by FSDP leave the version as it is.
        """
        if torch.compiler.is_compiling():
            return self.method.update(self.tensors(), self.scale, weight)
        if self.made is not None and (self.stands or not torch.is_grad_enabled()):
            return self.made
        tensors = self.tensors()
        if self.method.plain:
            return self.method.update(tensors, self.scale, weight)
        read = [*tensors.values(), weight.stored()]
        stamps = None if torch.is_grad_enabled() else [(self.scale,), *map(_stamp, read)]
        if stamps is None or None in stamps:
            self.cached = None
            return self.method.update(tensors, self.scale, weight)
        if self.cached is None or self.cached[0] != stamps:
            held = [tensor.detach() for tensor in read]  # keeps their memory, so that no other tensor gets the address
            self.cached = (stamps, self.method.update(tensors, self.scale, weight), held)
        return self.cached[1]

    @property
    def is_plain(self) -> bool:
        """The factors are a pair, as the products read it, and nothing else."""
        return self.method.plain and len(self.tensors()) == 2

    def pair(self, weight: "WeightReader") -> Pair | None:
        """The pair that the products read, and its gain, where the update is nothing else; None where it is more."""
        if self.method.plain:
            tensors = self.tensors()
            if len(tensors) == 2:
                return Pair(tensors["a"], tensors["b"], self.scale)
        update = self.update(weight)
        a, b = update.a, update.b
        more = update.dense is not None or update.gain_in is not None or update.bias is not None
        if more or a is None or b is None or update.gain_covers_bias or not update.is_linear:
            return None
        return Pair(a, b, update.scale, update.gain)

    def train(self, mode: bool = True) -> "Factors":
        self.cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None, "made": None, "stands": False}  # of use only where it was made

    def extra_repr(self) -> str:
        return f"{self.method.name}, rank={self.rank}, scale={self.scale:g}"


def _stamp(tensor: Tensor) -> tuple[float, ...] | None:
    """Changes when the tensor does; None where it cannot be told."""
    try:
        return id(tensor), tensor._version, tensor.data_ptr()
    except RuntimeError:  # inference tensors have no version, those of torch.func no address
        return None


class Slot(nn.Module):
    """All adapters of one weight: name -> Factors."""

    path: str
    parameter: str
    kind: Kind
    drive: str
    switch: Switch
    owner: nn.Module
    group: Any  # attach/groups.py: the layers it runs with, while a trunk has put it among them
    added_by_lorakit = True

    def __init__(self, path: str, parameter: str, kind: Kind, drive: str, switch: Switch, owner: nn.Module) -> None:
        _begin(self, path=path, parameter=parameter, kind=kind, drive=drive, switch=switch, owner=owner, group=None)

    def active(self) -> list[Factors]:
        """Factors of the active adapters that reach this layer, in the order of activation."""
        switch, modules = self.switch, self._modules
        found = [modules[name] for name in switch.active if name in modules]
        if switch.seen is not None and found:
            switch.seen.add(self.path)
        return found  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"drive={self.drive}"


class Trained(nn.Module):
    """Whole parameters in the place of one base parameter: adapter name -> parameter.

    Where the base has one tensor in several places (tied weights), one place owns the stand-in and `lent` tells the
    others whose they read: a parameter registered twice is one that Transformers refuses to save.
    """

    added_by_lorakit = True

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.lent: dict[str, Trained] = {}

    def parameter(self, name: str) -> nn.Parameter | None:
        """The stand-in of this adapter, its own or another's."""
        return self.lent.get(name, self)._parameters.get(name)

    def active(self) -> nn.Parameter | None:
        """The parameter that stands in now, if any."""
        for name in self.switch.active:
            parameter = self.parameter(name)
            if parameter is not None:
                return parameter
        return None


class WeightReader:
    """Reads a layer's canonical weight as it stands in this forward pass (a trained stand-in included)."""

    __slots__ = ("kind", "module", "parameter")

    def __init__(self, module: nn.Module, parameter: str, kind: Kind) -> None:
        self.module = module
        self.parameter = parameter
        self.kind = kind

    def stored(self) -> Tensor:
        """The tensor as the layer keeps it."""
        shadow = self.module.__dict__.get(self.parameter)
        if shadow is not None:
            return shadow  # type: ignore[no-any-return]
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    def __call__(self) -> Tensor:
        return self.kind.canonical(self.module, self.stored())

    def row_squares(self) -> Tensor:
        """`|w|^2` of every row `(.., o)`."""
        return row_squares(self())

    def operand(self) -> Tensor | Coded:
        """The weight as products take it."""
        return self.kind.operand(self.module, self.stored())

    @property
    def shape(self) -> tuple[int, ...]:
        """`(.., o, i)`."""
        return tuple(self.operand().shape)


def slot_name(parameter: str) -> str:
    """Name of the child that holds the slot of a parameter."""
    return "adapters" if parameter in ("weight", "W_q") else f"adapters_{parameter}"


def find_home(model: nn.Module) -> nn.Module | None:
    """The module that adapters were attached to: the model, or the one inside its wrappers (DDP, torch.compile).

    None if nothing was attached. AttachError where only a part of the model has adapters, or the model is itself a
    part of one that has: their layer paths begin elsewhere.
    """
    candidate: nn.Module | None = model
    while candidate is not None:
        if _HOME in candidate.__dict__:
            return candidate
        children = candidate._modules
        candidate = children.get("module", children.get("_orig_mod")) if len(children) == 1 else None
    if any(isinstance(module, Slot | Trained) for module in model.modules()):
        raise AttachError(
            f"adapters were attached to another module: this {type(model).__name__} is a part of that, or it of this; "
            "call with the module that they were attached to"
        )
    return None


def home_of(model: nn.Module) -> tuple[nn.Module, Switch]:
    """The module that adapters were attached to, and its switch; AttachError if nothing was attached."""
    home = find_home(model)
    if home is None:
        raise AttachError(f"no adapter is attached to this {type(model).__name__}; attach one first")
    return home, home.__dict__[_HOME]


def switch_of(model: nn.Module) -> Switch:
    """The switch of a model; AttachError if nothing was attached."""
    return home_of(model)[1]


def make_switch(model: nn.Module) -> Switch:
    """The switch of a model, made if there is none."""
    switch: Switch = model.__dict__.setdefault(_HOME, Switch())
    return switch


def refuse_merged(switch: Switch) -> None:
    """AttachError while `merge(keep=True)` has adapters in the base weights."""
    if switch.merged is not None:
        raise AttachError("adapters are merged into this model; unmerge it first")


def drop_switch(model: nn.Module) -> None:
    """Forgets the switch."""
    model.__dict__.pop(_HOME, None)


class StandIn(NamedTuple):
    """Where a whole parameter is trained: the module that has it, the base parameter, its stand-ins."""

    holder: nn.Module
    base: nn.Parameter
    trained: Trained


def stand_in(model: nn.Module, full_name: str) -> StandIn:
    """The place of a parameter that is trained fully."""
    host, _, leaf = full_name.rpartition(".")
    holder = model.get_submodule(host)
    return StandIn(holder, holder._parameters[leaf], holder._modules[f"trained_{leaf}"])  # type: ignore[arg-type]


def slots_of(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[nn.Module, str, Slot]]:
    """Module, parameter name and slot of every given layer path, at the cost of the paths alone."""
    for path in paths:
        try:
            module = model.get_submodule(path)
            slot = module._modules.get("adapters")
            parameter = slot.parameter if isinstance(slot, Slot) else ""
        except AttributeError:
            host, _, parameter = path.rpartition(".")
            module = model.get_submodule(host)
            slot = module._modules.get(slot_name(parameter))
        if isinstance(slot, Slot):
            yield module, parameter, slot
