"""One trial of a method, and the tools that checks are made of."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach import attach
from lorakit.attach.slots import Factors
from lorakit.describe import locate
from lorakit.method import METHODS, not_called
from lorakit.plan import LayerPlan, Plan
from lorakit.testing.cases import Case

RANK = 2


class Trial(NamedTuple):
    """One method with one start on one layer under one drive."""

    method: str
    start: str
    case: Case
    drive: str

    def __str__(self) -> str:
        start = f" started by {self.start}" if self.start else ""
        return f"method '{self.method}'{start} on {self.case.name} (kind {self.case.kind}) by drive '{self.drive}'"

    @property
    def plan(self) -> Plan:
        """The plan of this trial."""
        method = METHODS[self.method]
        scale = 1.5 if method.takes_scale else ""
        return Plan({self.case.path: LayerPlan(self.method, RANK if method.takes_rank else 0, scale, self.start)})

    @property
    def faults(self) -> list[str]:
        """Why the method cannot be planned here, in its own words."""
        found = locate(self.case.model(torch.float32), self.case.path)
        assert found is not None
        method = METHODS[self.method]
        faults = method.faults(found.spec, self.plan.layers[self.case.path])
        return faults or (
            [not_called(self.case.path, self.method)] if self.drive == "weight" and not method.linear else []
        )

    def base(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, input, and what the untouched model answers."""
        model, batch = self.case.model(dtype), self.case.batch(dtype)
        with torch.no_grad():
            return model, batch, model(batch)

    def attached(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Model with an adapter that does something, input, answer. In float64 the factors are float64 too."""
        model, batch, _ = self.base(dtype)
        attach(model, self.plan, drive=self.drive)
        if dtype == torch.float64:
            model.to(dtype)
        perturb(model)
        with torch.no_grad():
            return model, batch, model(batch)


def perturb(model: nn.Module, by: float = 0.3) -> None:
    """Adds noise to every factor that learns."""
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=by)


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """Module name -> the factors that attach has put there."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factors)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that detaching must give back, in a form that compares by `==`; tensors by their bits."""
    return {
        path: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            [(name, _bits(p), p.requires_grad, id(p)) for name, p in module._parameters.items() if p is not None],
            [(name, _bits(b)) for name, b in module._buffers.items() if b is not None],
            [len(getattr(module, table)) for table in sorted(module.__dict__) if table.endswith("_hooks")],
            [(key, value) for key, value in module.__dict__.items() if isinstance(value, bool | int | str | float)],
        )
        for path, module in model.named_modules()
    }


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Equal up to `tolerance` of the largest number: one rule for every shape, and NaN is never equal."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    found, wanted = found.detach().double(), wanted.detach().double()
    size = max(1.0, float(wanted.abs().max()))
    gap = float((found - wanted).abs().max())
    assert gap <= tolerance * size, f"{what}: off by {gap:.3g} where numbers reach {size:.3g}"
