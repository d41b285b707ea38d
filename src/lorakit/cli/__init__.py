"""The command line: one file for each verb, imported only when it is asked for.

A verb's file has `arguments(parser)` and `run(args)`, which returns what to print: a Reply with a text for people and
values for `--json`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors go to stderr, one
sentence that names the way out.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from lorakit._version import __version__
from lorakit.errors import LorakitError, StoppedError, UsageError, nearest

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT, as shells have it
_OUT_OF_MEMORY = re.compile("allocate memory|out of memory")

VERBS = {
    "plan": "turn rules into a plan: which layer gets which method, rank and start",
    "quantize": "say what keeping a base in 8 or 4 bits saves and costs",
    "fit": "train an adapter on your rows and prove it on rows it has not seen",
    "predict": "answer texts with a fitted adapter: labels, or written text",
    "chat": "talk with fitted language models, which take turns on one base",
    "evaluate": "measure a fitted adapter on rows with their right answers",
    "inspect": "show what each layer of an adapter does",
    "truncate": "shrink an adapter to a smaller rank, exactly",
    "combine": "make one adapter of several: weighted sum, TIES, DARE",
    "compare": "how much two adapters do the same",
    "merge": "write an adapter into its base: a plain model without extra cost",
    "convert": "write an adapter in another form",
    "doctor": "say what this machine can do",
}


class Reply(NamedTuple):
    """What a verb answers: text for people, values for `--json`; and the exit code."""

    text: str
    values: Any
    code: int = 0


class Parser(argparse.ArgumentParser):
    """An argparse parser that names the nearest flag and never abbreviates."""

    def __init__(self, prog: str, description: str | None) -> None:
        look = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=look)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        wrong = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
        hint = nearest(wrong, flags) if message.startswith("unrecognized") and wrong else ""
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def parser_of(verb: str) -> Parser:
    """The parser of one verb; its file is imported."""
    module = import_module(f"lorakit.cli.{verb}")
    parser = Parser(prog=f"lorakit {verb}", description=module.__doc__)
    module.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        f"lorakit {__version__}: low-rank adaptation on the machine you have\n\n"
        f"usage: lorakit VERB ...   (lorakit VERB --help says more)\n\n{lines}\n\n"
        "example: lorakit fit minilm demo:support --out runs/demo\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview(), end="")
            return 0 if words else 2
        if words[0] in ("-V", "--version"):
            print(f"lorakit {__version__}")
            return 0
        if words[0] not in VERBS:
            raise UsageError(f"unknown verb '{words[0]}'{nearest(words[0], VERBS)}")
        args = parser_of(words[0]).parse_args(words[1:])
        from lorakit.cli.common import speaks

        reply: Reply = import_module(f"lorakit.cli.{words[0]}").run(args)
        if speaks() and (args.json or reply.text):
            print(json.dumps(reply.values, ensure_ascii=False) if args.json else reply.text)
        return reply.code
    except SystemExit as stop:
        return int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except LorakitError as error:
        _complain(str(error))
        return 2 if isinstance(error, UsageError) else INTERRUPTED if isinstance(error, StoppedError) else 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        asked = re.search(r"allocate (\d+) bytes", str(error))
        told = f": {int(asked[1]) / 2**20:,.0f} MiB more were asked for" if asked else ""
        _complain(f"memory ran out{told}; free some, or take a smaller model or less at once")
        return 1


def _complain(sentence: str) -> None:
    """On stderr; and in the error file of torchrun, which shows it last, below much of its own."""
    print(f"lorakit: {sentence}", file=sys.stderr)
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        more = {"py_callstack": f"lorakit: {sentence}", "timestamp": str(int(time.time()))}
        with suppress(OSError), open(place, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": sentence, "extraInfo": more}}, file)
