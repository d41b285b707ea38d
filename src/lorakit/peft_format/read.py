"""Reads PEFT's format: (tensors, adapter_config.json) -> adapter layers. Strict: all faults of a file at once.

Where notes of ours say which layers there are, they are looked for; otherwise names and configuration tell.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from lorakit.errors import AdapterError, listed
from lorakit.method import METHODS, Told
from lorakit.peft_format import norms, prompts
from lorakit.peft_format.config import (
    Ranks,
    foreign_faults,
    is_bias_saved,
    is_feedforward,
    is_of,
    is_saved,
    is_target,
    newer_than_checked,
    read_types,
    type_faults,
)
from lorakit.peft_format.names import (
    PREFIX,
    NoTwinError,
    Wrapped,
    attention_host,
    attention_hosts,
    original,
    wrapped_parameter,
)
from lorakit.peft_layout import OUT_PROJ_TIMES, kind_of_pair, out_proj_share, pair_from_peft, stored_shape
from lorakit.prompt import Prompt
from lorakit.update import AdaptedLayer

_CONV = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
_EMBEDDINGS = frozenset(  # what PEFT saves with save_embedding_layers, by the names models have for it
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings"}
)

_ROOT = "base_model."

Layers = Mapping[str, AdaptedLayer]
Decoded = tuple[dict[str, AdaptedLayer], dict[str, Tensor], Prompt | None]


def decode(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    known: Layers | None = None,
    known_trained: frozenset[str] | None = None,
) -> Decoded:
    """Layers, fully trained parameters and a prompt from PEFT's tensors and configuration.

    `known`: the layers that must be there, without factors, and `known_trained` the parameters, where notes tell them;
    otherwise the names and the configuration do. Raises AdapterError that lists every fault: unknown tensor, missing
    half, rank that contradicts the configuration, options that lorakit lacks.
    """
    peft_type = config.get("peft_type")
    if peft_type == norms.TYPE:
        return {}, norms.decode(tensors, source), None
    if peft_type in prompts.types():
        return {}, *prompts.decode(tensors, config, source)
    if peft_type not in read_types():
        raise AdapterError(f"{source}: peft_type is {peft_type!r}; lorakit reads {', '.join(read_types())}")
    faults = foreign_faults(config)
    wrong = type_faults(config)
    if wrong:
        raise AdapterError(f"{source}: {listed([*wrong, *faults])}")
    common = _common(tensors, config)
    own = {key: tensor for key, tensor in tensors.items() if key.removeprefix(_ROOT) not in common}
    leaves, trained = _sorted_out(own, config, known_trained, faults)
    paths = _paths(leaves, config, known, faults)
    hosts = attention_hosts(set(paths.values()))
    if hosts and known is None and newer_than_checked(config):
        faults.append(
            f"'{min(hosts)}' is an nn.MultiheadAttention of peft {newer_than_checked(config)}; lorakit knows how PEFT "
            "applies its out_proj up to 0.21.2 only"
        )
    ranks = Ranks(config)
    layers: dict[str, AdaptedLayer] = {}
    for module, own in leaves.items():
        if module not in paths:
            continue
        path = paths[module]
        try:
            layers[path] = _layer(path, own, config, ranks, hosts, known[path] if known else None, common)
        except AdapterError as error:
            faults.append(str(error))
    if not leaves and not faults:
        faults.append("no low-rank tensor in the file")
    if faults:
        raise AdapterError(f"{source}: {listed(faults)}")
    _undo_out_proj(layers, hosts, known)
    return layers, trained, None


def _common(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a file holds once for all layers, without its prefix."""
    names = {name for method in METHODS if is_of(method, config) for name in method.peft_common}
    return {name: tensors[_ROOT + name] for name in names if _ROOT + name in tensors}


@cache
def _leaf_pattern() -> re.Pattern[str]:
    """A name in a file: the wrapper's path, and what of the layer it is."""
    names = {name for method in METHODS for name in method.peft_leaves}
    found = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?P<module>.+?)\.(?P<leaf>{found})(?:(?<=_vector)\.weight)?")


