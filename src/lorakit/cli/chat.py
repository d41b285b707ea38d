"""Talk with a fitted language model; several runs on one base take turns.

Where a conversation grows longer than the model takes, its earliest turns are dropped, and that is said.

Inside: /use NAME lets another run answer, /use base none of them; /forget begins anew; /help; /quit, or end of file.
From a pipe every line is asked in turn, and the answers are all that is printed. A line that fails is told with its
number (with --json it has an error in the place of an answer), the others are asked, and the exit code is 1.

example: lorakit chat runs/law runs/code --temperature 0.7
"""

import argparse
import io
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import device_argument

_HELP = "/use NAME: another run answers ({names}; base: none of them)   /forget: begin anew   /quit"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("runs", nargs="+", metavar="run", help="run directories of --task generate, on one base")
    parser.add_argument("--base", help="the base, if it is not where it was (a name or a directory)")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most probable answer, above: drawn")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    device_argument(parser)


def run(args: argparse.Namespace) -> Reply:
    """Reads, asks, prints."""
    from lorakit.cli.common import say
    from lorakit.errors import LorakitError, UsageError
    from lorakit.fit.talk import Talk
    from lorakit.fit.use import load_base_of, open_run

    opened = {name: open_run(path) for name, path in _named(args.runs).items()}
    adapter, task = next(iter(opened.values()))
    base = load_base_of(adapter, args.base, task) if hasattr(task, "template") else None
    piped, written, failed = not sys.stdin.isatty(), list[dict[str, Any]](), False
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    with Talk(opened, base, args.system, args.device) as talk:
        if not piped:
            say(_HELP.format(names=", ".join(talk.names)))
        for number, line in _lines(talk):
            word, _, rest = line.partition(" ")
            try:
                if word == "/quit":
                    break
                if word == "/help":
                    say(_HELP.format(names=", ".join(talk.names)))
                elif word == "/forget":
                    talk.forget()
                elif word == "/use":
                    talk.use("" if rest.strip() == "base" else rest.strip())
                elif word.startswith("/"):
                    raise UsageError(f"'{word}' is no command; {_HELP.format(names=', '.join(talk.names))}")
                else:
                    before = talk.n_dropped
                    answer = talk.say(line, None if args.json else _spoken, **options)
                    written.append({"adapter": talk.name, "asked": line, "answer": answer})
                    _spoken("" if args.json else "\n")
                    if talk.n_dropped > before:
                        say(f"note: the first {talk.n_dropped} turns left no room for an answer and were dropped")
            except LorakitError as error:
                failed = piped
                written.append({"adapter": talk.name, "asked": _shown(line), "error": str(error)})
                say(f"lorakit: {f'line {number}: ' if piped else ''}{error}")
            except KeyboardInterrupt:
                _spoken("\n")
                say("stopped")
    return Reply("", written, int(failed))


def _named(paths: list[str]) -> dict[str, str]:
    """A short name for each run."""
    found: dict[str, str] = {}
    for path in paths:
        name = Path(path).name or "run"
        found[name if name not in found and name != "base" else f"{name}_{len(found) + 1}"] = path
    return found


def _spoken(piece: str) -> None:
    print(piece, end="", flush=True)


def _shown(line: str) -> str:
    """The line, with bytes that are no text as \\udcff."""
    return line.encode(errors="backslashreplace").decode()


def _lines(talk: Any) -> Iterator[tuple[int, str]]:
    """What the user types, by the number of its line, without empty lines."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text spoil their own line only
    for number in count(1):
        try:
            line = input(f"{talk.name or 'base'}> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield number, line
