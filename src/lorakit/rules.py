"""Rules -> a Plan for one model: which layers, which rank, what is trained fully. Changes nothing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from torch import nn

from lorakit.describe import describe
from lorakit.errors import PlanError, UsageError, listed, nearest
from lorakit.method import METHODS, STARTS, check_plan, settled
from lorakit.plan import LayerPlan, Plan, resolve_scale
from lorakit.prompt import PROMPTS, PromptPlan
from lorakit.reading import Reading
from lorakit.update import LayerSpec
from lorakit.whole import biases, blocks_of, resolve_trained

GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"q", "k", "v", "qkv", "o"}),
    "attn": frozenset({"q", "k", "v", "qkv", "o"}),
    "mlp": frozenset({"up", "gate", "down"}),
    "embeddings": frozenset({"embedding"}),
}
_MATRICES = frozenset({"linear", "hf_conv1d", "parameter"})
_BARE_ROLES = frozenset({"experts", "recurrent", "qkv", "q", "k", "v", "up", "gate", "down"})  # in "all-linear"

DEFAULT_RANK = 8

Rules = str | Sequence[str] | Mapping[str, int]


def plan(
    model: nn.Module,
    rank: int = DEFAULT_RANK,
    layers: Rules | None = None,
    *,
    method: str = "lora",
    scale: float | str | None = None,
    start: str | None = None,
    share: str = "",
    blocks: str | Iterable[int] | None = None,
    trained: Sequence[str] = (),
    bias: str = "none",
    clip_rank: bool = False,
    soft_prompt: str | PromptPlan | None = None,
) -> Plan:
    """Turns rules into a Plan for this model.

    `layers`: "all-linear" (every matrix but heads and embeddings; the default, where there is no prompt), "all-conv",
    "all", "none", "attention", "mlp", "embeddings", a role ("q", "up", "experts" ...), the end of a layer path, a
    regular expression for the whole path ("re:" before it), a list of these, or a mapping from these to ranks:
    `{"attention": 8, "mlp": 16}`.
    `blocks`: "0-3", "4-", "last 2" or indices: only these layers of the stack; the others stay frozen.
    `scale` and `start`: the method's own ("16/r" and "kaiming" for lora), if not given.
    `share`: "a", "b" or "a+b": these factors are one tensor for all layers of one role and shape.
    `trained`: modules or parameters trained fully, or words for them ("norms", "blocks last 2"; see
    `lorakit.whole`). `bias`: "none", "adapted" or "all".
    `soft_prompt`: "soft:20", "prefix:20" ... (docs/methods.md): 20 rows that learn in front of every text, beside the
    layers or alone.
    `clip_rank`: lower the rank where a layer's smaller side demands it, instead of refusing.

    Raises PlanError: unknown pattern, nothing matched, rank above a side; all faults at once.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"plan takes a torch module, not {type(model).__name__}")
    refuse_rules(rank, method, scale, start, bias)
    asked = PromptPlan.parse(soft_prompt) if isinstance(soft_prompt, str) else soft_prompt
    if layers is None:
        layers = "all-linear" if asked is None else "none"
    if layers == "none" and asked is not None:
        _refuse_alone(rank, method, scale, start, share, blocks)
    specs = describe(model)
    wanted = {layers: rank} if isinstance(layers, str) else layers
    wanted = () if [*wanted] == ["none"] else wanted
    ranks = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, rank)
    keep = blocks_of(blocks, specs)
    chosen: dict[str, int] = {}
    faults: list[str] = []
    for rule, rule_rank in ranks.items():
        try:
            matched = [spec for spec in specs if matches_rule(spec, rule)]
        except PlanError as error:
            faults.append(str(error))
            continue
        if not matched:
            faults.append(_no_match(rule, specs))
        inside = [spec for spec in matched if keep is None or spec.block in keep]
        if matched and not inside:
            faults.append(f"'{rule}' matches {len(matched)} layers, but none in blocks {sorted(keep or ())}")
        for spec in inside:
            chosen[spec.path] = min(rule_rank, spec.max_rank) if clip_rank else rule_rank
    factor = "" if scale is None else scale
    ready = {rank: settled(LayerPlan(method, rank, factor, start or "", share)) for rank in set(chosen.values())}
    entries = {spec.path: ready[chosen[spec.path]] for spec in specs if spec.path in chosen}
    faults += [] if asked is None else asked.faults() or _no_room(model, asked)
    faults += check_plan({spec.path: spec for spec in specs}, entries)
    if faults:
        raise PlanError(f"{type(model).__name__}: {listed(faults)}")
    result = Plan(entries, tuple(trained) + biases(model, entries, bias), prompt=asked)
    resolve_trained(model, result.trained)
    return result


