"""What a method and a start are: the two abstract classes, and the registries that find their files.

A **method** says what the update of a layer is (lora, dora, ia3 ...): how many numbers it trains, how they begin, and
how they become an `Update`. A **start** says how the factors of a low-rank pair begin. Both are pure: tensors in,
tensors out. A new one is one file in `methods/` or `starts/`, or an entry point of another package.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.course import Course
from lorakit.errors import PlanError, nearest
from lorakit.kernels.norms import row_squares
from lorakit.peft_layout import alpha_of, pattern
from lorakit.plan import LayerPlan, Plan, resolve_scale
from lorakit.registry import Registry
from lorakit.update import AdaptedLayer, LayerSpec, Update

Factors = dict[str, Tensor]
DEFAULT_START = "kaiming"


class ReadWeight(Protocol):
    """The canonical base weight `W (.., o, i)`: its shape is at hand, its numbers are read when it is called."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __call__(self) -> Tensor: ...

    def row_squares(self) -> Tensor:
        """`|w|^2` of every row `(.., o)`."""
        ...


class Measured(NamedTuple):
    """What was seen of a layer on data (lorakit.measure): the second moment of its inputs `(i, i)` and their mean
    `(i,)`, the mean gradient of its weight `(o, i)`; None for what was not asked for."""

    inputs: Tensor | None = None
    mean: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def known(self) -> set[str]:
        """Names of what is there."""
        return {name for name in self._fields if getattr(self, name) is not None}


class Held(NamedTuple):
    """A canonical weight that is at hand; `original`: what it was before it was quantized; `known`: what was seen of
    its layer."""

    weight: Tensor
    original: Tensor | None = None
    known: Measured = Measured()

    @property
    def shape(self) -> tuple[int, ...]:
        """`(.., o, i)`."""
        return tuple(self.weight.shape)

    def __call__(self) -> Tensor:
        return self.weight

    def row_squares(self) -> Tensor:
        """`|w|^2` of every row `(.., o)`."""
        return row_squares(self.weight)


class Told(NamedTuple):
    """What a file of PEFT's says of a layer beside its tensors: its configuration, the layer's rank and scale by it
    (alpha / rank), and the tensors that all layers have in common."""

    config: Mapping[str, Any]
    rank: int
    scale: float
    common: Mapping[str, Tensor]


class PeftForm(NamedTuple):
    """What PEFT wants to be told of a whole adapter: fields of its configuration, tensors that all layers share."""

    fields: dict[str, Any]
    common: Mapping[str, Tensor] = {}

    @classmethod
    def with_ranks(cls, ranks: Mapping[str, int], scales: Mapping[str, float] | None = None) -> "PeftForm":
        """With `r` and, from the scales, `alpha`, and the layers that differ."""
        r, rank_pattern = pattern(ranks)
        fields: dict[str, Any] = {"r": r, "rank_pattern": rank_pattern}
        if scales is not None:
            alpha, alpha_pattern = pattern({path: alpha_of(scale, ranks[path]) for path, scale in scales.items()})
            fields |= {"alpha": alpha, "alpha_pattern": alpha_pattern}
        return cls(fields)

    def saying(self, **fields: Any) -> "PeftForm":
        """The same with more fields."""
        return self._replace(fields={**self.fields, **fields})


