"""A model's frozen matrices in 8 or 4 bits, in place, and back: what that saves and what it costs.

Quantize before attaching: an adapter then learns on the base as it will be used (QLoRA). What stays in float: heads,
weights that two layers share, layers with a forward of their own, and whatever no rule chooses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.describe import describe, is_added, locate, walk
from lorakit.errors import UsageError, listed, nearest
from lorakit.linalg import relative_error
from lorakit.quant import FORMATS, Format, QuantEmbedding, Quantized, QuantLinear
from lorakit.rules import matches_rule
from lorakit.update import LayerSpec

_NOTE = "lorakit_quantized"  # on a model: the arguments by which it was quantized
_MATRICES = ("linear", "hf_conv1d", "embedding")


@dataclass(frozen=True)
class Cost:
    """One layer: its format, bytes before and after, and `|W' - W| / |W|` (Frobenius)."""

    path: str
    role: str
    form: str
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Costs:
    """What quantizing costs, layer by layer; `kept` are bytes of the model that stay as they are."""

    layers: tuple[Cost, ...]
    kept: int

    @property
    def before(self) -> int:
        """Bytes of the model in float."""
        return self.kept + sum(cost.before for cost in self.layers)

    @property
    def after(self) -> int:
        """Bytes of the quantized model."""
        return self.kept + sum(cost.after for cost in self.layers)

    @property
    def error(self) -> float:
        """Root of the mean squared error of the layers."""
        return float((sum(cost.error**2 for cost in self.layers) / max(1, len(self.layers))) ** 0.5)

    @property
    def worst(self) -> Cost | None:
        """The layer with the largest error."""
        return max(self.layers, key=lambda cost: cost.error, default=None)

    def __str__(self) -> str:
        worst = f", at most {self.worst.error:.1%} ('{self.worst.path}')" if self.worst else ""
        return (
            f"{len(self.layers)} layers, {self.before / 1e6:.1f} -> {self.after / 1e6:.1f} MB "
            f"({self.after / self.before:.0%}), error {self.error:.1%} of the weights{worst}"
        )


def quantize(
    model: nn.Module,
    form: str = "nf4",
    *,
    layers: str = "all-linear",
    embeddings: str = "int8",
    keep: bool = False,
) -> Costs:
    """Replaces the frozen matrices of a model by layers that hold them in few bits; returns what that costs.

    `form` is "int8", "nf4" or "int4", for the layers that the rule `layers` chooses (as in `lorakit.plan`);
    `embeddings` is the format of embedding tables, or "none". Products are computed in the dtype of their input, with
    the weight made anew each time. `keep` holds the float weights beside the codes, for starts that want both
    (loftq, eora), until `forget`.

    Raises UsageError before anything is changed: an unknown format, attached adapters, nothing to quantize, NaN.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    >>> print(lk.quantize(model, "int8").after < 0.3 * 4 * 2 * 64 * 128)
    True
    """
    chosen = _chosen(model, form, layers, embeddings)
    broken = [f"'{path}'" for path, choice in chosen.items() if not bool(torch.isfinite(_weight(choice.module)).all())]
    if broken:
        raise UsageError(f"NaN or infinite numbers in the weights of {listed(broken)}")
    hosts = _hosts(model)

    def put(old: nn.Module, held: Quantized) -> None:
        if keep:
            held.__dict__["original"] = _weight(old)
        _exchange(hosts, old, held.train(old.training))

    costs = _costs_of(model, chosen, put)
    model.__dict__[_NOTE] = {"form": form, "layers": layers, "embeddings": embeddings}
    return costs


def quantization_costs(model: nn.Module, form: str, *, layers: str = "all-linear", embeddings: str = "int8") -> Costs:
    """What `quantize` with these arguments would save and cost; the model stays as it is."""
    return _costs_of(model, _chosen(model, form, layers, embeddings), lambda old, held: None)


def quantized_as(model: nn.Module) -> Mapping[str, Any]:
    """The arguments by which `quantize` changed this model; empty if it did not."""
    note: Mapping[str, Any] = model.__dict__.get(_NOTE, {})
    return note


def forget(model: nn.Module) -> None:
    """Lets the float weights go that `quantize(keep=True)` kept."""
    for _, module in walk(model):
        if isinstance(module, Quantized):
            module.__dict__["original"] = None


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Puts plain float layers in the place of all quantized ones, with the numbers that those stand for.

    Returns how many there were. UsageError while adapters are attached.
    """
    held = [module for _, module in walk(model) if isinstance(module, Quantized)]
    _refuse_adapted(model, "dequantize")
    hosts = _hosts(model)
    for module in held:
        _exchange(hosts, module, _plain(module))
    model.__dict__.pop(_NOTE, None)
    return len(held)


