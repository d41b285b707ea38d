"""The adapter: a value. Layer path -> named factors, parameters trained fully, and where it came from.

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
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm

from lorakit import peft_format
from lorakit._version import __version__
from lorakit.errors import AdapterError, listed
from lorakit.files import read_json, read_tensors, replaced_directory, write_json, write_tensors
from lorakit.method import METHODS
from lorakit.update import AdaptedLayer, same_tensor

FORMAT = 1
WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
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


@dataclass(frozen=True, eq=False)
class Adapter:
    """`layers`: path -> AdaptedLayer; `trained`: parameter name -> whole tensor; `meta`: base name, fingerprint ...

    Two adapters are equal when layers and trained parameters are, bit for bit; `meta` does not count.
    """

    layers: Mapping[str, AdaptedLayer]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            self.layers.keys() == other.layers.keys()
            and self.trained.keys() == other.trained.keys()
            and all(layer.same_as(other.layers[path]) for path, layer in self.layers.items())
            and all(same_tensor(tensor, other.trained[name]) for name, tensor in self.trained.items())
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content, and tensors have no cheap hash

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
        return [*factors.values(), *self.trained.values()]

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

    def __repr__(self) -> str:
        ranks = Counter(layer.rank for layer in self.layers.values() if layer.rank)
        rank = ", rank " + "/".join(str(rank) for rank in sorted(ranks)) if ranks else ""
        trained = f", {len(self.trained)} parameters trained fully" if self.trained else ""
        base = f", base '{self.base_name}'" if self.base_name else ""
        return (
            f"Adapter({'+'.join(self.methods) or 'empty'}, {len(self.layers)} layers{rank}{trained}, "
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
        return replace(self, layers=layers, trained={name: move(tensor) for name, tensor in self.trained.items()})

    def save(self, path: str | Path) -> None:
        """Writes the directory, whole or not at all; other files in it are kept."""
        if not self.layers and not self.trained:
            raise AdapterError(f"an adapter without layers is not written to '{path}'")
        refuse_broken(self, str(path))
        encoded = peft_format.encode(self.layers, self.trained, self.base_name, self.meta.get("peft"))
        factors = _named(self.layers)
        shared = _shared(factors)
        own = {key: factor for key, factor in factors.items() if key not in shared}
        tensors = encoded[0] if encoded else {**own, **{f"{n}:trained": t for n, t in self.trained.items()}}
        notes = {
            "format": FORMAT,
            "lorakit": __version__,
            "names": "peft" if encoded else "native",
            "why_native": "" if encoded else peft_format.why_no_twin(self.layers, self.trained),
            "layers": {path: _note(layer) for path, layer in self.layers.items()},
            "trained": sorted(self.trained),
            "shared": shared,
            "digest": _digest(tensors),
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
        config = _read_config(path)
        layers, trained = peft_format.decode(tensors, config, str(path))
        meta = {"base_name": config.get("base_model_name_or_path") or "", "peft": peft_format.kept(config)}
        adapter = Adapter(layers, trained, meta)
    else:
        raise AdapterError(f"'{path}' holds neither {NOTES} nor {CONFIG}; without one the scale is unknown")
    refuse_broken(adapter, str(path))
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise AdapterError(f"'{path / CONFIG}' is not a JSON object")
    return config


def _note(layer: AdaptedLayer) -> dict[str, Any]:
    return {
        "method": layer.method,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "scale": layer.scale,
        "start": layer.start,
        "groups": layer.groups,
        "peculiar": layer.peculiar,
        "matrix": list(layer.matrix),
        "factors": sorted(layer.factors),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of every bit of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """All factors by our own names, those in several layers too."""
    return {f"{path}:{name}": factor for path, layer in layers.items() for name, factor in layer.factors.items()}


def _shared(factors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of factors that stand in several layers: `path:name` -> where the same tensor stands first."""
    first: dict[int, str] = {}
    return {key: first[id(x)] for key, x in factors.items() if first.setdefault(id(x), key) != key}


def _tied(layers: dict[str, AdaptedLayer], shared: Mapping[str, str]) -> dict[str, AdaptedLayer]:
    """The layers with what they share made one tensor again, where a file holds it several times."""
    made = dict(layers)
    for key, first in shared.items():
        (path, _, name), (holder, _, theirs) = key.rpartition(":"), first.rpartition(":")
        factor = made[holder].factors[theirs]
        if same_tensor(made[path].factors[name], factor):
            made[path] = replace(made[path], factors={**made[path].factors, name: factor})
    return made


