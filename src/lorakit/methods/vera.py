"""VeRA: one random pair for all layers, frozen, and two trained vectors for each (Kopiczko et al., ICLR 2024).

`delta = scale * diag(lambda_b) b diag(lambda_d) a`. The pair is as wide as the widest of the layers, and one tensor for
all of them; a layer takes the first columns of `a` and the first rows of `b`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_FIRST = 0.1  # of lambda_d


@METHODS.add
class Vera(Method):
    """Two vectors around a random pair."""

    name = "vera"
    formula = "scale * diag(lambda_b) @ b @ diag(lambda_d) @ a"
    parameters = "r + o"
    use = "many adapters whose files must be tiny; wants a rank of hundreds"
    source = "Kopiczko et al., ICLR 2024, arXiv 2310.11454"
    pace = 15.0
    frozen = frozenset({"a", "b"})
    scale = 1.0
    takes_start = False
    bounded = False
    peft_type = "VERA"
    peft_leaves = frozenset({"vera_lambda_b", "vera_lambda_d"})
    peft_common = frozenset({"vera_A", "vera_B"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"a": (rank, i), "b": (o, rank), "lambda_d": (*spec.batch, rank), "lambda_b": (*spec.batch, o)}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        (o, i), r, wanted = spec.matrix, layer.rank, self.shapes(spec, layer.rank)
        width, height = layer.factors["a"].shape[-1], layer.factors["b"].shape[0]
        return {**wanted, "a": (r, max(i, width)), "b": (max(o, height), r)}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        return {"lambda_d": torch.full(shapes["lambda_d"], _FIRST), "lambda_b": torch.zeros(shapes["lambda_b"])}

    def common(self, specs: Sequence[LayerSpec], rank: int, generator: torch.Generator) -> Factors:
        o, i = (max(spec.matrix[side] for spec in specs) for side in (0, 1))
        return {"a": _drawn((rank, i), generator), "b": _drawn((o, rank), generator)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        o, i = weight.shape[-2:]
        a = factors["lambda_d"].unsqueeze(-1) * factors["a"][:, :i]
        b = factors["lambda_b"].unsqueeze(-1) * factors["b"][:o]
        return Update(a=a, b=b, scale=scale)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "hf_conv1d", "") or layer.scale != 1:
            return None
        return {f"vera_{name}": layer.factors[name] for name in ("lambda_b", "lambda_d")}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where the layers do not share one pair."""
        first = next(iter(layers.values())).factors
        if any(layer.factors[name] is not first[name] for layer in layers.values() for name in ("a", "b")):
            return None
        common = {"vera_A": first["a"], "vera_B": first["b"]}
        return PeftForm({"r": len(first["a"]), "save_projection": True, "projection_prng_key": 0}, common)

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        if told.common.keys() != self.peft_common:
            raise AdapterError(
                "was saved without its random pair (save_projection=False), which depends on the model it was made "
                "for; load it in peft and save it with save_projection=True"
            )
        pair = {"a": told.common["vera_A"], "b": told.common["vera_B"]}
        own = {name.removeprefix("vera_"): leaf for name, leaf in leaves.items()}
        if own.keys() != {"lambda_b", "lambda_d"} or len(own["lambda_d"]) != len(pair["a"]):
            raise AdapterError("has vectors that do not fit the file's random pair")
        return AdaptedLayer(self.name, "", (), {**pair, **own}, len(pair["a"]), 1.0)


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = (6 / shape[1]) ** 0.5  # Kaiming's, for a rectifier
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
