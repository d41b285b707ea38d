"""BOFT: inputs turned by few sparse rotations, as in a butterfly network, and outputs scaled (Liu et al., ICLR 2024).

`W' = diag(s) W B^T`, `B = F_m .. F_1`. Each factor turns `rank` blocks of b channels, the k-th of channels that stand
b 2^(k-1) apart: so every channel meets others than its neighbours. Blocks are Cayley transforms of `(M - M^T) / 2`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.methods.oft import cayley, turned
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update


@METHODS.add
class Boft(Method):
    """Butterfly factors of rotations, and a gain on the outputs."""

    name = "boft"
    formula = "diag(s) @ W @ B^T - W, B of butterfly factors with r blocks each"
    parameters = "2 i^2 / r + o (i^2 / r + o where blocks cannot be halved)"
    use = "as oft, with channels mixed further; more numbers the lower r is"
    source = "Liu et al., ICLR 2024, arXiv 2311.06243"
    pace = 0.3
    scale = 1.0
    takes_scale = False
    takes_start = False
    reads_weight = True
    exact_pair = False
    peft_type = "BOFT"
    peft_leaves = frozenset({"boft_R", "boft_s"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        b = i // rank
        n_factors = 2 if b % 2 == 0 and rank % 2 == 0 else 1
        return {"turns": (*spec.batch, n_factors, rank, b, b), "gain": (*spec.batch, o)}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        wanted, n = self.shapes(spec, layer.rank), layer.factors["turns"].shape[-4]
        _, rank, b, _ = wanted["turns"][-4:]
        fits = n == 1 or (b % 2 == 0 and rank % 2 ** (n - 1) == 0)
        return {**wanted, "turns": (*spec.batch, n, rank, b, b)} if fits else wanted

    def faults(self, spec: LayerSpec, plan: LayerPlan) -> list[str]:
        found, i = super().faults(spec, plan), spec.matrix[1]
        if spec.kind == "embedding":
            return [f"boft turns inputs, and the embedding '{spec.path}' has none; oft turns its outputs"]
        if not found and (i % plan.rank or i == plan.rank):
            return [f"boft divides the {i} inputs of '{spec.path}' into rank {plan.rank} blocks of 2 or more each"]
        return found

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        shapes = self.shapes(spec, plan.rank)
        return {"turns": torch.zeros(shapes["turns"]), "gain": torch.ones(shapes["gain"])}

    def derived(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
        n, _, b, _ = factors["turns"].shape[-4:]
        orders = torch.stack([_order(shape[-1], b, k) for k in range(n)]).to(factors["turns"].device)
        return {"orders": orders, "back": orders.argsort(-1)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        base, turns = weight(), factors["turns"]
        changed = base.to(turns.dtype)
        for k in range(turns.shape[-4]):
            m = turns[..., k, :, :, :]
            blocks = cayley((m - m.mT) / 2)
            changed = turned(changed[..., factors["back"][k]], blocks)[..., factors["orders"][k]]
        return Update(dense=changed - base, gain=factors["gain"])

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        square = layer.kind != "conv2d" or (layer.groups == 1 and len(set(layer.shape[2:])) < 2)
        if layer.kind not in ("linear", "conv2d", "") or not square:
            return None
        gain = layer.factors["gain"]
        return {"boft_R": layer.factors["turns"], "boft_s": gain[None] if layer.kind == "conv2d" else gain[:, None]}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where layers have unlike numbers of blocks and unlike blocks, or of factors."""
        shapes = {tuple(layer.factors["turns"].shape[-4:-1]) for layer in layers.values()}
        n_factors, n_blocks, sizes = (set(column) for column in zip(*shapes))
        if len(n_factors) > 1 or (len(n_blocks) > 1 and len(sizes) > 1):
            return None
        size = {"boft_block_size": sizes.pop(), "boft_block_num": 0}
        if sizes:
            size = {"boft_block_size": 0, "boft_block_num": n_blocks.pop()}
        return PeftForm({**size, "boft_n_butterfly_factor": n_factors.pop()})

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        turns, gain = leaves["boft_R"], leaves["boft_s"]
        if turns.ndim != 4 or turns.shape[2] != turns.shape[3] or gain.ndim != 2 or min(gain.shape) != 1:
            raise AdapterError(f"has boft_R {tuple(turns.shape)} and boft_s {tuple(gain.shape)}; they are no rotation")
        factors = {"turns": turns, "gain": gain.flatten()}
        return AdaptedLayer(self.name, "conv2d" if len(gain) == 1 < gain.shape[1] else "", (), factors, turns.shape[1])


def _order(n: int, b: int, k: int) -> Tensor:
    """Where the k-th factor takes its channels from: in groups of b 2^k, the even halves of blocks before the odd."""
    group = b << k
    if k == 0:
        return torch.arange(n)
    halves = torch.arange(n).reshape(n // group, group // (b // 2), b // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).flatten()
