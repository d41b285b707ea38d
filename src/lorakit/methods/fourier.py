"""FourierFT: the change as a few frequencies, at random places of its spectrum (Gao et al., ICML 2024).

`delta = scale * real(ifft2(S))`, `S (o, i)` zero but for the trained numbers. Where they stand follows from a seed:
the first places of a random order of all. Gaps between frequencies do not matter, so places are kept flat.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.method import METHODS, Factors, Held, Method, PeftForm, ReadWeight, Told
from lorakit.peft_layout import pattern
from lorakit.plan import LayerPlan
from lorakit.update import AdaptedLayer, LayerSpec, Update

_SEED = 777  # PEFT's, when it is not told


@METHODS.add
class Fourier(Method):
    """A sparse spectrum; `rank * sqrt(o i)` frequencies."""

    name = "fourier"
    formula = "scale * real(ifft2(spectrum at random places))"
    parameters = "r sqrt(o i)"
    use = "tiny files; changes that are spread over the whole weight"
    source = "Gao et al., ICML 2024, arXiv 2405.03003"
    pace = 30.0
    frozen = frozenset({"seed"})
    scale = 150.0
    takes_start = False
    exact_pair = False
    peft_type = "FOURIERFT"
    peft_leaves = frozenset({"fourierft_spectrum"})

    def shapes(self, spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"spectrum": (*spec.batch, min(rank * round((o * i) ** 0.5), o * i)), "seed": ()}

    def expected(self, spec: LayerSpec, layer: AdaptedLayer) -> dict[str, tuple[int, ...]]:
        o, i = spec.matrix
        return {"spectrum": (*spec.batch, min(layer.factors["spectrum"].shape[-1], o * i)), "seed": ()}

    def init(self, spec: LayerSpec, plan: LayerPlan, weight: Held, generator: torch.Generator) -> Factors:
        return {"spectrum": torch.zeros(self.shapes(spec, plan.rank)["spectrum"]), "seed": torch.tensor(_SEED)}

    def derived(self, factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Factors:
        (o, i), n = shape[-2:], factors["spectrum"].shape[-1]
        order = torch.randperm(o * i, generator=torch.Generator().manual_seed(int(factors["seed"])))
        return {"places": order[:n].to(factors["spectrum"].device)}

    def update(self, factors: Mapping[str, Tensor], scale: float, weight: ReadWeight) -> Update:
        numbers, shape = factors["spectrum"], weight.shape
        flat = numbers.new_zeros(*shape[:-2], shape[-2] * shape[-1])
        places = factors["places"].expand(numbers.shape)
        spectrum = flat.scatter(-1, places, numbers).reshape(shape)
        return Update(dense=scale * torch.fft.ifft2(spectrum).real)

    def to_peft(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        if layer.kind not in ("linear", "hf_conv1d", ""):
            return None
        return {"fourierft_spectrum": layer.factors["spectrum"]}

    def write_peft(self, layers: Mapping[str, AdaptedLayer]) -> PeftForm | None:
        """None where layers have unlike seeds or scales, of which PEFT has one each, or a name ends another."""
        said = {(int(layer.factors["seed"]), layer.scale) for layer in layers.values()}
        if len(said) > 1:
            return None
        seed, scale = said.pop()
        counts = {path: len(layer.factors["spectrum"]) for path, layer in layers.items()}
        common = pattern(counts)[0]
        own = {path: count for path, count in counts.items() if count != common}  # PEFT takes a path for its own end
        if any(other.endswith(f".{path}") for path in own for other in counts):
            return None
        return PeftForm({"n_frequency": common, "n_frequency_pattern": own, "scaling": scale, "random_loc_seed": seed})

    def read_peft(self, leaves: Mapping[str, Tensor], told: Told) -> AdaptedLayer:
        spectrum, seed = leaves["fourierft_spectrum"], told.config.get("random_loc_seed", _SEED)
        if spectrum.ndim != 1 or not isinstance(seed, int):
            raise AdapterError(f"has a spectrum of {tuple(spectrum.shape)} and random_loc_seed {seed!r}")
        factors = {"spectrum": spectrum, "seed": torch.tensor(seed)}
        return AdaptedLayer(self.name, "", (), factors, 1, float(told.config.get("scaling", 150.0)))
