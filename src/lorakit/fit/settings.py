"""Settings of a fit: one frozen value, the same names as command-line flags and as keys of a TOML file."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from lorakit.device import is_device
from lorakit.errors import UsageError, listed, nearest
from lorakit.rules import plan as make_plan
from lorakit.trunk import DTYPES

SCHEDULES = ("cosine", "linear", "constant")
TOKENS_PER_PASS = 4096  # where memory is not short; larger passes are not faster
RATES = ("default", "auto")
PREFIXES = ("auto", "memory", "file", "off")
GO_ON = "the same command with --resume, and without --overwrite, goes on"  # where there is a checkpoint


@dataclass(frozen=True)
class Settings:
    """How to train. `epochs` is the most; `patience` evaluations without a better one end the run before it.

    `learning_rate` is the peak of a linear warm-up (`warmup`, a share of all steps), then `schedule` takes it to 0
    (cosine, linear) or keeps it (constant); "default" goes by the base's width and the method, "auto" tries rates
    first. `lora_plus` multiplies it for the factors b (Hayou et al., 2024, LoRA+). `clip` bounds the gradient's norm.
    `ema` above 0 evaluates and keeps an exponential mean of the parameters with that decay. `batch_size` texts make a
    step; it runs in passes of at most `tokens_per_pass` tokens, with the same result; 0 takes what memory allows.
    `threads` 0 takes as many as a short trial finds fastest. `device` is cpu, cuda (one GPU of several: cuda:1) or auto
    (a GPU, if there is one). `dtype` is what the frozen part is in while it trains:
    bf16, fp32, or auto (bf16 where the device has it). `prefix` keeps what the blocks before the first that learns
    give for every text, over all epochs: in memory, in a file of the run directory, auto (memory, if it takes less than
    a quarter of what is free), or off. `shard` lets each of several processes hold only its part of the frozen blocks.
    `checkpoint_steps` 0 means a checkpoint at every evaluation, once an epoch. `skip_bad` is how many rows that cannot
    be used are left out, of all parts together, before the data is refused.
    """

    epochs: int = 10
    batch_size: int = 16
    learning_rate: float | str = "default"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "cosine"
    lora_plus: float = 1.0
    ema: float = 0.0
    patience: int = 4
    seed: int = 0
    max_steps: int = 0
    checkpoint_steps: int = 0
    tokens_per_pass: int = 0
    threads: int = 0
    device: str = "auto"
    dtype: str = "auto"
    prefix: str = "auto"
    shard: bool = False
    truncate: bool = False
    skip_bad: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; it must be {wish}"
            for name, good, wish in (
                ("epochs", self.epochs >= 1, "at least 1"),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("tokens_per_pass", self.tokens_per_pass >= 0, "0 (by memory) or more"),
                ("threads", 0 <= self.threads <= 1024, "0 (by a trial) to 1024"),
                ("device", is_device(self.device), "auto, cpu, cuda, or one GPU: cuda:1"),
                ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
                ("lora_plus", self.lora_plus > 0, "above 0"),
                ("ema", 0 <= self.ema < 1, "0 (off) or more, below 1"),
                ("prefix", self.prefix in PREFIXES, f"one of {', '.join(PREFIXES)}"),
                ("dtype", self.dtype in ("auto", *DTYPES), f"one of auto, {', '.join(DTYPES)}"),
                (
                    "learning_rate",
                    self.learning_rate in RATES if isinstance(self.learning_rate, str) else 0 < self.learning_rate < 10,
                    f"above 0 and below 10, or {' or '.join(RATES)}",
                ),
                ("warmup", 0 <= self.warmup < 1, "a share from 0 to 1"),
                ("weight_decay", self.weight_decay >= 0, "0 or more"),
                ("clip", self.clip > 0, "above 0"),
                ("seed", 0 <= self.seed < 2**31, "0 to 2147483647"),
                ("patience", self.patience >= 1, "at least 1"),
                ("max_steps", self.max_steps >= 0, "0 (no bound) or more"),
                ("skip_bad", self.skip_bad >= 0, "0 or more"),
                ("checkpoint_steps", self.checkpoint_steps >= 0, "0 or more"),
            )
            if not good
        ]
        if faults:
            raise UsageError(listed(faults))

    @property
    def rate(self) -> float:
        """The learning rate, once it is settled (settle.py)."""
        assert not isinstance(self.learning_rate, str)
        return self.learning_rate

    @property
    def most_tokens(self) -> int:
        """Tokens of one pass."""
        return self.tokens_per_pass or TOKENS_PER_PASS

    @property
    def left_open(self) -> list[str]:
        """Names of those that the run settles for itself."""
        wishes = {"learning_rate": isinstance(self.learning_rate, str)}
        wishes |= {"tokens_per_pass": not self.tokens_per_pass, "threads": not self.threads}
        return [name for name, wish in wishes.items() if wish]

    def filled(self, settled: Mapping[str, Any]) -> "Settings":
        """These settings with what was settled for those that are open; notes beside them are left out."""
        return replace(self, **{name: settled[name] for name in self.left_open if name in settled})

    def values(self) -> dict[str, Any]:
        """Name -> value."""
        return asdict(self)


def make_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from names and values; UsageError for an unknown name or a value of the wrong type."""
    known = {field.name: field.type for field in fields(Settings)}
    faults = [f"unknown setting '{name}'{_meant(name, known)}" for name in given if name not in known]
    good: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            continue
        kind = str(getattr(known[name], "__name__", known[name]))
        wanted = {"int": int, "float": float, "bool": bool, "str": str, "float | str": float}[kind]
        if kind == "float | str" and isinstance(value, str):
            good[name] = value
            continue
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            faults.append(f"{name} is {value!r}; it must be of type {wanted.__name__}")
        else:
            good[name] = value
    if faults:
        raise UsageError(listed(faults))
    return Settings(**good)


def _meant(name: str, known: Mapping[str, Any]) -> str:
    """What somebody who wrote this name may have meant."""
    if name in ("lr", "rate"):
        return "; it is called 'learning_rate'"
    if name in signature(make_plan).parameters:
        return f"; it belongs to the plan: plan=lorakit.plan(base.model, {name}=...)"
    return nearest(name, known)


def read_settings(path: Path) -> dict[str, Any]:
    """A TOML file of settings, unchecked; their names may be written as the flags are (`batch-size`)."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name.replace("-", "_"): value for name, value in found.items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read settings '{path}': {error}") from None
