"""OFT: inputs turned before W, in blocks, by orthogonal matrices that learn (Qiu et al., NeurIPS 2023).

`W' = W R^T`, R block-diagonal with `rank` blocks of b x b, each the Cayley transform `(I - Q)(I + Q)^-1` of a skew Q:
angles between neurons stay what they are. Of an embedding the outputs are turned, `W' = R^T W`. PEFT's files may hold
a series in Q instead, `R = sum of c_k Q^k`, which is nearly orthogonal while Q is small; its numbers come along.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_LEAVES = {"skew": "oft_R.weight", "skew_out": "oft_embedding_R.weight"}


@METHODS.add
class Oft(Method):
    """Blocks of rotations on the side of the inputs."""

    name = "oft"
    formula = "W @ (R - I)^T, R of r blocks (I - Q)(I + Q)^-1"
    parameters = "i (i / r - 1) / 2"
    use = "keeps what the base knows: image models, few steps; more numbers the lower r is"
    source = "Qiu et al., NeurIPS 2023, arXiv 2306.07280"
    pace = 0.3
    frozen = frozenset({"series"})
    scale = 1.0
    takes_scale = False
    takes_start = False
    reads_weight = True
    exact_pair = False
    peft_type = "OFT"
    peft_leaves = frozenset(_LEAVES.values())

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        outputs = spec.kind == "embedding"
        b = spec.matrix[0 if outputs else 1] // rank
        return {"skew_out" if outputs else "skew": (*spec.batch, rank, b * (b - 1) // 2)}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        """Also one block for all places (PEFT's block_share), and a series of any length."""
        name, wanted = next(iter(self.shapes(spec, layer.rank).items()))
        found = tuple(layer.factors[name].shape) if name in layer.factors else wanted
        one = (*wanted[:-2], 1, wanted[-1])
        series = {"series": (layer.factors["series"].numel(),)} if "series" in layer.factors else {}
        return {name: found if found == one else wanted, **series}

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        side = spec.matrix[0 if spec.kind == "embedding" else 1]
        found = super().faults(spec, plan)
        if not found and (side % plan.rank or side == plan.rank):
            return [f"oft divides the {side} channels of '{spec.path}' into rank {plan.rank} blocks of 2 or more each"]
        return found

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return {name: torch.zeros(shape) for name, shape in self.shapes(spec, plan.rank).items()}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        base = weight()
        if "skew" in factors:
            return Update(dense=turned(base, _turn(factors["skew"], factors.get("series"))) - base)
        by_output = turned(base.mT, _turn(factors["skew_out"], factors.get("series")).mT)
        return Update(dense=by_output.mT - base)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        square = layer.kind != "conv2d" or (layer.groups == 1 and len(set(layer.shape[2:])) < 2)
        if layer.kind not in ("linear", "conv2d", "embedding", "") or not square:
            return None
        return {leaf: layer.factors[name] for name, leaf in _LEAVES.items() if name in layer.factors}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where layers have unlike numbers of blocks and unlike blocks, or unlike series."""
        told = [(_skew(layer.factors), layer) for layer in layers.values()]
        blocks = {_block(skew) for skew, _ in told}
        ranks = {layer.rank for _, layer in told}
        one_for_all = {skew.shape[-2] < layer.rank for skew, layer in told}
        series = {tuple(layer.factors["series"].tolist() if "series" in layer.factors else ()) for _, layer in told}
        if len(series) > 1 or len(one_for_all) > 1 or (len(blocks) > 1 and len(ranks) > 1):
            return None
        terms = series.pop()
        size = {"r": 0, "oft_block_size": blocks.pop()} if len(blocks) == 1 else {"r": ranks.pop(), "oft_block_size": 0}
        said: dict[str, Any] = {"block_share": one_for_all.pop(), "coft": False, "use_cayley_neumann": bool(terms)}
        if terms:  # which files of peft before 0.18 mean otherwise
            said |= {"num_cayley_neumann_terms": len(terms), "peft_version": "0.18.0"}
        return PeftForm({**size, **said})

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        ((name, skew),) = [(name, leaves[leaf]) for name, leaf in _LEAVES.items() if leaf in leaves]
        b = _block(skew)
        if skew.ndim != 2 or b * (b - 1) // 2 != skew.shape[1]:
            raise AdapterError(f"has {_LEAVES[name]} of {tuple(skew.shape)}, which is not (blocks, b (b - 1) / 2)")
        if told.config.get("coft"):  # PEFT bounds Q whenever it is used
            bound = float(told.config.get("eps", 6e-5)) / len(skew) ** 0.5
            norm = skew.norm(dim=1, keepdim=True) * 2**0.5  # of both halves of Q
            skew = torch.where(norm > bound, skew * (bound / norm), skew)
        factors = {name: skew}
        if told.config.get("use_cayley_neumann", True):
            factors["series"] = _series(int(told.config.get("num_cayley_neumann_terms", 5)))
        if told.config.get("block_share"):
            rank = int(told.config.get("r") or 0)
        else:
            rank = len(skew)
        if not rank:
            raise AdapterError(
                f"shares one block of {b} among places that the file does not count (r is 0); set r in peft"
            )
        kind = "embedding" if name == "skew_out" else ""
        return AdaptedLayer(self.name, kind, (), factors, rank, 1.0)


def cayley(q: Tensor) -> Tensor:
    """The rotation `(I - Q)(I + Q)^-1 (.., b, b)` of a skew `Q`."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    found: Tensor = torch.linalg.solve(eye + q, eye - q)  # both are of Q alone, so their order does not matter
    return found


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """`weight (.., o, i)` times a block-diagonal matrix transposed, `blocks (.., n, b, b)`; one is for all places."""
    b = blocks.shape[-1]
    *lead, o, i = weight.shape
    cut = weight.to(blocks.dtype).reshape(*lead, o, i // b, b).transpose(-3, -2)
    return (cut @ blocks.mT).transpose(-3, -2).reshape(*lead, o, i)


def _turn(skew: Tensor, series: Tensor | None) -> Tensor:
    b = _block(skew)
    rows, columns = torch.triu_indices(b, b, 1, device=skew.device)
    flat = skew.new_zeros(*skew.shape[:-1], b * b).index_copy(-1, rows * b + columns, skew)
    upper = flat.reshape(*skew.shape[:-1], b, b)
    q = upper - upper.mT
    if series is None:
        return cayley(q)
    power = torch.eye(b, dtype=q.dtype, device=q.device).expand(q.shape)
    total = torch.zeros_like(q)
    for coefficient in series.to(q.dtype).unbind():
        total = total + coefficient * power
        power = power @ q
    return total


def _skew(factors: Mapping[str, Tensor]) -> Tensor:
    return factors["skew"] if "skew" in factors else factors["skew_out"]


def _block(skew: Tensor) -> int:
    """Side b of a block whose upper triangle has so many numbers."""
    return (1 + isqrt(1 + 8 * skew.shape[-1])) // 2


def _series(n_terms: int) -> Tensor:
    """Coefficients of PEFT's series of (I + Q)(I - Q)^-1; with 3 terms it has those of 4."""
    if n_terms <= 2:
        return torch.tensor([1.0, 2.0][:n_terms])
    n_terms = max(n_terms, 4)
    return torch.tensor([1.0, *[2.0] * (n_terms - 2), 1.0])
