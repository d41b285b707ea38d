"""Writes PEFT's format: adapter layers -> (tensor names, adapter_config.json), or the reason why PEFT has no twin.

Only what changes the meaning stands in the configuration, each key as peft 0.21.2 names it; every reader finds the
ones that it demands (vLLM: r, lora_alpha, target_modules; llama.cpp's converter: lora_alpha, base_model_name_or_path).
Scales are written as plain alpha / r, which also those readers understand that know no rsLoRA.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lorakit.method import METHODS
from lorakit.peft_format import norms, prompts
from lorakit.peft_format.config import Config, is_saved
from lorakit.peft_format.names import PREFIX, NoTwinError, Wrapped, attention_host
from lorakit.peft_layout import OUT_PROJ_TIMES, alpha_of, out_proj_share, pattern
from lorakit.prompt import Prompt
from lorakit.update import AdaptedLayer

_TELL_CONV1D = ("FOURIERFT", "HIRA", "IA3", "LORA", "RANDLORA", "VERA")
_WITHOUT_BIAS = ("LOHA", "LOKR", "HIRA")
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # for these PEFT demands a trained head

Layers = Mapping[str, AdaptedLayer]
Encoded = tuple[dict[str, Tensor], dict[str, Any]]


def encode(
    layers: Layers,
    trained: Mapping[str, Tensor],
    base_name: str,
    kept: Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
) -> Encoded | None:
    """Tensors and configuration as PEFT writes them; None where PEFT has no twin for this adapter."""
    try:
        return _encode(layers, trained, base_name, kept or {}, prompt)
    except NoTwinError:
        return None


def why_no_twin(
    layers: Layers,
    trained: Mapping[str, Tensor],
    kept: Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
) -> str:
    """Why PEFT has no twin for this adapter; '' if it has one."""
    try:
        _encode(layers, trained, "", kept or {}, prompt)
    except NoTwinError as error:
        return str(error)
    return ""


def _encode(
    layers: Layers, trained: Mapping[str, Tensor], base_name: str, kept: Mapping[str, Any], prompt: Prompt | None
) -> Encoded:
    if prompt is not None:
        if layers:
            raise NoTwinError("PEFT has low-rank layers or a prompt in an adapter, not both")
        return prompts.encode(prompt, trained, base_name, kept)
    if not layers:
        return norms.encode(trained, base_name, kept)
    methods = {layer.method for layer in layers.values()}
    if len(methods) != 1:
        raise NoTwinError(
            f"PEFT has one method for an adapter, and this one has {', '.join(sorted(methods)) or 'none'}"
        )
    method = METHODS[methods.pop()]
    if method.peft_type is None:
        raise NoTwinError(f"PEFT has no method '{method.name}'")
    wrapped = Wrapped(layers)
    tensors: dict[str, Tensor] = {}
    for path, layer in _as_peft_applies(layers, wrapped).items():
        leaves = method.to_peft(layer)
        if leaves is None:
            grouped = f", {layer.groups} groups" if layer.groups > 1 else ""
            raise NoTwinError(f"PEFT has no '{method.name}' for a layer such as '{path}' ({layer.kind}{grouped})")
        tensors |= {f"{PREFIX}{wrapped.module_of(path)}.{leaf}": tensor for leaf, tensor in leaves.items()}
    tensors |= {f"{PREFIX}{wrapped.inside(name)}": tensor for name, tensor in trained.items()}
    config = _config(method.peft_type, wrapped, layers, trained, base_name, kept)
    if method.peft_type not in ("IA3", "LORA"):
        form = method.write_peft(layers)
        if form is None:
            raise NoTwinError(f"PEFT has one setting of '{method.name}' for all layers, and they differ here")
        if wrapped.parameters or wrapped.hosts:
            raise NoTwinError(f"PEFT has no '{method.name}' for a weight without a layer of its own")
        tensors |= {f"base_model.{name}": tensor for name, tensor in form.common.items()}
        config |= form.fields
    config |= method.peft_config
    if config.get("fan_in_fan_out") and wrapped.parameters:
        raise NoTwinError("PEFT does not adapt Conv1D layers and bare parameters together")
    return tensors, config


def _as_peft_applies(layers: Layers, wrapped: Wrapped) -> dict[str, AdaptedLayer]:
    """The layers with what PEFT computes otherwise already undone, and a bias everywhere if there is one anywhere."""
    changed = dict(layers)
    for host in wrapped.hosts:
        inner, outer = layers[f"{host}.in_proj_weight"], layers[f"{host}.out_proj"]
        share = out_proj_share(inner, outer)
        if share is None or (inner.rank, "a0" in inner.factors) != (outer.rank, "a0" in outer.factors):
            raise NoTwinError(f"PEFT gives both projections of '{host}' one rank and one scale, and they differ here")
        if "bias" in inner.factors:
            raise NoTwinError(f"PEFT does not apply the bias of '{host}.in_proj_weight'")
        changed[f"{host}.out_proj"] = replace(outer, factors=_out_proj_factors(outer.factors, share))
    if any("bias" in layer.factors for layer in layers.values()):
        for path, layer in changed.items():
            if layer.method != "lora" or layer.kind == "embedding" or path.rpartition(".")[0] in wrapped.parameters:
                raise NoTwinError(f"PEFT has no lora_bias for a layer such as '{path}' ({layer.method}, {layer.kind})")
            b = layer.factors["b"]
            changed[path] = replace(layer, factors={"bias": b.new_zeros(b.shape[0]), **layer.factors})
    return changed


def _out_proj_factors(factors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """`b` by the share; the bias, which PEFT applies once, by twice as much."""
    times = {"b": share, "b0": share, "bias": share * OUT_PROJ_TIMES}
    return {name: factor * times[name] if name in times else factor for name, factor in factors.items()}


# ---------------------------------------------------------------- adapter_config.json


def _config(
    peft_type: str,
    wrapped: Wrapped,
    layers: Layers,
    trained: Mapping[str, Tensor],
    base_name: str,
    kept: Config,
) -> dict[str, Any]:
    """The configuration of an adapter; `kept` is what an earlier one of PEFT's said beside it."""
    saved = _modules_to_save(wrapped, trained, kept)
    task = kept.get("task_type")
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "task_type": None if task in _HEAD_TASKS and not saved else task,
        "target_modules": _exactly(wrapped.target_modules, wrapped),
        "modules_to_save": saved or None,
    }
    if peft_type in _TELL_CONV1D:
        config["fan_in_fan_out"] = any(layer.kind == "hf_conv1d" for layer in layers.values())
    if kept.get("revision"):
        config["revision"] = kept["revision"]
    if peft_type == "IA3":
        inward = sorted(path for path, layer in layers.items() if "gain_in" in layer.factors)
        outward = [path for path in layers if path not in inward]
        loose = any(path.endswith(tuple(inward)) for path in outward)
        config["feedforward_modules"] = _exactly(inward, wrapped, always=loose)
        return config
    biases = [host for host, _, leaf in (name.rpartition(".") for name in trained) if leaf == "bias"]
    alone = [host for host in biases if f"{host}.weight" not in trained and not is_saved(config, f"{host}.bias")]
    only = "lora_only" if peft_type == "LORA" else "all"
    config["bias"] = "none" if not alone else only if set(alone) <= wrapped.depth.keys() else "all"
    if peft_type != "LORA":
        if peft_type in _WITHOUT_BIAS and config.pop("bias") != "none":
            raise NoTwinError(f"PEFT trains no biases beside {peft_type}")
        return config
    config |= _rank_fields(wrapped, layers)
    config["lora_dropout"] = 0.0 if wrapped.parameters else kept.get("lora_dropout", 0.0)
    if wrapped.parameters:
        config["target_parameters"] = wrapped.target_parameters
    if any("bias" in layer.factors for layer in layers.values()):
        config["lora_bias"] = True
    if kept.get("ensure_weight_tying"):
        config["ensure_weight_tying"] = True
    return config


