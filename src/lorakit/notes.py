"""lorakit.json: what the tensors of an adapter mean, where names and configuration of PEFT's cannot say it."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import peft_format
from lorakit.errors import AdapterError, listed
from lorakit.files import read_json
from lorakit.method import METHODS
from lorakit.prompt import Prompt, Sizes
from lorakit.update import AdaptedLayer, same_tensor

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
_PROMPT = "[prompt]"  # in the place of a layer path

Parts = tuple[dict[str, AdaptedLayer], dict[str, Tensor], Prompt | None]


def noted(layers: Mapping[str, AdaptedLayer], trained: Mapping[str, Tensor], prompt: Prompt | None) -> dict[str, Any]:
    """What is told of the parts of an adapter."""
    return {
        "layers": {path: _note(layer) for path, layer in layers.items()},
        "trained": sorted(trained),
        "prompt": None if prompt is None else _prompt_note(prompt),
        "shared": _shared(_named(layers)),
    }


def native(
    layers: Mapping[str, AdaptedLayer], trained: Mapping[str, Tensor], prompt: Prompt | None
) -> dict[str, Tensor]:
    """All tensors by our own names, each once."""
    factors = _named(layers)
    shared = _shared(factors)
    found = {key: factor for key, factor in factors.items() if key not in shared}
    if prompt is not None:
        found |= {f"{_PROMPT}:{name}": factor for name, factor in prompt.factors.items()}
    return {**found, **{f"{name}:trained": tensor for name, tensor in trained.items()}}


def rebuilt(tensors: Mapping[str, Tensor], notes: Mapping[str, Any], path: Path) -> Parts:
    """Layers, whole parameters and prompt by the notes beside the tensors. AdapterError where they do not agree."""
    rebuild = _from_peft_names if notes["names"] == "peft" else _from_native_names
    layers, trained, prompt = rebuild(tensors, notes, path)
    if notes.get("digest") != digest(tensors):
        raise AdapterError(f"the tensors in '{path / WEIGHTS}' are not those that were saved; the file is damaged")
    return _tied(layers, notes.get("shared", {})), trained, prompt


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration in a directory."""
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


def _prompt_note(prompt: Prompt) -> dict[str, Any]:
    own = {"method": prompt.method, "sizes": list(prompt.sizes), "start": prompt.start}
    return {**own, "factors": sorted(prompt.factors)}


def digest(tensors: Mapping[str, Tensor]) -> str:
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


def _blank(note: Mapping[str, Any], factors: dict[str, Tensor]) -> AdaptedLayer:
    rest = {key: note[key] for key in ("rank", "scale", "start", "groups", "peculiar")}
    matrix = tuple(note.get("matrix", ()))
    return AdaptedLayer(note["method"], note["kind"], tuple(note["shape"]), factors, **rest, matrix=matrix)


def _blank_prompt(notes: Mapping[str, Any]) -> Prompt | None:
    """The prompt without its factors."""
    note = notes.get("prompt")
    return Prompt(note["method"], Sizes(*note["sizes"]), {}, note["start"]) if note else None


def _from_native_names(tensors: Mapping[str, Tensor], notes: Mapping[str, Any], path: Path) -> Parts:
    wanted = {f"{layer}:{name}" for layer, note in notes["layers"].items() for name in note["factors"]}
    wanted |= {f"{name}:trained" for name in notes["trained"]}
    blank = _blank_prompt(notes)
    wanted |= {f"{_PROMPT}:{name}" for name in notes["prompt"]["factors"]} if blank is not None else set()
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
    if blank is not None:
        blank = replace(blank, factors={name: tensors[f"{_PROMPT}:{name}"] for name in notes["prompt"]["factors"]})
    return layers, {name: tensors[f"{name}:trained"] for name in notes["trained"]}, blank


def _from_peft_names(tensors: Mapping[str, Tensor], notes: Mapping[str, Any], path: Path) -> Parts:
    """PEFT's names tell which tensor is which; the notes tell what they mean, and both must say the same."""
    config = read_config(path)
    known = {name: _blank(note, {}) for name, note in notes["layers"].items()}
    found, trained, prompt = peft_format.decode(tensors, config, str(path), known, frozenset(notes["trained"]))
    blank = _blank_prompt(notes)
    if prompt is not None and blank is not None:
        prompt = replace(blank, factors=prompt.factors)
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
    return layers, trained, prompt


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