def refuse_broken(adapter: Adapter, place: str) -> None:
    """AdapterError that names every tensor with NaN or infinite numbers."""
    factors = [t for layer in adapter.layers.values() for t in layer.factors.values()]
    floating = [t for t in (*factors, *adapter.trained.values()) if t.is_floating_point() and t.numel()]
    scales = [layer.scale for layer in adapter.layers.values()]
    if all(map(math.isfinite, scales)) and (not floating or math.isfinite(get_total_norm(floating, math.inf))):
        return  # one pass over everything; which one it is, is asked only where something is wrong
    named = [(f"'{path}' {name}", t) for path, layer in adapter.layers.items() for name, t in layer.factors.items()]
    named += [(f"'{name}'", t) for name, t in adapter.trained.items()]
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
    rebuild = _from_peft_names if notes["names"] == "peft" else _from_native_names
    layers, trained = rebuild(tensors, notes, path)
    if notes.get("digest") != _digest(tensors):
        raise AdapterError(f"the tensors in '{path / WEIGHTS}' are not those that were saved; the file is damaged")
    return Adapter(_tied(layers, notes.get("shared", {})), trained, notes["meta"])


def _blank(note: Mapping[str, Any], factors: dict[str, Tensor]) -> AdaptedLayer:
    rest = {key: note[key] for key in ("rank", "scale", "start", "groups", "peculiar")}
    matrix = tuple(note.get("matrix", ()))
    return AdaptedLayer(note["method"], note["kind"], tuple(note["shape"]), factors, **rest, matrix=matrix)


def _from_native_names(
    tensors: Mapping[str, Tensor], notes: Mapping[str, Any], path: Path
) -> tuple[dict[str, AdaptedLayer], dict[str, Tensor]]:
    wanted = {f"{layer}:{name}" for layer, note in notes["layers"].items() for name in note["factors"]}
    wanted |= {f"{name}:trained" for name in notes["trained"]}
    shared = notes.get("shared", {})
    tensors = {**tensors, **{name: tensors[first] for name, first in shared.items() if first in tensors}}
    faults = [f"tensor '{name}' is missing" for name in sorted(wanted - set(tensors))]
    faults += [f"unknown tensor '{name}'" for name in sorted(set(tensors) - wanted)]
    if faults:
        raise AdapterError(f"{path}: {listed(faults)}")
    layers = {
        layer: _blank(note, {name: tensors[f"{layer}:{name}"] for name in note["factors"]})
        for layer, note in notes["layers"].items()
    }
    return layers, {name: tensors[f"{name}:trained"] for name in notes["trained"]}


def _from_peft_names(
    tensors: Mapping[str, Tensor], notes: Mapping[str, Any], path: Path
) -> tuple[dict[str, AdaptedLayer], dict[str, Tensor]]:
    """PEFT's names tell which tensor is which; the notes tell what they mean, and both must say the same."""
    config = _read_config(path)
    known = {name: _blank(note, {}) for name, note in notes["layers"].items()}
    found, trained = peft_format.decode(tensors, config, str(path), known, frozenset(notes["trained"]))
    faults: list[str] = []
    layers: dict[str, AdaptedLayer] = {}
    for name, note in notes["layers"].items():
        layer, scale = found[name], float(note["scale"])
        method = METHODS[note["method"]]
        if method.takes_rank and method.takes_scale and abs(layer.scale - scale) > 1e-6 * abs(scale):
            faults.append(f"'{name}' has scale {layer.scale:g} by {CONFIG} and {scale:g} by {NOTES}")
        factors = _split_start(dict(layer.factors), note)
        lacking = [factor for factor in note["factors"] if factor not in factors]
        faults += [f"'{name}' lacks factor '{factor}'" for factor in lacking]
        layers[name] = _blank(note, {factor: factors[factor] for factor in note["factors"] if factor not in lacking})
    if faults:
        raise AdapterError(f"{path}: {listed(faults)}; correct {CONFIG}, or delete {NOTES} if the change is meant")
    return layers, trained


def _split_start(factors: dict[str, Tensor], note: Mapping[str, Any]) -> dict[str, Tensor]:
    """A pair of width 2r that PEFT reads as plain LoRA, back into the trained pair and its frozen start."""
    if "a0" not in note["factors"]:
        return factors
    r = note["rank"]
    a, b = factors["a"], factors["b"]
    return {
        **factors,
        "a": a[..., :r, :].contiguous(),
        "b": b[..., :r].contiguous(),
        "a0": a[..., r:, :].contiguous(),
        "b0": -b[..., r:].contiguous(),
    }