def _sorted_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], known: frozenset[str] | None, faults: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Wrapper -> leaves, and parameter -> whole tensor."""
    leaves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    trained: dict[str, Tensor] = {}
    of_layer = _leaf_pattern()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = of_layer.fullmatch(name)
        if name == key:
            faults.append(f"tensor '{key}' does not begin with '{PREFIX}'")
        elif match:
            leaves[match["module"]][match["leaf"]] = tensor
            if not tensor.is_floating_point():
                faults.append(f"tensor '{key}' holds {tensor.dtype}; factors are floating-point numbers")
        elif ".original_module." in name or ".modules_to_save." in name:
            continue  # PEFT writes them with bias = "all": the bias of the base, and a second copy of the trained one
        elif original(name) in known if known is not None else _is_trained(name, config):
            trained[original(name)] = tensor
        else:
            faults.append(f"unknown tensor '{key}' {tuple(tensor.shape)}")
    if known is not None:
        faults += [f"tensor '{name}' is missing" for name in sorted(known - trained.keys())]
    return leaves, trained


def _is_trained(name: str, config: Mapping[str, Any]) -> bool:
    host, _, leaf = name.rpartition(".")
    if is_saved(config, name):
        return True
    if leaf == "bias" and is_bias_saved(config):
        return config["bias"] == "all" or host.endswith(".base_layer")
    return leaf in ("weight", "bias") and original(host).rpartition(".")[2] in _EMBEDDINGS


def _paths(
    leaves: Mapping[str, Any], config: Mapping[str, Any], known: Layers | None, faults: list[str]
) -> dict[str, str]:
    """Wrapper -> layer path."""
    if known is not None:
        try:
            wrapped = Wrapped(known)
        except NoTwinError as error:
            faults.append(f"lorakit.json: {error}")
            return {}
        paths = {wrapped.module_of(path): path for path in known}
        faults += [f"layer '{path}' is missing" for module, path in paths.items() if module not in leaves]
        faults += [f"layer '{original(module)}' is not in lorakit.json" for module in leaves if module not in paths]
        return {module: path for module, path in paths.items() if module in leaves}
    found: dict[str, str] = {}
    parameters = config.get("target_parameters") or ()
    n_wrappers = Counter(original(module) for module in leaves)
    for module in leaves:
        path = original(module)
        if f"{module}.base_layer.out_proj" in leaves:
            found[module] = f"{path}.in_proj_weight"
        elif n_wrappers[path] == 1 and (not parameters or is_target(config, path)):
            found[module] = path
        else:
            try:
                found[module] = wrapped_parameter(module, n_wrappers[path], parameters) or path
            except AdapterError as error:
                faults.append(str(error))
    return found


def _layer(
    path: str,
    leaves: Mapping[str, Tensor],
    config: Mapping[str, Any],
    ranks: Ranks,
    hosts: set[str],
    known: AdaptedLayer | None,
    common: Mapping[str, Tensor],
) -> AdaptedLayer:
    if config["peft_type"] == "IA3":
        return _gain(path, leaves, config)
    if config["peft_type"] != "LORA":
        entry = next(method for method in METHODS if is_of(method, config))
        foreign = sorted(leaves.keys() - entry.peft_leaves)
        if foreign:
            raise AdapterError(f"'{path}' has {', '.join(foreign)}, which adapter_config.json does not announce")
        told = Told(config, ranks.rank(path), ranks.scale(path), common)
        try:
            return entry.read_peft(leaves, told)
        except KeyError as error:
            raise AdapterError(f"'{path}' lacks {error.args[0]}; the file is incomplete") from None
        except AdapterError as error:
            raise AdapterError(f"'{path}' {error}") from None
    method = "dora" if config.get("use_dora") else "lora"
    _whole(path, leaves, method)
    key = attention_host(path, hosts) or path
    declared = ranks.rank(key)
    embedding = "lora_embedding_A" in leaves
    a = leaves["lora_embedding_A" if embedding else "lora_A.weight"]
    b = leaves["lora_embedding_B" if embedding else "lora_B.weight"]
    if a.ndim < 2 or b.ndim != a.ndim:
        raise AdapterError(f"'{path}': lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}; they are no pair")
    if "lora_B.bias" in leaves and leaves["lora_B.bias"].shape != b.shape[:1]:
        raise AdapterError(f"'{path}': lora_B.bias is {tuple(leaves['lora_B.bias'].shape)}; it must be ({b.shape[0]},)")
    experts = 0
    bare = known.kind == "parameter" if known else _is_bare(path, config, hosts)
    if bare and a.shape[0] == b.shape[1] and a.shape[0] % declared == 0 and key == path:
        experts = a.shape[0] // declared
        experts = 0 if experts == 1 and (known is None or len(known.shape) == 2) else experts
    elif a.ndim > 2 and a.shape[0] > b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise AdapterError(
            f"'{path}' is a convolution with {a.shape[0] // b.shape[1]} groups, where PEFT's pair is no low-rank "
            "change of the weight (PEFT cannot merge it either); lorakit cannot read it"
        )
    elif a.shape[0] != b.shape[1]:
        raise AdapterError(f"'{path}': lora_A has rank {a.shape[0]} and lora_B rank {b.shape[1]}")
    elif a.shape[0] != declared:
        raise AdapterError(f"'{path}' has rank {a.shape[0]}, adapter_config.json says {declared}")
    kind = "parameter" if bare else kind_of_pair(leaves, config)
    factors = pair_from_peft(leaves, experts) if experts else METHODS[method].from_peft(leaves, kind)
    start = config.get("init_lora_weights", True)
    start = "kaiming" if start is True else start if isinstance(start, str) else ""
    return AdaptedLayer(method, kind, stored_shape(kind, leaves, factors), factors, declared, ranks.scale(key), start)


def _is_bare(path: str, config: Mapping[str, Any], hosts: set[str]) -> bool:
    if path.endswith(".in_proj_weight") and attention_host(path, hosts):
        return True
    targets = tuple(config.get("target_parameters") or ())
    return any(path == t or path.endswith(f".{t}") for t in targets) and not is_target(config, path)


def _whole(path: str, leaves: Mapping[str, Tensor], method: str) -> None:
    embedding = any("embedding" in leaf for leaf in leaves)
    needed = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A.weight", "lora_B.weight"}
    if method == "dora":
        needed.add("lora_magnitude_vector")
    missing = sorted(needed - set(leaves))
    extra = sorted(set(leaves) - needed - ({"lora_B.bias"} if method == "lora" and not embedding else set()))
    if missing:
        raise AdapterError(f"'{path}' lacks {', '.join(missing)}; the file is incomplete")
    if extra:
        raise AdapterError(f"'{path}' has {', '.join(extra)}, which adapter_config.json does not announce")


def _gain(path: str, leaves: Mapping[str, Tensor], config: Mapping[str, Any]) -> AdaptedLayer:
    if set(leaves) != {"ia3_l"}:
        raise AdapterError(f"'{path}' has {', '.join(sorted(leaves))} in an IA3 adapter; only 'ia3_l' belongs there")
    vector = leaves["ia3_l"]
    if vector.ndim < 2 or max(vector.shape) != vector.numel():
        raise AdapterError(f"'{path}': ia3_l is {tuple(vector.shape)}; it must be a vector with sides of 1")
    kind = _CONV.get(vector.ndim, "hf_conv1d" if config.get("fan_in_fan_out") else "linear")
    told = is_feedforward(config, path)
    inward = vector.shape[0] == 1 if kind in ("linear", "hf_conv1d") and vector.numel() > 1 else told
    if inward != told:
        raise AdapterError(f"'{path}': ia3_l is {tuple(vector.shape)}, which contradicts feedforward_modules")
    if inward and kind not in ("linear", "hf_conv1d"):
        raise AdapterError(f"'{path}' scales the input channels of a convolution, which lorakit cannot do")
    factors = METHODS["ia3"].from_peft({"ia3_l.in" if inward else "ia3_l": vector}, kind)
    return AdaptedLayer("ia3", kind, (), factors)


def _undo_out_proj(layers: dict[str, AdaptedLayer], hosts: set[str], known: Layers | None) -> None:
    """The scale that PEFT really gives to out_proj, and its tensors as they were before `_as_peft_applies`."""
    for host in hosts:
        inner, outer = layers[f"{host}.in_proj_weight"], layers[f"{host}.out_proj"]
        share = 1.0
        if known:
            share = out_proj_share(known[f"{host}.in_proj_weight"], known[f"{host}.out_proj"]) or 1.0
        if "bias" in inner.factors:  # PEFT writes one and never applies it
            pair = {name: inner.factors[name] for name in ("a", "b")}
            layers[f"{host}.in_proj_weight"] = replace(inner, factors=pair)
        factors = {name: f / share if name == "b" else f for name, f in outer.factors.items()}
        if "bias" in factors:
            factors["bias"] = factors["bias"] / (OUT_PROJ_TIMES * share)
        layers[f"{host}.out_proj"] = replace(outer, factors=factors, scale=outer.scale * OUT_PROJ_TIMES * share)
