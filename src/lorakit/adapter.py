"""The adapter: a value. Layer path -> named factors, parameters trained fully, a prompt, and where it came from.

On disk it is a directory: `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, and
`lorakit.json` with what PEFT's files cannot say (method, start, scale and shape per layer, the fingerprint of the base
weights, how it was made). An adapter whose method PEFT does not know keeps its own tensor names and brings no
`adapter_config.json`, so that nothing misreads it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm

from lorakit import peft_format
from lorakit._version import __version__
from lorakit.errors import AdapterError, listed
from lorakit.files import read_json, read_tensors, replaced_directory, write_json, write_tensors
from lorakit.notes import CONFIG, NOTES, WEIGHTS, digest, native, noted, read_config, rebuilt
from lorakit.prompt import Prompt
from lorakit.update import AdaptedLayer, same_tensor

FORMAT = 1
_SAMPLES = 256  # numbers taken from each weight for the fingerprint
_SERIAL = 1 << 14  # numbers that torch converts without waking its threads, which can take longer than the work


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of base weights: name, shape and 256 evenly spaced numbers of each, rounded to bfloat16.

    Rounded, so that the same base in another float precision is recognised as the same. float16 rounds elsewhere than
    bfloat16 does, so there are two hashes, with a point between them: the second rounds to float16 first (see
    `same_base`).
    """
    named = sorted(weights, key=lambda pair: pair[0])
    shapes = hashlib.sha256(repr([(name, tuple(weight.shape)) for name, weight in named]).encode())
    direct, by_half = shapes, shapes.copy()
    if named:
        with torch.no_grad():
            samples = torch.cat([_sample(weight) for _, weight in named])
        for part in torch.split(samples, _SERIAL):
            for digest, rounded in ((direct, part), (by_half, part.to(torch.float16))):
                digest.update(rounded.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return f"{direct.hexdigest()[:32]}.{by_half.hexdigest()[:32]}"


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced numbers, float32, on the CPU."""
    n_all = weight.numel()
    step = max(1, n_all // _SAMPLES)
    if weight.is_contiguous() and type(weight.data) is Tensor:
        count = min(_SAMPLES, -(-n_all // step))
        numbers = torch.as_strided(weight, (count,), (step,), weight.storage_offset())  # one call instead of two
    else:
        numbers = weight.reshape(-1)[: step * _SAMPLES : step]
    plain = numbers.dtype == torch.float32 and numbers.device.type == "cpu"
    return numbers if plain else numbers.to("cpu", torch.float32)


def same_base(x: str, y: str) -> bool:
    """Do two fingerprints tell of the same base, be it in other float precisions?

    Not recognised: bfloat16 on one side and float16 on the other, both cut from numbers that neither of them holds.
    """
    return not set(x.split(".")).isdisjoint(y.split("."))


class Known(NamedTuple):
    """A `fingerprint`, the layer paths that it was taken of, and whether of the input rows too."""

    fingerprint: str
    layers: list[str]
    rows: bool


@dataclass(frozen=True, eq=False)
class Adapter:
    """`layers`: path -> AdaptedLayer; `trained`: parameter name -> whole tensor; `meta`: base name, fingerprint ...;
    `prompt`: rows in front of every text.

    Two adapters are equal when layers, trained parameters and prompts are, bit for bit; `meta` does not count.
    """

    layers: Mapping[str, AdaptedLayer]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            self.layers.keys() == other.layers.keys()
            and self.trained.keys() == other.trained.keys()
            and all(layer.same_as(other.layers[path]) for path, layer in self.layers.items())
            and all(same_tensor(tensor, other.trained[name]) for name, tensor in self.trained.items())
            and (other.prompt is None if self.prompt is None else self.prompt.same_as(other.prompt))
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content, and tensors have no cheap hash

    @property
    def is_empty(self) -> bool:
        """It holds nothing: neither layers nor whole parameters nor a prompt."""
        return not self.layers and not self.trained and self.prompt is None

    @property
    def n_parameters(self) -> int:
        """All numbers it holds, frozen starts included; what layers share is counted once."""
        return sum(tensor.numel() for tensor in self._tensors())

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> Iterable[Tensor]:
        """Each once."""
        factors = {id(factor): factor for layer in self.layers.values() for factor in layer.factors.values()}
        return [*factors.values(), *self.trained.values(), *(self.prompt.factors.values() if self.prompt else ())]

    @property
    def digest(self) -> str:
        """A hash of every bit of it but `meta`."""
        return digest(native(self.layers, self.trained, self.prompt))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods in it, sorted."""
        return tuple(sorted({layer.method for layer in self.layers.values()}))

    @property
    def base_name(self) -> str:
        """Name or directory of the base it was made on; '' if unknown."""
        return str(self.meta.get("base_name") or "")

    @property
    def base_fingerprint(self) -> str:
        """`fingerprint` of the adapted base weights; '' if unknown."""
        return str(self.meta.get("base_fingerprint") or "")

    @property
    def bases(self) -> list[Known]:
        """What is known of the base weights; more than one where it was made of several adapters."""
        if "bases" in self.meta:
            return [Known(*known) for known in self.meta["bases"]]
        own = self.base_fingerprint
        return [Known(own, list(self.layers), self.prompt is not None)] if own else []

    def __repr__(self) -> str:
        ranks = Counter(layer.rank for layer in self.layers.values() if layer.rank)
        rank = ", rank " + "/".join(str(rank) for rank in sorted(ranks)) if ranks else ""
        trained = f", {len(self.trained)} parameters trained fully" if self.trained else ""
        trained += f", {self.prompt.method} prompt of {self.prompt.length}" if self.prompt else ""
        base = f", base '{self.base_name}'" if self.base_name else ""
        name = "+".join(self.methods) or ("prompt" if self.prompt else "empty")
        return (
            f"Adapter({name}, {len(self.layers)} layers{rank}{trained}, "
            f"{self.n_parameters:,} numbers, {self.n_bytes / 1e6:.2f} MB{base})"
        )

    def with_meta(self, **changes: Any) -> "Adapter":
        """The same adapter with changed metadata."""
        return replace(self, meta={**self.meta, **changes})

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """A copy on another device or in another precision."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:  # what is one tensor stays one; counts and places stay whole numbers
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            return moved[id(tensor)]

        layers = {
            path: replace(layer, factors={name: move(tensor) for name, tensor in layer.factors.items()})
            for path, layer in self.layers.items()
        }
        prompt = self.prompt
        if prompt is not None:
            prompt = replace(prompt, factors={name: move(factor) for name, factor in prompt.factors.items()})
        trained = {name: move(tensor) for name, tensor in self.trained.items()}
        return replace(self, layers=layers, trained=trained, prompt=prompt)

    def save(self, path: str | Path) -> None:
        """Writes the directory, whole or not at all; other files in it are kept."""
        if self.is_empty:
            raise AdapterError(f"an adapter without layers is not written to '{path}'")
        refuse_broken(self, str(path))
        told = self.meta.get("peft")
        encoded = peft_format.encode(self.layers, self.trained, self.base_name, told, self.prompt)
        tensors = encoded[0] if encoded else native(self.layers, self.trained, self.prompt)
        notes = {
            "format": FORMAT,
            "lorakit": __version__,
            "names": "peft" if encoded else "native",
            "why_native": "" if encoded else peft_format.why_no_twin(self.layers, self.trained, told, self.prompt),
            **noted(self.layers, self.trained, self.prompt),
            "digest": digest(tensors),
            "meta": dict(self.meta),
        }
        # an older configuration would make peft misread tensors that it has no names for
        with replaced_directory(Path(path), drop=() if encoded else (CONFIG,)) as work:
            write_json(work / NOTES, notes)
            seal = hashlib.sha256((work / NOTES).read_bytes()).hexdigest()
            write_tensors(work / WEIGHTS, tensors, {"lorakit": seal})
            if encoded:
                write_json(work / CONFIG, dict(sorted(encoded[1].items())))


def load(path: str | Path) -> Adapter:
    """Reads an adapter directory written by lorakit or by PEFT. Raises AdapterError that lists every fault."""
    path = Path(path)
    if not path.is_dir():
        hint = "; give the directory it stands in" if path.is_file() else ""
        raise AdapterError(f"'{path}' is not an adapter directory{hint}")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            read_tensors(path / "adapter_model.bin")  # says why a pickle is refused
        inner = path / "adapter"
        hint = f"; did you mean '{inner}'?" if (inner / WEIGHTS).is_file() else ""
        raise AdapterError(f"'{path}' holds no {WEIGHTS}{hint}")
    tensors = read_tensors(path / WEIGHTS)
    if (path / NOTES).is_file():
        adapter = _from_notes(path, tensors)
    elif (path / CONFIG).is_file():
        config = read_config(path)
        meta = {"base_name": config.get("base_model_name_or_path") or "", "peft": peft_format.kept(config)}
        layers, trained, prompt = peft_format.decode(tensors, config, str(path))
        adapter = Adapter(layers, trained, meta, prompt)
    else:
        raise AdapterError(f"'{path}' holds neither {NOTES} nor {CONFIG}; without one the scale is unknown")
    refuse_broken(adapter, str(path))
    return adapter


def refuse_broken(adapter: Adapter, place: str) -> None:
    """AdapterError that names every tensor with NaN or infinite numbers."""
    factors = [t for layer in adapter.layers.values() for t in layer.factors.values()]
    rows = adapter.prompt.factors if adapter.prompt is not None else {}
    floating = [t for t in (*factors, *adapter.trained.values(), *rows.values()) if t.is_floating_point() and t.numel()]
    scales = [layer.scale for layer in adapter.layers.values()]
    if all(map(math.isfinite, scales)) and (not floating or math.isfinite(get_total_norm(floating, math.inf))):
        return  # one pass over everything; which one it is, is asked only where something is wrong
    named = [(f"'{path}' {name}", t) for path, layer in adapter.layers.items() for name, t in layer.factors.items()]
    named += [(f"'{name}'", t) for name, t in adapter.trained.items()]
    named += [(f"the prompt's {name}", t) for name, t in rows.items()]
    bad = [name for name, t in named if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    bad += [f"'{path}' scale" for path, layer in adapter.layers.items() if not math.isfinite(layer.scale)]
    raise AdapterError(f"{place}: NaN or infinite numbers in {listed(bad)}")


def _from_notes(path: Path, tensors: dict[str, Tensor]) -> Adapter:
    notes = read_json(path / NOTES)
    with safe_open(path / WEIGHTS, framework="pt") as stream:
        seal = (stream.metadata() or {}).get("lorakit")
    if not isinstance(notes, dict) or notes.get("format") != FORMAT:
        found = notes.get("format") if isinstance(notes, dict) else None
        raise AdapterError(f"'{path / NOTES}' has format {found!r}; lorakit {__version__} reads format {FORMAT}")
    if seal != hashlib.sha256((path / NOTES).read_bytes()).hexdigest():
        raise AdapterError(
            f"'{path / NOTES}' and '{WEIGHTS}' do not belong together (one of them was replaced or edited); "
            f"restore both, or delete {NOTES} to read the directory as a plain PEFT adapter"
        )
    layers, trained, prompt = rebuilt(tensors, notes, path)
    return Adapter(layers, trained, notes["meta"], prompt)
