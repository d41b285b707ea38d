"""AdaLoRA: a pair around trained singular values, whose ranks move to the layers that matter (Zhang et al., ICLR 2023).

`delta = scale * b diag(lambda) a`. All layers begin with the planned rank and end with two thirds of it on average: a
triplet's importance is the moving average of `|weight * gradient|` times that of its changes, over its numbers; the
budget falls as a cubic, and triplets that it does not reach have their lambda set to zero, as long as they stay out.
`a` and `b` are held orthonormal by a penalty. What is zero at the end is cut, from some layers everything.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.course import Course
from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {"a": "lora_A", "b": "lora_B", "lambda": "lora_E"}
_SPREAD = 0.02  # of a and b at the beginning, as in the paper's code
_KEPT = 2 / 3  # of all ranks at the end: the paper begins with 1.5 times its target
_BEGIN, _END = 0.1, 0.6  # share of all steps before anything is cut, and after which nothing more is
_CUTS = 50  # in between
_MEMORY = 0.85  # of both moving averages
_PENALTY = 0.1  # times the mean distance of the factors from orthonormal ones
_PEFT_LEAST = 1e-5  # what PEFT adds to the rank that alpha is divided by


@METHODS.add
class Adalora(Method):
    """A pair with singular values of its own, whose rank the fit chooses."""

    name = "adalora"
    formula = "scale * b @ diag(lambda) @ a"
    parameters = "r (o + i + 1), of which two thirds remain"
    use = "where layers differ in what they need; long enough runs; begin with 1.5 times the rank that is wanted"
    source = "Zhang et al., ICLR 2023, arXiv 2303.10512"
    pace = 2.0
    takes_start = False
    peft_type = "ADALORA"
    peft_leaves = frozenset(_LEAVES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (rank, i), "b": (o, rank), "lambda": (rank,)}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        if spec.batch:
            return [f"method 'adalora' gives a layer one rank, and '{spec.path}' has {spec.batch[0]} experts"]
        if plan.share:
            return [f"method 'adalora' cuts '{spec.path}' by itself, so it can share no factor; leave share out"]
        return super().faults(spec, plan)

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        drawn = {name: torch.randn(shapes[name], generator=generator) * _SPREAD for name in ("a", "b")}
        return {**drawn, "lambda": torch.zeros(plan.rank)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        return Update(a=factors["lambda"].unsqueeze(-1) * factors["a"], b=factors["b"], scale=scale)

    def course(self, layers: Mapping[str, Mapping[str, Tensor]], n_steps: int) -> Course:
        return _Budget(layers, n_steps)

    def finished(self, layer: AdaptedLayer) -> AdaptedLayer:
        """Without the triplets whose lambda is zero."""
        a, b, values = (layer.factors[name] for name in ("a", "b", "lambda"))
        keep = values != 0
        factors = {"a": a[keep], "b": b[:, keep].contiguous(), "lambda": values[keep]}
        return replace(layer, factors=factors, rank=int(keep.sum()))

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "hf_conv1d", "conv2d", "") or layer.groups > 1:
            return None
        leaves = {leaf: layer.factors[name] for name, leaf in _LEAVES.items()}
        return {**leaves, "lora_E": leaves["lora_E"].unsqueeze(1)}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where the layers do not share their scale."""
        scales, most = {layer.scale for layer in layers.values()}, max(layer.rank for layer in layers.values())
        if len(scales) > 1 or most == 0:
            return None
        cut = any(layer.rank < most for layer in layers.values())
        kept = {f"{p}.lora_E": [k < x.rank for k in range(most)] for p, x in layers.items()} if cut else None
        alpha = scales.pop() * (most + _PEFT_LEAST)
        fields = {"init_r": most, "target_r": most, "lora_alpha": alpha, "total_step": 1, "rank_pattern": kept}
        return PeftForm(fields)

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        factors = {name: leaves[leaf] for name, leaf in _LEAVES.items()}
        rank = len(factors["a"])
        if factors["b"].shape[1:] != (rank,) or factors["lambda"].numel() != rank:
            raise AdapterError(
                f"has {', '.join(f'{leaf} {tuple(x.shape)}' for leaf, x in leaves.items())}: no triplets"
            )
        factors["lambda"] = factors["lambda"].flatten()
        first = int(told.config.get("init_r", 12))
        scale = (float(told.config.get("lora_alpha", 8)) or first) / (first + _PEFT_LEAST)
        return AdaptedLayer(self.name, "", (), factors, rank, scale)


