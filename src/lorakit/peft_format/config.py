"""Reads adapter_config.json: what PEFT's configuration says of an adapter, and what lorakit must refuse in it.

Key names, defaults and look-ups as in peft 0.21.2 (tuners/lora/config.py, tuners/tuners_utils.py, utils/other.py).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.method import METHODS, Method
from lorakit.peft_format import norms, prompts

Config = Mapping[str, Any]
_CHECKED = (0, 21, 2)  # the newest peft of which is known how it applies out_proj (peft_layout.OUT_PROJ_TIMES)
_KEPT = (
    "task_type",
    "modules_to_save",
    "lora_dropout",
    "revision",
    "ensure_weight_tying",
)  # carried over, as they were
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that rewrite the base when PEFT loads them
_FOREIGN = (
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
_KNOWN_SWITCHES = frozenset({*_FOREIGN, "use_dora", "use_rslora", "use_effective_conv2d", "use_cayley_neumann"})
_HARMLESS_CONFIGS = frozenset(
    {"eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_config", "runtime_config"}
)


def read_types() -> list[str]:
    """Every `peft_type` that is read."""
    return sorted({norms.TYPE, *prompts.types(), *(method.peft_type for method in METHODS if method.peft_type)})


def is_of(method: Method, config: Config) -> bool:
    """Is this the method of which an adapter_config.json tells?"""
    return method.peft_type == config.get("peft_type") and method.reads_peft(config)


def is_bias_saved(config: Config) -> bool:
    """Are biases in the file: all, or those of the adapted layers?"""
    return config.get("bias") == "all" or str(config.get("bias")).endswith("_only")


def type_faults(config: Config) -> list[str]:
    """Values of which nothing can be read."""
    faults: list[str] = []

    def check(key: str, good: bool, wanted: str) -> None:
        if not good:
            faults.append(f"'{key}' is {config[key]!r} in adapter_config.json; it must be {wanted}")

    for key in ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        if key.endswith("_pattern"):
            inner = value.items() if isinstance(value, Mapping) else ()
            good = value is None or isinstance(value, Mapping)
            number = _is_number if key == "alpha_pattern" else _is_rank if "init_r" not in config else _are_marks
            check(key, good and all(_is_regex(k) and number(v) for k, v in inner), "a table of pattern and number")
        elif key in config:
            check(
                key,
                (_is_rank(value) or (value == 0 and "oft_block_size" in config)) if key == "r" else _is_number(value),
                "a whole number" if key == "r" else "a number",
            )
    for key in ("modules_to_save", "target_parameters", "target_modules", "feedforward_modules"):
        value = config.get(key)
        listed_ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
        regex_ok = isinstance(value, str) and key in ("target_modules", "feedforward_modules") and _is_regex(value)
        check(key, value is None or listed_ok or regex_ok, "a list of names")
    if config.get("bias", "none") not in ("none", None) and not is_bias_saved(config):
        check("bias", False, "'none', 'lora_only' or 'all'")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_marks(value: Any) -> bool:
    """What AdaLoRA says of a layer: which of its first ranks it has still."""
    return isinstance(value, list) and all(isinstance(mark, bool) for mark in value)


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def foreign_faults(config: Config) -> list[str]:
    """Options that change the meaning and that lorakit has not."""
    unknown = [
        key
        for key in config
        if (key.startswith("use_") and key not in _KNOWN_SWITCHES)
        or (key.endswith("_config") and key not in _HARMLESS_CONFIGS and key not in _FOREIGN)
    ]
    faults = [
        f"'{key}' is set to {config[key]!r} in adapter_config.json, and lorakit has no such update; "
        "convert the adapter to plain LoRA with peft first"
        for key in [*_FOREIGN, *unknown]
        if config.get(key)
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        faults.append(
            f"init_lora_weights is '{start}': PEFT rewrites the base weights when it loads this adapter; save it in "
            "peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter"
        )
    return faults


class Ranks:
    """Ranks and scales of layers, by PEFT's names for them."""

    def __init__(self, config: Config) -> None:
        self._rank, self._alpha = _lookup(config.get("rank_pattern")), _lookup(config.get("alpha_pattern"))
        self._common = int(config.get("r", 8)), float(config.get("lora_alpha", config.get("alpha", 8)))
        self._stable = bool(config.get("use_rslora"))

    def rank(self, key: str) -> int:
        """The declared rank."""
        found = self._rank(key)
        return self._common[0] if found is None else int(found)

    def scale(self, key: str) -> float:
        """The number that multiplies."""
        found, rank = self._alpha(key), self.rank(key)
        alpha = self._common[1] if found is None else float(found)
        return alpha / (math.sqrt(rank) if self._stable else rank or 1)  # OFT may have no rank, nor a scale


def _lookup(patterns: Config | None) -> Callable[[str], Any]:
    """First value whose pattern fits, as PEFT looks it up; a plain table where all patterns are whole paths."""
    table = {re.sub(r"\\(.)", r"\1", pattern[1:]): value for pattern, value in (patterns or {}).items()}
    if all(f"^{re.escape(path)}" == pattern for path, pattern in zip(table, patterns or ())):
        return table.get
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in (patterns or {}).items()]
    return lambda key: next((value for pattern, value in compiled if pattern.match(key)), None)


def kept(config: Config) -> dict[str, Any]:
    """What lorakit does not use of a configuration, but writes again."""
    return {key: config[key] for key in _KEPT if config.get(key) or (key == "modules_to_save" and key in config)}


def newer_than_checked(config: Config) -> str:
    """The version of PEFT that wrote this file, where nobody has looked yet how it applies out_proj; otherwise ''."""
    version = str(config.get("peft_version") or "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.partition("@")[0])[:3])
    return version if numbers > _CHECKED else ""


def is_target(config: Config, path: str) -> bool:
    """Does target_modules name this module?"""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def is_feedforward(config: Config, path: str) -> bool:
    """Does feedforward_modules name this module? (IA3; PEFT compares the ends of names, without regard to dots.)"""
    targets = config.get("feedforward_modules") or []
    return re.fullmatch(targets, path) is not None if isinstance(targets, str) else path.endswith(tuple(targets))


def is_saved(config: Config, name: str) -> bool:
    """Does modules_to_save name a module above this parameter? (PEFT compares the ends, without regard to dots.)"""
    ends = tuple(config.get("modules_to_save") or ())
    parts = name.split(".")
    return any(".".join(parts[:n]).endswith(ends) for n in range(1, len(parts)))
