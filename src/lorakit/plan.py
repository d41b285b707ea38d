"""The plan: which layer gets which method, rank, scale and start. Pure data, one TOML file that a person can edit.

version = 1
trained = ["classifier"]            # modules or parameters trained fully, beside the low-rank layers

[default]
method = "lora"
rank = 8
scale = "16/r"                      # or "16/sqrt(r)", or one number
start = "kaiming"

[layers]
"encoder.layer.0.attention.self.query" = {}
"encoder.layer.0.attention.self.value" = { rank = 4, share = "a" }
"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.errors import PlanError, listed, nearest
from lorakit.files import write_text
from lorakit.prompt import PromptPlan

VERSION = 1
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # not allowed in a TOML comment
_RULE = re.compile(r"^\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*/\s*(r|sqrt\(r\))\s*$")


def resolve_scale(rule: float | str, rank: int) -> float:
    """The one number that multiplies `b @ a`.

    A number is itself. "16/r" is the rule of Hu et al. (2021), "16/sqrt(r)" the rank-stable one of Kalajdzievski
    (2023), with 16 as alpha.

    >>> resolve_scale("16/r", 8), resolve_scale("16/sqrt(r)", 16), resolve_scale(0.5, 8)
    (2.0, 4.0, 0.5)
    """
    if isinstance(rule, str):
        return _by_rule(rule, rank)
    if isinstance(rule, bool) or not isinstance(rule, int | float):
        raise _no_scale(rule)
    return _usable(float(rule), rule, rank)


@lru_cache(maxsize=1024)
def _by_rule(rule: str, rank: int) -> float:
    match = _RULE.match(rule)
    if match is None:
        raise _no_scale(rule)
    if rank == 0:
        return 1.0
    return _usable(float(match[1]) / (rank if match[2] == "r" else math.sqrt(rank)), rule, rank)


def _usable(value: float, rule: float | str, rank: int) -> float:
    if not math.isfinite(value) or value == 0:
        raise PlanError(f"scale {rule!r} gives {value} at rank {rank}; it must be finite and not 0")
    return value


def _no_scale(rule: object) -> PlanError:
    return PlanError(f'scale {rule!r} is neither a number nor a rule; use 2.0, "16/r" or "16/sqrt(r)"')


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer gets. `rank` is 0 for methods without one (ia3); `scale` and `start` "" are the method's own.

    `share` names factors, "a", "b" or "a+b", that are one tensor for all layers alike: of one role, with these factors
    of one shape, that share the same (Renduchintala et al., 2023, Tied-LoRA; Song et al., 2024, ShareLoRA).
    """

    method: str = "lora"
    rank: int = 8
    scale: float | str = ""
    start: str = ""
    share: str = ""

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the shared factors."""
        return tuple(name for name in self.share.split("+") if name)

    @property
    def scale_value(self) -> float:
        """The scale as a number."""
        return resolve_scale(self.scale, self.rank)


@dataclass(frozen=True)
class Plan:
    """Layer path -> LayerPlan, the modules or parameters that are trained fully, and the prompt, if there is one."""

    layers: Mapping[str, LayerPlan]
    trained: tuple[str, ...] = ()
    note: str = field(default="", compare=False)
    prompt: PromptPlan | None = None

    def __repr__(self) -> str:
        ranks = Counter(layer.rank for layer in self.layers.values())
        methods = sorted({layer.method for layer in self.layers.values()})
        ranks_text = ", ".join(f"{rank} x {n}" for rank, n in sorted(ranks.items()))
        extra = f", trained {list(self.trained)}" if self.trained else ""
        extra += f", {self.prompt.method} prompt of {self.prompt.length}" if self.prompt is not None else ""
        return (
            f"Plan({len(self.layers)} layers, {'+'.join(methods) or 'no method'}, rank {ranks_text or 'none'}{extra})"
        )

    def with_layer(self, path: str, **changes: Any) -> "Plan":
        """The plan with one layer changed, e.g. `plan.with_layer("h.0.attn.c_attn", rank=4)`."""
        if path not in self.layers:
            raise PlanError(f"'{path}' is not in the plan{nearest(path, self.layers)}")
        return replace(self, layers={**self.layers, path: replace(self.layers[path], **changes)})

    def toml(self) -> str:
        """The plan as TOML text; `Plan.parse` gives it back."""
        default = _commonest(list(self.layers.values()))
        lines = ["# lorakit plan: which layer gets which method, rank, scale and start. Edit freely."]
        lines += [f"# {_CONTROL.sub(' ', line)}" for line in self.note.splitlines()]
        lines += [f"version = {VERSION}", f"trained = {_toml(list(self.trained))}", ""]
        if self.prompt is not None:
            lines += ["[prompt]", *(f"{key} = {_toml(value)}" for key, value in asdict(self.prompt).items()), ""]
        lines += ["[default]", *(f"{key} = {_toml(value)}" for key, value in default.items()), "", "[layers]"]
        for path, layer in self.layers.items():
            own = {key: value for key, value in asdict(layer).items() if value != default[key]}
            body = ", ".join(f"{key} = {_toml(value)}" for key, value in own.items())
            lines.append(f"{_toml(path)} = {{ {body} }}" if body else f"{_toml(path)} = {{}}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the plan as TOML, atomically."""
        write_text(Path(path), self.toml())

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> "Plan":
        """Reads a plan from TOML text. Raises PlanError that lists every fault."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source} is not valid TOML: {error}") from None
        faults: list[str] = []
        known = {"version", "trained", "default", "layers", "prompt"}
        faults += [f"unknown key '{key}'{nearest(key, known)}" for key in data if key not in known]
        if data.get("version", VERSION) != VERSION:
            faults.append(f"version is {data['version']!r}; this lorakit reads version {VERSION}")
        trained = data.get("trained", [])
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            faults.append("'trained' must be a list of module or parameter names")
            trained = []
        default = _layer(LayerPlan(), data.get("default", {}), "[default]", faults)
        table = data.get("layers", {})
        if not isinstance(table, dict):
            faults.append("[layers] must be a table of layer path = { ... }")
            table = {}
        layers = {path: _layer(default, entry, f"'{path}'", faults) for path, entry in table.items()}
        prompt = _prompt(data["prompt"], faults) if "prompt" in data else None
        if faults:
            raise PlanError(f"{source}: {listed(faults)}")
        return cls(layers, tuple(trained), prompt=prompt)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan '{path}': {error}") from None
        return cls.parse(text, str(path))


_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "rank": (int,),
    "scale": (int, float, str),
    "start": (str,),
    "share": (str,),
}


def _layer(default: LayerPlan, entry: Any, place: str, faults: list[str]) -> LayerPlan:
    if not isinstance(entry, dict):
        faults.append(f"{place} must be a table such as {{ rank = 8 }}, not {entry!r}")
        return default
    good: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _TYPES:
            faults.append(f"{place} has an unknown key '{key}'{nearest(key, _TYPES)}")
        elif isinstance(value, bool) or not isinstance(value, _TYPES[key]):
            faults.append(f"{place}: {key} is {value!r}; it must be {' or '.join(t.__name__ for t in _TYPES[key])}")
        elif key == "rank" and isinstance(value, int) and value < 0:
            faults.append(f"{place}: rank is {value}; it must be 0 or more")
        else:
            good[key] = value
    layer = replace(default, **good)
    try:
        if layer.scale != "":
            resolve_scale(layer.scale, layer.rank)
    except PlanError as error:
        faults.append(f"{place}: {error}")
        return replace(layer, scale=default.scale)  # said once: layers that inherit it are not at fault too
    return layer


def _prompt(entry: Any, faults: list[str]) -> PromptPlan | None:
    if not isinstance(entry, dict):
        faults.append(f"[prompt] must be a table such as {{ method = 'soft', length = 20 }}, not {entry!r}")
        return None
    own = asdict(PromptPlan())
    words = entry.get("words", [])
    faults += [f"[prompt] has an unknown key '{key}'{nearest(key, own)}" for key in entry if key not in own]
    faults += [
        f"[prompt]: {key} is {value!r}; it must be {type(own[key]).__name__}"
        for key, value in entry.items()
        if key in own and key != "words" and (not isinstance(value, type(own[key])) or isinstance(value, bool))
    ]
    if not isinstance(words, list) or not all(isinstance(word, int) and not isinstance(word, bool) for word in words):
        faults.append(f"[prompt]: words are {words!r:.60}; they must be a list of tokens' numbers")
    if faults:
        return None
    made = PromptPlan(**{**own, **entry, "words": tuple(words)})
    faults += made.faults()
    return made


def _toml(value: Any) -> str:
    """A string, number or list of them as TOML: JSON, but for the one control character that JSON leaves bare."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _commonest(layers: list[LayerPlan]) -> dict[str, Any]:
    if not layers:
        return asdict(LayerPlan())
    rows = [asdict(layer) for layer in layers]
    return {key: Counter(row[key] for row in rows).most_common(1)[0][0] for key in rows[0]}