def refuse_rules(rank: int, method: str, scale: float | str | None, start: str | None, bias: str) -> None:
    """PlanError or UsageError for what would be refused of any model."""
    known = METHODS[method]  # an unknown name ends here
    if start is not None and STARTS[start] is not None and not known.takes_start:
        raise PlanError(f"method '{method}' begins in its own way; leave start '{start}' out")
    if scale not in (None, known.scale) and not known.takes_scale:
        raise PlanError(f"method '{method}' has no scale; leave scale {scale} out")
    if known.takes_rank and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise PlanError(f"rank is {rank!r}; use a whole number, 1 or more")
    if known.takes_rank and scale is not None:
        resolve_scale(scale, rank)
    if bias not in ("none", "adapted", "all"):
        raise PlanError(f"bias is {bias!r}; use 'none', 'adapted' or 'all'")


def _no_room(model: nn.Module, asked: PromptPlan) -> list[str]:
    try:
        Reading(model, PROMPTS[asked.method].inputs)
    except PlanError as error:
        return [str(error)]
    return []


def _refuse_alone(rank: int, method: str, *others: object) -> None:
    """PlanError for what is said of layers where there is only a prompt."""
    told = [f"method '{method}'"] if method != "lora" else []
    told += [f"rank {rank}"] if rank != DEFAULT_RANK else []
    told += [f"'{value}'" for value in others if value]
    if told:
        raise PlanError(f"a prompt alone has no layers, and {listed(told)} is for layers; name some, or leave it out")


def matches_rule(spec: LayerSpec, rule: str) -> bool:
    """Does one rule choose this layer?"""
    bare_other = spec.kind == "parameter" and spec.role not in _BARE_ROLES
    if rule == "all":
        return not bare_other
    if rule == "all-linear":
        return spec.kind in _MATRICES and spec.role != "head" and not bare_other
    if rule == "all-conv":
        return spec.kind.startswith("conv")
    if rule in GROUPS:
        return spec.role in GROUPS[rule] and not bare_other
    if rule.startswith("re:"):
        return _pattern(rule).fullmatch(spec.path) is not None
    if rule == "experts":
        return len(spec.batch) == 1 and spec.batch[0] > 1
    return spec.role == rule or spec.path == rule or spec.path.endswith("." + rule)


@lru_cache(maxsize=256)
def _pattern(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule.removeprefix("re:"))
    except re.error as error:
        raise PlanError(f"'{rule}' is not a regular expression: {error}") from None


def _no_match(rule: str, specs: Sequence[LayerSpec]) -> str:
    if not specs:
        return "the model has no layer that can be adapted"
    if rule == "all-linear":
        kinds = ", ".join(sorted({spec.kind for spec in specs}))
        return f"the model has no matrix but its head; its {len(specs)} layers are of kind {kinds}: use layers='all'"
    known = {"all", "all-conv", *GROUPS, *(spec.role for spec in specs)}
    known |= {spec.path.rpartition(".")[2] for spec in specs}
    known.discard(rule)
    return f"'{rule}' matches none of the {len(specs)} layers{nearest(rule, known)}"
