"""PEFT's soft prompts: one tensor `prompt_embeddings`, beside the head where there is one.

A prefix is flat there, `(V, 2 layers heads head)`, its columns in the order layer, key or value, head, number; and so
is our `rows (V, layers, 2, heads, head)`. A prompt for both sides of an encoder-decoder has rows for two, of which PEFT
reads the first half. Read from peft 0.21.2 (peft_model.py, tuners/prompt_tuning, p_tuning, prefix_tuning).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import AdapterError, listed
from lorakit.peft_format.names import NoTwinError
from lorakit.prompt import PROMPTS, ROWS, Prompt, Sizes

_ROWS, _ROOT = "prompt_embeddings", "base_model."
_PAIR = "SEQ_2_SEQ_LM"
_READ = {"PROMPT_TUNING": "soft", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix"}


def types() -> list[str]:
    """Every `peft_type` of a prompt that is read."""
    return sorted(_READ)


def encode(
    prompt: Prompt, trained: Mapping[str, Tensor], base_name: str, kept: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration. NoTwinError where PEFT could not read them as what they are."""
    method, task = PROMPTS[prompt.method], kept.get("task_type")
    if method.peft_type is None:
        raise NoTwinError(f"PEFT has no prompt '{method.name}'")
    if prompt.factors.keys() != {ROWS}:
        raise NoTwinError(f"PEFT keeps the rows of a '{method.name}' prompt, which are still made by a network here")
    if not task:
        raise NoTwinError("PEFT ignores a prompt without a task_type (meta['peft'])")
    length, sizes = prompt.length, prompt.sizes
    rows = prompt.rows.float().flatten(1)
    if task == _PAIR:
        rows = torch.cat([rows, torch.zeros_like(rows)])  # the second half is never read
    config: dict[str, Any] = {
        "peft_type": method.peft_type,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "task_type": task,
        "num_virtual_tokens": length,
        "token_dim": sizes.width,
        "num_transformer_submodules": 2 if task == _PAIR else 1,
        "num_attention_heads": sizes.heads or 1,
        "num_layers": sizes.layers or 1,
        "modules_to_save": kept.get("modules_to_save") or sorted({name.partition(".")[0] for name in trained}) or None,
        **method.peft_config,
    }
    if kept.get("revision"):
        config["revision"] = kept["revision"]
    return {_ROWS: rows.contiguous(), **{_ROOT + name: tensor for name, tensor in trained.items()}}, config


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], Prompt]:
    """Whole parameters, and the prompt. AdapterError that lists every fault."""
    strange = [f"unknown tensor '{name}'" for name in tensors if name != _ROWS and not name.startswith(_ROOT)]
    rows = tensors.get(_ROWS)
    if strange or rows is None or rows.ndim != 2:
        lacking = f"'{_ROWS}' is {'missing' if rows is None else tuple(rows.shape)}; it must be a matrix"
        raise AdapterError(f"{source}: {listed(strange or [lacking])}")
    trained = {name.removeprefix(_ROOT): tensor for name, tensor in tensors.items() if name != _ROWS}
    length, method = config.get("num_virtual_tokens"), _READ[str(config["peft_type"])]
    halves = 2 if config.get("task_type") == _PAIR or config.get("num_transformer_submodules") == 2 else 1
    if PROMPTS[method].inputs:
        if len(rows) not in (length, (length or 0) * halves):
            raise AdapterError(f"{source}: '{_ROWS}' has {len(rows)} rows, and num_virtual_tokens is {length}")
        own = rows[:length].contiguous()
        return trained, Prompt(method, Sizes(own.shape[1]), {ROWS: own})
    if halves == 2:
        raise AdapterError(
            f"{source}: a prefix of PEFT's for an encoder-decoder, of which it leaves half unread; lorakit has none"
        )
    return trained, Prompt(method, *_split(rows, config, source))


def _split(rows: Tensor, config: Mapping[str, Any], source: str) -> tuple[Sizes, dict[str, Tensor]]:
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    told = {name: config.get(name) for name in names}
    lacking = [name for name, value in told.items() if not isinstance(value, int) or value < 1]
    if lacking:
        raise AdapterError(f"{source}: {', '.join(lacking)} must be told in adapter_config.json to read a prefix")
    length, layers, heads, width = (int(value) for value in told.values())  # type: ignore[arg-type]
    if tuple(rows.shape) != (length, 2 * layers * width) or width % heads:
        raise AdapterError(
            f"{source}: '{_ROWS}' is {tuple(rows.shape)}; {length} rows of 2 x {layers} layers x {width} numbers in "
            f"{heads} heads are declared"
        )
    sizes = Sizes(width, layers, heads, width // heads)
    return sizes, {ROWS: rows.view(length, layers, 2, heads, width // heads).contiguous()}