class _Budget(Course):
    """Which triplets may act, step by step. The order of layers is that of `layers`."""

    def __init__(self, layers: Mapping[str, Mapping[str, Tensor]], n_steps: int) -> None:
        self._layers = [dict(factors) for factors in layers.values()]
        total = sum(len(factors["lambda"]) for factors in self._layers)
        self._first, self._last = total, round(total * _KEPT)
        self._begin = round(_BEGIN * n_steps)
        self._end = max(self._begin + 1, round(_END * n_steps))
        self._every = max(1, (self._end - self._begin) // _CUTS)
        zeros = [{name: torch.zeros_like(x) for name, x in factors.items()} for factors in self._layers]
        self._mean, self._spread = zeros, [{name: x.clone() for name, x in one.items()} for one in zeros]
        self._keep = torch.ones(total, dtype=torch.bool)

    def is_done(self, step: int) -> bool:
        return step >= self._end

    @torch.no_grad()
    def before(self, step: int) -> None:
        share = _PENALTY / (2 * len(self._layers))
        for factors, means, spreads in zip(self._layers, self._mean, self._spread):
            for name, x in factors.items():
                assert x.grad is not None
                if name == "a":
                    x.grad.add_(_slope(x), alpha=share)
                elif name == "b":
                    x.grad.add_(_slope(x.T).T, alpha=share)
                if step <= self._end:
                    felt = (x * x.grad).abs()
                    means[name].lerp_(felt, 1 - _MEMORY)
                    spreads[name].lerp_((felt - means[name]).abs(), 1 - _MEMORY)

    @torch.no_grad()
    def after(self, step: int) -> None:
        cuts = self._begin < step < self._end and step % self._every == 0
        if cuts or step == self._end:
            share = (step - self._begin) / (self._end - self._begin)
            budget = int((self._first - self._last) * (1 - share) ** 3 + self._last)
            order = self._scores().argsort(descending=True, stable=True)
            self._keep = torch.zeros(self._first, dtype=torch.bool)
            self._keep[order[:budget].cpu()] = True
        if cuts or step >= self._end:
            ranks = [len(factors["lambda"]) for factors in self._layers]
            for factors, keep in zip(self._layers, torch.split(self._keep, ranks)):
                factors["lambda"][~keep.to(factors["lambda"].device)] = 0

    def _scores(self) -> Tensor:
        """Importance of every triplet."""
        found = []
        for mean, spread in zip(self._mean, self._spread):
            felt = {name: mean[name] * spread[name] for name in mean}
            found.append(felt["lambda"] + felt["a"].mean(1) + felt["b"].mean(0))
        return torch.cat(found)

    def memory(self) -> dict[str, Tensor]:
        tensors = {f"{word}.{k}.{name}": x for word, layers in (("mean", self._mean), ("spread", self._spread))
                   for k, one in enumerate(layers) for name, x in one.items()}  # fmt: skip
        return {**tensors, "keep": self._keep}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, x in self.memory().items():
            x.copy_(tensors[name])


def _slope(rows: Tensor) -> Tensor:
    """The gradient of `|rows rows^T - I|` (Frobenius)."""
    off = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    slope: Tensor = 2 * off @ rows / torch.linalg.matrix_norm(off).clamp_min(1e-12)
    return slope
