"""inspect: one line for each layer: rank, effective rank, share of the energy, size relative to the weight.

Singular values come from the factors alone (`linalg.product_svd`). The size relative to W, and methods whose delta
depends on W (dora, ia3), need the model.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter, refuse_broken
from lorakit.attach.places import knows, made_on
from lorakit.describe import locate
from lorakit.errors import AdapterError, BaseMismatchError, PlanError
from lorakit.linalg import effective_rank, energy_rank, product_svd, stable_rank
from lorakit.method import Held, layer_update
from lorakit.prompt import Prompt
from lorakit.update import AdaptedLayer


@dataclass(frozen=True)
class LayerView:
    """One layer. `norm` is the Frobenius norm of the delta; `energy` its share of the squared norms of all layers;
    `relative` is `norm / |W|`; None where the model is needed and was not given."""

    path: str
    method: str
    rank: int
    effective_rank: float | None
    stable_rank: float | None
    rank_90: int | None
    norm: float | None
    energy: float | None
    relative: float | None


@dataclass(frozen=True)
class View:
    """All layers of an adapter. `str()` is the table; `values()` is ready for JSON."""

    title: str
    layers: tuple[LayerView, ...]
    trained: dict[str, int]
    prompt: str = ""

    def values(self) -> dict[str, Any]:
        """Plain values."""
        layers = [asdict(layer) for layer in self.layers]
        return {"adapter": self.title, "layers": layers, "trained": self.trained, "prompt": self.prompt}

    def __str__(self) -> str:
        header = ("layer", "method", "rank", "effective", "stable", "90 %", "|delta|", "energy", "|delta|/|W|")
        rows = [
            (
                view.path,
                view.method,
                str(view.rank or "-"),
                _shown(view.effective_rank, ".1f"),
                _shown(view.stable_rank, ".1f"),
                _shown(view.rank_90, "d"),
                _shown(view.norm, ".3g"),
                _shown(view.energy, ".1%"),
                _shown(view.relative, ".2%"),
            )
            for view in self.layers
        ]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [self.title, *([""] if rows else [])]
        for row in [header, tuple("-" * width for width in widths), *rows] if rows else []:
            cells = [cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths))]
            lines.append("  ".join(cells).rstrip())
        if self.prompt:
            lines += ["", f"prompt: {self.prompt}"]
        if self.trained:
            lines += ["", "trained fully: " + ", ".join(f"{name} ({n:,} numbers)" for name, n in self.trained.items())]
        if any(view.norm is None for view in self.layers):
            lines += ["", "'-': needs the base model; pass it with --base (Python: model=...)"]
        elif any(view.relative is None for view in self.layers):
            lines += ["", "|delta|/|W| needs the base model; pass it with --base (Python: model=...)"]
        dead = [view.path for view in self.layers if view.norm == 0]
        if dead:
            lines += ["", f"{len(dead)} of {len(self.layers)} layers change nothing, e.g. '{dead[0]}'"]
        return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def inspect(adapter: Adapter, model: nn.Module | None = None, *, check_base: bool = True) -> View:
    """What each layer of an adapter does. With `model`, also its size relative to the weights.

    Raises AdapterError if the model lacks a layer, BaseMismatchError if it has other weights.
    """
    refuse_broken(adapter, "the adapter")
    if model is not None and check_base and not knows(model, adapter, {}):
        raise BaseMismatchError(
            f"this adapter{made_on(adapter)} was made for other weights than the given model has; pass that base"
        )
    views = [_view(path, layer, model) for path, layer in adapter.layers.items()]
    total = sum(view.norm**2 for view in views if view.norm is not None)
    if total > 0 and all(view.norm is not None for view in views):
        views = [LayerView(**{**asdict(view), "energy": (view.norm or 0.0) ** 2 / total}) for view in views]
    trained = {name: tensor.numel() for name, tensor in adapter.trained.items()}
    return View(repr(adapter), tuple(views), trained, _told(adapter.prompt))


def _told(prompt: Prompt | None) -> str:
    """What is in front of every text."""
    if prompt is None:
        return ""
    norms = torch.linalg.vector_norm(prompt.rows.detach().float().flatten(1), dim=1)
    where = "input rows" if prompt.inputs else f"keys and values in each of {prompt.sizes.layers} layers"
    return f"{prompt.method}, {prompt.length} {where}, of norm {float(norms.min()):.3g} to {float(norms.max()):.3g}"


def _spectrum(layer: AdaptedLayer, weight: Tensor | None) -> Tensor | None:
    """Singular values of the delta; None where it cannot be told without the base weight, which is not there."""
    try:
        update = layer_update(layer, None if weight is None else Held(weight))
    except PlanError:
        return None
    if not update.is_linear:
        return None
    if update.is_pair and update.a is not None and update.b is not None:
        return product_svd(update.b, update.a, update.scale).s
    if weight is None and (update.dense is None or update.gain is not None or update.gain_in is not None):
        return None
    base = torch.zeros_like(update.dense) if weight is None and update.dense is not None else weight
    assert base is not None
    found: Tensor = torch.linalg.svdvals(update.delta(base).float())
    return found


def _view(path: str, layer: AdaptedLayer, model: nn.Module | None) -> LayerView:
    weight = None
    if model is not None:
        found = locate(model, path)
        if found is None:
            raise AdapterError(f"the model has no layer '{path}', which the adapter changes")
        weight = found.kind.canonical(found.module, found.weight.detach()).float()
    s = _spectrum(layer, weight)
    if s is None:
        return LayerView(path, layer.method, layer.rank, None, None, None, None, None, None)
    s = s.reshape(-1, s.shape[-1]).square().sum(0).sqrt() if s.ndim > 1 else s  # experts: all together
    norm = float(s.square().sum().sqrt())
    relative = None if weight is None else norm / max(float(torch.linalg.vector_norm(weight)), math.ulp(0.0))
    return LayerView(
        path, layer.method, layer.rank, effective_rank(s), stable_rank(s), energy_rank(s, 0.9), norm, None, relative
    )