class Method(ABC):
    """Named factors of one layer <-> its `Update`.

    Class attributes: `name`; `formula`, `parameters`, `use` and `source` (the docs' table); `frozen` (factors that
    never learn); `scale` (the rule where a plan names none); `pace` (its learning rate beside lora's, as measured);
    `takes_rank`; `takes_scale`; `bounded` (no rank above a layer's smaller side); `takes_start` (its pair begins by a
    start); `reads_weight` (the update depends on the base weight's numbers); `exact_pair` (the update is a low-rank
    pair); `plain` (its factors `a` and `b` are that pair as they stand); `linear` (the update changes weight and
    bias, so it can be merged); `peft_type` and `peft_config` (the PEFT twin,
    or None), `peft_leaves` and `peft_common` (names that its files have for each layer, and once).
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    parameters: ClassVar[str]
    use: ClassVar[str]
    source: ClassVar[str]
    frozen: ClassVar[frozenset[str]] = frozenset()
    scale: ClassVar[float | str] = "16/r"
    pace: ClassVar[float] = 1.0
    takes_rank: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    takes_start: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    exact_pair: ClassVar[bool] = True
    plain: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = None
    peft_config: ClassVar[Mapping[str, Any]] = {}
    peft_leaves: ClassVar[frozenset[str]] = frozenset()
    peft_common: ClassVar[frozenset[str]] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        return method_named, (self.name,)  # pickle and deepcopy give the registered one

    @abstractmethod
    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        """Fresh factors in float32: an update that changes nothing."""

    def common(self, specs: Sequence[LayerSpec], rank: int, generator: torch.Generator) -> Factors:
        """Fresh factors that all layers of a rank have in common, each one tensor; `init` leaves them out."""
        return {}

    def derived(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
        """What follows from the factors and the shape of `W (.., o, i)` once and for all: kept beside the factors while
        they are attached, and found among them by `update`."""
        return {}

    @abstractmethod
    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        """The normal form of these factors."""

    @abstractmethod
    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of every factor that must be there."""

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        """Shape of every factor that this layer of an adapter must have to go on the weight of `spec`."""
        return self.shapes(spec, layer.rank)

    def optional_shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of every factor that may be there besides."""
        return {}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        """Why this method cannot be planned on this layer; empty if it can."""
        if not self.takes_rank:
            return []
        o, i = spec.matrix
        if not isinstance(plan.rank, int) or isinstance(plan.rank, bool) or plan.rank < 1:
            return [
                f"rank {plan.rank} at '{spec.path}'; use a whole number, 1 or more, or take the layer out of the plan"
            ]
        if self.bounded and plan.rank > spec.max_rank:
            return [
                f"rank {plan.rank} exceeds the smaller side of '{spec.path}' ({o} x {i}); "
                f"use rank <= {spec.max_rank} or clip_rank (--clip-rank)"
            ]
        return []

    def size(self, spec: LayerSpec, rank: int) -> int:
        """Trainable numbers on this layer."""
        return sum(prod(shape) for name, shape in self.shapes(spec, rank).items() if name not in self.frozen)

    def course(self, layers: Mapping[str, Mapping[str, Tensor]], n_steps: int) -> Course | None:
        """What the method does between the steps of a fit with the learning factors of its layers."""
        return None

    def finished(self, layer: AdaptedLayer) -> AdaptedLayer:
        """What a fit leaves of a layer."""
        return layer

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        """Tensors under PEFT's leaf names; None where PEFT cannot say this."""
        return None

    def from_peft(self, leaves: Mapping[str, Tensor], kind: str) -> Factors:
        """Factors from PEFT's leaf names (the inverse of `to_peft`)."""
        raise NotImplementedError

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """What PEFT wants to be told beside the leaves, of types other than LORA and IA3; None where it cannot be."""
        raise NotImplementedError

    def reads_peft(self, config: Mapping[str, Any]) -> bool:
        """Is an adapter of our `peft_type` with this configuration one of this method?"""
        return True

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        """A layer from PEFT's leaves. AdapterError continues the layer's name; a KeyError is a leaf that is missing."""
        raise NotImplementedError


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(inputs), the last side (He et al., 2015, with a = sqrt 5; torch's own for linear layers)."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Pair(NamedTuple):
    """Initial factors. Where `b @ a` is not zero, the method subtracts the frozen start, so that nothing changes."""

    a: Tensor
    b: Tensor

    @classmethod
    def scaled(cls, b: Tensor, a: Tensor, scale: float) -> "Pair":
        """In float32 from a product `b @ a` that `|scale|` is divided out of already: `b` takes the scale's sign."""
        return cls(a.float().contiguous(), (b if scale > 0 else -b).float().contiguous())


class Start(ABC):
    """How a low-rank pair begins. Class attributes: `name`, `use`, `source`, `zero` (the product `b @ a` is 0), `free`
    (with any `a` it is), `corrects` (the product is meant to act from the beginning, and is not subtracted), `needs`
    (of `Held`: "original", and of `known` "inputs", "gradient")."""

    name: ClassVar[str]
    use: ClassVar[str]
    source: ClassVar[str]
    zero: ClassVar[bool] = True
    free: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        """`a (.., r, i)` and `b (.., o, r)` in float32, on the CPU."""

    def ranks(self, layers: Mapping[str, tuple[LayerSpec, int, Measured]]) -> dict[str, int]:
        """The ranks that this start gives to layers, of those that were planned, by what was measured."""
        return {path: rank for path, (_, rank, _) in layers.items()}

    def faults(self, spec: LayerSpec, rank: int) -> list[str]:
        """Why this start cannot be used here; empty if it can."""
        if self.needs and (spec.kind not in ("linear", "hf_conv1d", "conv2d") or not spec.called or spec.groups > 1):
            return [
                f"start '{self.name}' looks at what layers see, which cannot be told of '{spec.path}' ({spec.kind})"
            ]
        return []


METHODS: Registry[Method] = Registry("method", "lorakit.methods")
STARTS: Registry[Start] = Registry("start", "lorakit.starts")


def not_called(path: str, method: str) -> str:
    """The fault of a method that changes outputs where there are none to change."""
    return f"the weight of '{path}' is read without a call, and method '{method}' changes outputs"


def method_named(name: str) -> Method:
    """The registered method of this name."""
    return METHODS[name]


def check_plan(specs: Mapping[str, LayerSpec], layers: Mapping[str, LayerPlan]) -> list[str]:
    """All faults of a plan against the layers of a model."""
    faults: dict[tuple[object, ...], list[str]] = {}
    more: Counter[tuple[object, ...]] = Counter()
    for path, plan in layers.items():
        spec = specs.get(path)
        if spec is None:
            continue
        alike = (plan, spec.kind, spec.shape, spec.matrix, spec.groups, spec.role, spec.called)
        if alike in faults:  # layers of a stack are alike: one answer for all
            more[alike] += 1
            continue
        faults[alike] = []
        if plan.method not in METHODS:
            faults[alike].append(f"'{path}': unknown method '{plan.method}'{nearest(plan.method, METHODS.names())}")
            continue
        method = METHODS[plan.method]
        whole = settled(plan)
        found = _of_others(path, plan) or (_scale_faults(path, whole) if method.takes_rank else [])
        found = found or method.faults(spec, whole) or _share_faults(spec, whole)
        faults[alike] = found or (STARTS[whole.start].faults(spec, whole.rank) if method.takes_start else [])
    return [
        f"{fault} (and {more[alike]} more like it)" if more[alike] else fault
        for alike, found in faults.items()
        for fault in found
    ]


def settled(plan: LayerPlan) -> LayerPlan:
    """What a layer gets, with the method's own where the plan leaves it to it."""
    method = METHODS[plan.method]
    return replace(
        plan,
        rank=plan.rank if method.takes_rank else 0,
        scale=method.scale if plan.scale == "" else plan.scale,
        start=(plan.start or DEFAULT_START) if method.takes_start else "",
    )


def trainable(specs: Mapping[str, LayerSpec], plan: Plan) -> int:
    """Numbers that learn in the layers of a plan; what they share is counted once."""
    layers = {path: settled(layer) for path, layer in plan.layers.items()}
    total = sum(METHODS[layer.method].size(specs[path], layer.rank) for path, layer in layers.items())
    again = [key for key, holder in sharing(specs, layers).items() if key[0] != holder]
    shapes = [METHODS[layers[p].method].shapes(specs[p], layers[p].rank)[name] for p, name in again]
    return total - sum(map(prod, shapes))


def sharing(specs: Mapping[str, LayerSpec], layers: Mapping[str, LayerPlan]) -> dict[tuple[str, str], str]:
    """Of the factors that settled plans share: (layer, factor) -> the first layer alike, whose tensor it is."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[tuple[str, str], str] = {}
    for path, layer in layers.items():
        for name in layer.shared:
            shape = METHODS[layer.method].shapes(specs[path], layer.rank)[name]
            alike = (layer.share, layer.method, specs[path].role, name, shape)
            found[path, name] = first.setdefault(alike, path)
    return found


def _of_others(path: str, plan: LayerPlan) -> list[str]:
    """What a plan says that the method has no use for, or that nobody knows."""
    method = METHODS[plan.method]
    if plan.start and not method.takes_start:
        return [f"'{path}': method '{plan.method}' begins in its own way; leave start '{plan.start}' out"]
    if plan.scale not in ("", method.scale) and not method.takes_scale:
        return [f"'{path}': method '{plan.method}' has no scale; leave scale {plan.scale} out"]
    if plan.start and plan.start not in STARTS:
        return [f"'{path}': unknown start '{plan.start}'{nearest(plan.start, STARTS.names())}"]
    return []


def _share_faults(spec: LayerSpec, plan: LayerPlan) -> list[str]:
    """Why factors of this layer cannot be those of others too. `plan` is settled."""
    method, path = METHODS[plan.method], spec.path
    known = sorted(method.shapes(spec, plan.rank).keys() - method.frozen) if plan.share else []
    strange = [name for name in plan.shared if name not in known]
    if strange or (plan.share and not plan.shared):
        return [f"'{path}': share {plan.share!r} names no factor of '{plan.method}'; it may name {', '.join(known)}"]
    if plan.share and method.takes_start and not STARTS[plan.start].free:
        return [f"'{path}': start '{plan.start}' makes a and b for each other, so none of them can be shared"]
    return []


def _scale_faults(path: str, plan: LayerPlan) -> list[str]:
    try:
        resolve_scale(plan.scale, plan.rank)
    except PlanError as error:
        return [f"'{path}': {error}"]
    return []


class _NotHere:
    """The base weight of a layer of which only the adapter is known."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self._layer = layer

    @property
    def shape(self) -> tuple[int, ...]:
        if not self._layer.matrix:
            raise PlanError(f"method '{self._layer.method}' needs the shape of the base weight; pass the model")
        return self._layer.matrix

    def __call__(self) -> Tensor:
        raise PlanError(f"method '{self._layer.method}' needs the base weight to say its update; pass the model")

    def row_squares(self) -> Tensor:
        return self()


def layer_update(layer: AdaptedLayer, weight: ReadWeight | None = None) -> Update:
    """The `Update` of one adapter layer. Without `weight`, methods that read the base weight raise PlanError."""
    method, base = METHODS[layer.method], weight or _NotHere(layer)
    derived = method.derived(layer.factors, base.shape) if type(method).derived is not Method.derived else {}
    return method.update({**layer.factors, **derived}, layer.scale, base)
