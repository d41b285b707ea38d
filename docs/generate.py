"""Writes docs/cli.md (every --help), methods.md (tables of the registries) and benchmarks.md (measured numbers).

`--check` only compares.

python docs/generate.py
"""

import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "110"  # argparse wraps by it

from benchmarks_page import benchmarks_page, row

from lorakit.cli import VERBS, parser_of
from lorakit.kinds import KINDS
from lorakit.method import METHODS, STARTS
from lorakit.prompt import PROMPTS
from lorakit.quant import FORMATS

FOLDER = Path(__file__).parent


def cli_page() -> str:
    """Every verb with its help."""
    lines = [
        "# Command line",
        "",
        "Written by docs/generate.py. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
        "",
    ]
    for verb in VERBS:
        lines += [f"## lorakit {verb}", "", "```", parser_of(verb).format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def methods_page() -> str:
    """Tables of methods, starts, prompts and kinds."""
    lines = [
        "# Methods, starts, prompts, kinds",
        "",
        "Written by docs/generate.py from the registries.",
        "",
        "## Methods",
        "",
    ]
    lines += [row("method", "delta of W", "numbers", "frozen", "when", "a pair", "PEFT", "source"), row(*["---"] * 8)]
    for method in sorted(METHODS, key=lambda m: m.name):
        own = sorted(method.frozen - {"a0", "b0"})
        frozen = ", ".join(["base", *(f"`{name}`" for name in own), *(["start"] if "a0" in method.frozen else [])])
        peft = method.peft_type or "none"
        pair = "yes" if method.exact_pair else "by SVD" if method.linear else "no, nor merged"
        lines.append(
            row(method.name, f"`{method.formula}`", method.parameters, frozen, method.use, pair, peft, method.source)
        )
    lines += [
        "",
        "`start`: the frozen copy of a start whose product is not zero. A pair can be truncated, served beside others",
        "and made portable as it stands. What a method cannot do on a layer, planning it there says.",
    ]
    lines += ["", "## Starts", "", row("start", "`b @ a` is zero", "when", "source"), row(*["---"] * 4)]
    for start in sorted(STARTS, key=lambda s: s.name):
        acts = "no: it acts from the beginning" if start.corrects else "no: kept frozen and subtracted"
        lines.append(row(start.name, "yes" if start.zero else acts, start.use, start.source))
    lines += [
        "",
        "## Soft prompts",
        "",
        "Rows that learn in front of every text, beside low-rank layers or alone: `--soft-prompt soft:20` gives V = 20",
        "to a model of width d. They change no W: truncating leaves them as they are, and they cannot be merged.",
        "",
        row("prompt", "what learns", "numbers", "how it begins", "when", "PEFT", "source"),
        row(*["---"] * 7),
    ]
    for prompt in sorted(PROMPTS, key=lambda p: p.name):
        begins = ", ".join(prompt.starts) or "its network at random"
        peft = prompt.peft_type or "none"
        lines.append(row(prompt.name, prompt.rows_are, prompt.parameters, begins, prompt.use, peft, prompt.source))
    lines += ["", "## Kinds of layer", "", row("kind", "layers"), row(*["---"] * 2)]
    for kind in sorted(KINDS, key=lambda k: k.name):
        lines.append(row(kind.name, kind.layers))
    lines += [
        "",
        "## Formats of quantized bases",
        "",
        row("format", "bits a number", "when", "source"),
        row(*["---"] * 4),
    ]
    for form in sorted(FORMATS, key=lambda f: f.name):
        lines.append(row(form.name, f"{form.bits:g}", form.use, form.source))
    return "\n".join([*lines, ""])


def main() -> None:
    """Writes or compares."""
    stale = []
    pages = {"cli.md": cli_page(), "methods.md": methods_page(), "benchmarks.md": benchmarks_page()}
    for name, page in pages.items():
        file = FOLDER / name
        if "--check" in sys.argv:
            if not file.is_file() or file.read_text(encoding="utf-8") != page:
                stale.append(name)
        else:
            file.write_text(page, encoding="utf-8")
    if stale:
        sys.exit(f"docs/{', docs/'.join(stale)} differ from the code; run: python docs/generate.py")
    print("up to date")


if __name__ == "__main__":
    main()
