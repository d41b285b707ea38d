"""The page docs/benchmarks.md, made from the numbers in benchmarks/results/."""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OURS = "lorakit"
OTHERS = ("linear", "attach", "merge", "truncate", "startup")
TITLES = {
    "quality": "Is it as good?",
    "tasks": "Every task against its usual recipe",
    "full": "Beside full fine-tuning",
    "processes": "Two processes on one run",
    "memory": "Memory told before the start",
    "quantized": "A base in few bits",
    "stream": "Rows that stay on disk",
}

HEAD = """# Benchmarks

Written by docs/generate.py from [benchmarks/results/](../benchmarks/results/); the scripts are in
[benchmarks/](../benchmarks/README.md). Both sides run interleaved in one tree of processes, on the same base, rows,
hyperparameters and tokens. A ratio is the median over all turns, with its quartiles; above 1 lorakit is faster or
smaller. Memory is what a side had resident at the most, beyond its imports and its rows.
"""


def row(*cells: Any) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    return [row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows), ""]


def ratio(found: dict[str, Any], name: str) -> str:
    """A ratio with its quartiles, or nothing."""
    if name not in found["ratios"]:
        return ""
    low, high = found["spread"][name]
    return f"{found['ratios'][name]:.2f} [{low:.2f}, {high:.2f}]"


def where(found: dict[str, Any]) -> str:
    """Machine and versions, in words."""
    machine, versions = found["machine"], found["versions"]
    kind = " Quick run." if found["quick"] else ""
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {libraries}.{kind}"


def measured(found: dict[str, Any]) -> dict[str, list[str]]:
    """Every job, and the sides whose tokens per second were measured on it."""
    sides: dict[str, list[str]] = {}
    for name in found["facts"]:
        if match := re.fullmatch(r"(.+) tokens/s, (.+)", name):
            sides.setdefault(match[1], []).append(match[2])
    return sides


def training(found: dict[str, Any]) -> list[str]:
    """Speed and memory of every job against every peer."""
    facts = found["facts"]
    lines = ["## Training", "", where(found) + " benchmarks/train.py", ""]
    for job, names in measured(found).items():
        lines += [f"### {job}", ""]
        lines += table(
            ("", "real tokens/s", "lorakit is faster by", "peak MiB", "lorakit is smaller by"),
            (
                (
                    f"**{name}**" if name == OURS else name,
                    f"{facts[f'{job} tokens/s, {name}']:,}",
                    ratio(found, f"{job} vs {name}"),
                    f"{facts[f'{job} peak MiB, {name}']:,}",
                    ratio(found, f"{job} peak memory vs {name}").split(" [")[0],
                )
                for name in names
            ),
        )
        padded = [name for name in facts if name.startswith(f"{job} padding in ")]
        told = (f"{facts[name]} of the rows in {name.removeprefix(f'{job} padding in ')}" for name in padded)
        lines += ["Padding that is avoided: " + ", ".join(told) + ".", ""] if padded else []
    kept = next((name for name in found["ratios"] if "kept prefix" in name), "")
    return [*lines, f"Frozen prefix, {kept}: {ratio(found, kept)}.", ""] if kept else lines


def ladder(found: dict[str, Any]) -> list[str]:
    """What each trick adds."""
    lines = ["## The ladder: what each trick adds", "", where(found) + " benchmarks/ladder.py", ""]
    for job, names in measured(found).items():
        lines += [f"### {job}, rung by rung", ""]
        lines += table(
            ("", "real tokens/s", "over the rung before"),
            (
                (
                    name,
                    f"{found['facts'][f'{job} tokens/s, {name}']:,}",
                    ratio(found, f"{job} {name}, vs the rung before"),
                )
                for name in names
            ),
        )
        lines += [f"All of it over the plain way: {ratio(found, f'{job} all, vs plain')}.", ""]
    return lines


def family(found: dict[str, Any]) -> list[str]:
    """Every method, start and prompt beside peft's own."""
    facts, ratios = found["facts"], found["ratios"]
    names = list(
        dict.fromkeys(re.split(r": |, ", key.split("minilm rt_polarity, ")[-1])[0] for key in [*facts, *ratios])
    )
    names = [name for name in names if not name.startswith("minilm ")]

    def scores(job: str, name: str, side: str) -> str:
        values = facts.get(f"minilm {job}, {name}, {side}, accuracy")
        return "" if values is None else f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"

    def numbers(name: str) -> str:
        value = facts.get(f"minilm rt_polarity, {name}, lorakit, numbers")
        return "" if value is None else f"{value:,}"

    lines = ["## Every method beside peft's own", "", where(found) + " benchmarks/family.py", ""]
    lines += ["Accuracy: mean and deviation of three seeds, after 150 steps of 32 texts at one rate on both sides.", ""]
    head = ("", "numbers", "rt_polarity", "peft's", "banking77", "peft's")
    times = ("step beside LoRA's", "faster than peft", "peak MiB", "smaller than peft")
    return lines + table(
        (*head, *times),
        (
            (
                name,
                numbers(name),
                *(scores(job, name, side) for job in ("rt_polarity", "banking77") for side in ("lorakit", "peft")),
                ratio(found, f"{name}: step beside lora's"),
                ratio(found, f"{name}: faster than peft"),
                facts.get(f"{name}: peak MiB, lorakit", ""),
                ratio(found, f"{name}: smaller than peft").split(" [")[0],
            )
            for name in names
        ),
    )


def listing(title: str, found: dict[str, Any], script: str) -> list[str]:
    """Every ratio and fact of one file."""
    lines = [f"## {title}", "", where(found) + f" benchmarks/{script}.py", ""]
    if found["ratios"]:
        lines += table(("", "ratio"), ((name, ratio(found, name)) for name in found["ratios"]))
    if found["facts"]:
        lines += table(("", ""), ((name, _told(value)) for name, value in found["facts"].items()))
    return lines


def _told(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def benchmarks_page() -> str:
    """The page."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    lines = [HEAD]
    lines += training(found["train"])
    lines += ladder(found["ladder"]) if "ladder" in found else []
    lines += family(found["family"]) if "family" in found else []
    for name, title in TITLES.items():
        lines += listing(title, found[name], name) if name in found else []
    for name in OTHERS:
        lines += listing(f"{name}", found[name], name)
    return "\n".join(lines)