def _exactly(paths: list[str], wrapped: Wrapped, always: bool = False) -> list[str] | str:
    """Paths, or where their ends may name other modules too (`0` of `1.0`), an expression for them and no others.

    PEFT takes a listed name for the end of a path. A path of three parts or more does not stand within another one of
    the same model. Beside expert weights the list stays: PEFT rewrites expressions there.
    """
    short = any(path.count(".") < 2 for path in paths) and not wrapped.parameters
    return "|".join(re.escape(path) for path in paths) if paths and (short or always) else paths


def _rank_fields(wrapped: Wrapped, layers: Layers) -> dict[str, Any]:
    width: dict[str, int] = {}
    alpha: dict[str, float] = {}
    for path, layer in layers.items():
        if attention_host(path, wrapped.hosts) and path.endswith(".out_proj"):
            continue  # PEFT gives it the rank and alpha of in_proj
        key = wrapped.pattern_key(path)
        width[key] = layer.rank * (2 if "a0" in layer.factors else 1)
        alpha[key] = alpha_of(layer.scale, width[key])
    common_width, ranks = pattern(width)
    common_alpha, alphas = pattern(alpha)
    return {
        "r": common_width,
        "lora_alpha": common_alpha,
        "use_rslora": False,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "init_lora_weights": True,
    }


def _modules_to_save(wrapped: Wrapped, trained: Mapping[str, Tensor], kept: Config) -> list[str]:
    """Modules that PEFT can hold whole: those with a trained matrix and nothing but weight and bias.

    What is trained beside them (norms, which may have running statistics; single biases; bare parameters) PEFT reads
    as a changed base weight.
    """
    outside = {name: tensor for name, tensor in trained.items() if name.rpartition(".")[0] not in wrapped.depth}
    if "modules_to_save" in kept:
        named = list(kept["modules_to_save"] or ()) if outside else []
    else:
        hosts = [name.removesuffix(".weight") for name, x in outside.items() if name.endswith(".weight") and x.ndim > 1]
        named = sorted(host for host in hosts if _only_weight_and_bias(host, trained))
    return [name for name in named if not any(_collide(name, path) for path in wrapped.depth)]


def _only_weight_and_bias(host: str, trained: Mapping[str, Tensor]) -> bool:
    return {name.removeprefix(f"{host}.") for name in trained if name.startswith(f"{host}.")} <= {"weight", "bias"}


def _collide(saved: str, path: str) -> bool:
    """Would PEFT, to save this module, leave an adapted layer out or wrap it twice? (Its two look-ups differ.)"""
    return path.endswith(saved) or re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", path) is not None
