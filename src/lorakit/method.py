"""What a method and a start are: the two abstract classes, and the registries that find their files.

A **method** says what the update of a layer is (lora, dora, ia3 ...): how many numbers it trains, how they begin, and
how they become an `Update`. A **start** says how the factors of a low-rank pair begin. Both are pure: tensors in,
tensors out. A new one is one file in `methods/` or `starts/`, or an entry point of another package.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import PlanError, nearest
from lorakit.plan import LayerPlan, resolve_scale
from lorakit.registry import Registry
from lorakit.update import AdaptedLayer, LayerSpec, Update

Factors = dict[str, Tensor]
ReadWeight = Callable[[], Tensor]


class Method(ABC):
    """Named factors of one layer <-> its `Update`.

    Class attributes: `name`; `formula`, `parameters`, `use` and `source` (the docs' table); `frozen` (factors that
    never learn); `pace` (its learning rate beside lora's, as measured); `takes_rank`; `reads_weight` (the update
    depends on the base weight); `exact_pair` (the update is a low-rank pair); `peft_type` and `peft_config` (the PEFT
    twin, or None).
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    parameters: ClassVar[str]
    use: ClassVar[str]
    source: ClassVar[str]
    frozen: ClassVar[frozenset[str]] = frozenset()
    pace: ClassVar[float] = 1.0
    takes_rank: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    exact_pair: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = None
    peft_config: ClassVar[Mapping[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return method_named, (self.name,)  # pickle and deepcopy give the registered one

    @abstractmethod
    def init(self, spec: LayerSpec, plan: LayerPlan, weight: ReadWeight, generator: torch.Generator) -> Factors:
        """Fresh factors in float32: an update that changes nothing. `weight()` reads the canonical base weight."""

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
        if plan.rank > spec.max_rank:
            return [
                f"rank {plan.rank} exceeds the smaller side of '{spec.path}' ({o} x {i}); "
                f"use rank <= {spec.max_rank} or clip_rank (--clip-rank)"
            ]
        return []

    def size(self, spec: LayerSpec, rank: int) -> int:
        """Trainable numbers on this layer."""
        total = 0
        for name, shape in self.shapes(spec, rank).items():
            if name not in self.frozen:
                count = 1
                for side in shape:
                    count *= side
                total += count
        return total

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        """Tensors under PEFT's leaf names; None where PEFT cannot say this."""
        return None

    def from_peft(self, leaves: Mapping[str, Tensor], kind: str) -> Factors:
        """Factors from PEFT's leaf names (the inverse of `to_peft`)."""
        raise NotImplementedError


class Pair(NamedTuple):
    """Initial factors. Where `b @ a` is not zero, the method subtracts the frozen start, so that nothing changes."""

    a: Tensor
    b: Tensor


class Start(ABC):
    """How a low-rank pair begins. Class attributes: `name`, `use`, `source`, `zero` (the product `b @ a` is 0)."""

    name: ClassVar[str]
    use: ClassVar[str]
    source: ClassVar[str]
    zero: ClassVar[bool] = True

    @abstractmethod
    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: ReadWeight, generator: torch.Generator) -> Pair:
        """`a (.., r, i)` and `b (.., o, r)` in float32, on the CPU."""

    def faults(self, spec: LayerSpec, rank: int) -> list[str]:
        """Why this start cannot be used here; empty if it can."""
        return []


METHODS: Registry[Method] = Registry("method", "lorakit.methods")
STARTS: Registry[Start] = Registry("start", "lorakit.starts")


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
        found = method.faults(spec, plan)
        if not found and method.takes_rank:
            found = _scale_faults(path, plan)
            if plan.start not in STARTS:
                found.append(f"'{path}': unknown start '{plan.start}'{nearest(plan.start, STARTS.names())}")
            else:
                found += STARTS[plan.start].faults(spec, plan.rank)
        faults[alike] = found
    return [
        f"{fault} (and {more[alike]} more like it)" if more[alike] else fault
        for alike, found in faults.items()
        for fault in found
    ]


def _scale_faults(path: str, plan: LayerPlan) -> list[str]:
    try:
        resolve_scale(plan.scale, plan.rank)
    except PlanError as error:
        return [f"'{path}': {error}"]
    return []


def layer_update(layer: AdaptedLayer, weight: ReadWeight | None = None) -> Update:
    """The `Update` of one adapter layer. Without `weight`, methods that read the base weight raise PlanError."""
    method = METHODS[layer.method]

    def missing() -> Tensor:
        raise PlanError(f"method '{layer.method}' needs the base weight to say its update; pass the model")

    return method.update(layer.factors, layer.scale, weight or missing)
