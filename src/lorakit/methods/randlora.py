"""RandLoRA: random pairs summed to a full rank, of which only the diagonals between them learn (Albert et al., 2025).

`delta = scale * B A` with `A` the rows `lambda[p, n] * a[p] * gamma[n]` and `B` the columns `b[:, n, p]`, for ranks p
and bases n: min(o, i) / r bases of rank r span every direction. `a (r, 1, m)` and `b (M, n, r)` are random, frozen and
one tensor for all layers: m and M are the smaller and the larger of the most inputs and the most outputs that one has.
Rows and columns meet in the order in which PEFT flattens them, (p, n) on one side and (n, p) on the other: random pairs
stay random, and its files keep their meaning.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


@METHODS.add
class Randlora(Method):
    """Diagonals between random bases of full rank."""

    name = "randlora"
    formula = "scale * sum over n of b_n @ diag(lambda_n) @ a @ diag(gamma_n)"
    parameters = "min(o, i) (1 + min(o, i) / r)"
    use = "changes of full rank with few numbers; fewer of them the higher r is"
    source = "Albert et al., ICLR 2025, arXiv 2502.00987"
    pace = 0.3
    frozen = frozenset({"a", "b"})
    scale = 20.0
    takes_start = False
    exact_pair = False
    peft_type = "RANDLORA"
    peft_leaves = frozenset({"randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"})
    peft_common = frozenset({"randlora_A", "randlora_B"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        small, large = sorted(spec.matrix)
        n = -(-small // rank)
        return {
            "a": (rank, 1, small),
            "b": (large, n, rank),
            "lambda": (*spec.batch, rank, n),
            "gamma": (*spec.batch, n, small),
        }

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        wanted, found = self.shapes(spec, layer.rank), layer.factors
        a = (layer.rank, 1, max(wanted["a"][2], found["a"].shape[-1]))
        b = tuple(max(x, y) for x, y in zip(wanted["b"][:2], found["b"].shape[:2]))
        return {**wanted, "a": a, "b": (*b, layer.rank)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        gamma = torch.full(shapes["gamma"], 1 / max(shapes["gamma"][-2:]))
        return {"lambda": torch.zeros(shapes["lambda"]), "gamma": gamma}

    def common(self, specs: Sequence[LayerSpec], rank: int, generator: torch.Generator) -> Factors:
        small, large = sorted(max(spec.matrix[side] for spec in specs) for side in (0, 1))
        return {
            "a": _drawn((rank, 1, small), generator),
            "b": _drawn((large, -(-small // rank), rank), generator),
        }

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        o, i = weight.shape[-2:]
        small, n = min(o, i), factors["lambda"].shape[-1]
        a = factors["lambda"].unsqueeze(-1) * factors["a"][..., :small] * factors["gamma"].unsqueeze(-3)
        delta = factors["b"][: max(o, i), :n].flatten(1) @ a.flatten(-3, -2)
        return Update(dense=scale * (delta if i == small else delta.mT))

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "hf_conv1d", ""):
            return None
        bases = {"randlora_A": layer.factors["a"], "randlora_B": layer.factors["b"]}
        return {**{f"randlora_{name}": layer.factors[name] for name in ("lambda", "gamma")}, **bases}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where the layers do not share their bases or their scale."""
        one = next(iter(layers.values()))
        if any(
            layer.factors[name] is not one.factors[name] or layer.scale != one.scale
            for layer in layers.values()
            for name in ("a", "b")
        ):
            return None
        common = {"randlora_A": one.factors["a"], "randlora_B": one.factors["b"]}
        fields = {"r": one.rank, "randlora_alpha": one.scale * one.rank, "save_projection": True}
        return PeftForm({**fields, "projection_prng_key": 0}, common)

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        bases = {name: told.common.get(name, leaves.get(name)) for name in self.peft_common}
        a, b = bases["randlora_A"], bases["randlora_B"]
        if a is None or b is None:
            raise AdapterError(
                "was saved without its random bases; load it in peft and save it with save_projection=True"
            )
        factors = {"a": a, "b": b, "lambda": leaves["randlora_lambda"], "gamma": leaves["randlora_gamma"]}
        rank = len(factors["a"])
        return AdaptedLayer(self.name, "", (), factors, rank, float(told.config.get("randlora_alpha", 640)) / rank)


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape).uniform_(-1, 1, generator=generator)
    return drawn / drawn.std() if drawn.numel() > 1 else drawn