def _plain(module: Quantized) -> nn.Module:
    weight = module.read(module.like.dtype)
    if isinstance(module, QuantEmbedding):
        table = nn.Embedding(module.o, module.i, module.padding_idx, device="meta")
        table.weight = nn.Parameter(weight, requires_grad=False)
        return table.train(module.training)
    assert isinstance(module, QuantLinear)
    linear = nn.Linear(module.i, module.o, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


class _Choice(NamedTuple):
    module: nn.Module
    role: str
    form: Format


def _chosen(model: nn.Module, form: str, layers: str, embeddings: str) -> dict[str, _Choice]:
    """Path -> what is to be quantized, and how."""
    for name in (form, *(() if embeddings == "none" else (embeddings,))):
        if name not in FORMATS:
            raise UsageError(
                f"unknown format '{name}'{nearest(name, FORMATS.names())}; use {', '.join(FORMATS.names())}"
            )
    _refuse_adapted(model, "quantize")
    if any(isinstance(module, Quantized) for _, module in walk(model)):
        raise UsageError(f"this {type(model).__name__} is quantized already; dequantize it first")
    found: dict[str, _Choice] = {}
    for spec in describe(model):
        place = locate(model, spec.path)
        if place is None or not spec.path or not _may(spec, place.kind.plain(place.module)):
            continue
        if spec.kind == "embedding":
            if embeddings != "none":
                found[spec.path] = _Choice(place.module, spec.role, FORMATS[embeddings])
        elif matches_rule(spec, layers):
            found[spec.path] = _Choice(place.module, spec.role, FORMATS[form])
    if not found:
        raise UsageError(f"no layer of this {type(model).__name__} can be quantized by layers='{layers}'")
    return found


def _may(spec: LayerSpec, plain: bool) -> bool:
    """Frozen matrices that a call reads, and nobody else."""
    return spec.kind in _MATRICES and spec.called and not spec.tied and plain and spec.role != "head"


def _refuse_adapted(model: nn.Module, verb: str) -> None:
    if any(is_added(module) for module in model.modules()):
        raise UsageError(f"adapters are attached to this {type(model).__name__}; {verb} it first, and attach then")


def _weight(module: nn.Module) -> Tensor:
    """As it is packed: a row for each output, or for each token."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator,union-attr,assignment]
    return weight.mT if hasattr(module, "nf") else weight


def _costs_of(model: nn.Module, chosen: Mapping[str, _Choice], put: Callable[[nn.Module, Quantized], None]) -> Costs:
    whole = sum({id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}.values())
    costs: list[Cost] = []
    with torch.no_grad():
        for path, (module, role, form) in chosen.items():
            weight = _weight(module)
            parts, i = form.pack(weight), weight.shape[1]
            error = relative_error(form.unpack(parts, i, torch.float32), weight.float())
            sizes = (weight.numel() * weight.element_size(), sum(t.numel() * t.element_size() for t in parts))
            costs.append(Cost(path, role, form.name, *sizes, error))
            if isinstance(module, nn.Embedding):
                put(module, QuantEmbedding(form, parts, i, weight, module.padding_idx))
            else:
                put(module, QuantLinear(form, parts, i, weight, module._parameters.get("bias")))
    return Costs(tuple(costs), whole - sum(cost.before for cost in costs))


_Hosts = dict[int, list[tuple[nn.Module, str]]]


def _hosts(model: nn.Module) -> _Hosts:
    """By the id of every module: where it stands."""
    found: _Hosts = {}
    for host in model.modules():
        for name, child in host._modules.items():
            found.setdefault(id(child), []).append((host, name))
    return found


def _exchange(hosts: _Hosts, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, wherever that stands."""
    for host, name in hosts[id(old)]:
        host._modules[name] = new
