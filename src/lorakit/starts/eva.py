"""eva: `a` begins as the directions in which a layer's inputs vary most, and ranks go where more is explained by them.

Paischer et al., 2024, "One initialization to rule them all". `a` are the leading eigenvectors of the inputs'
covariance, `b` is zero. Of all layers' explained shares, up to twice the rank of each, the largest are taken, as many
as ranks were planned: a layer may end with none.
"""

from collections.abc import Mapping

import torch

from lorakit.method import STARTS, Held, Measured, Pair, Start
from lorakit.update import LayerSpec

_MOST = 2  # times the planned rank


@STARTS.add
class Eva(Start):
    """Principal components of the inputs."""

    name = "eva"
    use = "faster early learning, ranks by the data; reads some batches first"
    source = "Paischer et al., 2024, arXiv 2410.07170"
    needs = frozenset({"inputs"})
    free = True

    def pair(self, spec: LayerSpec, rank: int, scale: float, weight: Held, generator: torch.Generator) -> Pair:
        o, _ = spec.matrix
        components = torch.linalg.eigh(_covariance(weight.known)).eigenvectors.flip(-1)
        return Pair(components[:, :rank].T.float().contiguous(), torch.zeros(o, rank))

    def ranks(self, layers: Mapping[str, tuple[LayerSpec, int, Measured]]) -> dict[str, int]:
        shares: list[tuple[float, str]] = []
        for path, (spec, rank, measured) in layers.items():
            values = torch.linalg.eigvalsh(_covariance(measured)).flip(-1).clamp_min(0)
            explained = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
            shares += [(float(share), path) for share in explained[: min(_MOST * rank, spec.max_rank)]]
        budget = sum(rank for _, rank, _ in layers.values())
        taken = [path for _, path in sorted(shares, key=lambda pair: -pair[0])[:budget]]
        return {path: taken.count(path) for path in layers}


def _covariance(measured: Measured) -> torch.Tensor:
    assert measured.inputs is not None
    assert measured.mean is not None
    mean = measured.mean.double().cpu()
    return measured.inputs.double().cpu() - torch.outer(mean, mean)
