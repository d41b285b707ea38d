"""What several verbs share."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.prompt import PromptPlan

_USUAL = 80, 24  # columns and rows of a terminal that does not tell them
_PAUSE_S = 10.0  # between lines that tell how far it is
TASK_WORDS = {
    "classify": "one label for each text",
    "generate": "a written answer to each prompt",
    "complete": "raw text or code, learned token by token and written on",
    "recommend": "items for each user, by what users had",
    "tag": "one tag for each word",
    "answer": "the answer to a question, found in a text",
    "translate": "from a text to a text by an encoder-decoder",
    "labels": "any number of labels for each text",
    "regress": "a number for each text",
    "prefer": "written answers, tuned by which of two is the better one",
    "embed": "a vector for each text, near those of what belongs to it",
    "image": "one label for each image",
    "image_text": "one label for each image with its text",
}
TASK_HELP = "; ".join(f"{name}{' (default)' * (name == 'classify')}: {what}" for name, what in TASK_WORDS.items())
COLUMNS = {  # each task says which of them it reads
    "image": "images",
    "text": "texts",
    "text2": "second texts, where each row is a pair",
    "label": "labels",
    "number": "numbers to learn",
    "prompt": "prompts",
    "answer": "answers",
    "user": "users",
    "item": "items",
    "rating": "ratings, and the least that counts: '>=4' or 'stars>=4'",
    "time": "times",
    "words": "words",
    "tags": "tags",
    "question": "questions",
    "context": "texts that hold the answers",
    "begin": "characters at which answers begin",
    "source": "texts to translate, summarise or rewrite",
    "target": "texts they become",
    "chosen": "preferred answers",
    "rejected": "rejected answers",
    "query": "queries",
    "positive": "texts that belong to the queries",
    "negative": "texts that do not",
}
BASE_HELP = (
    "minilm, a Transformers directory, or a name on the hub; recommend: a directory of tables, or new:64 for tables of "
    "width 64 that are trained from scratch"
)
SKIP_HELP = "most rows that cannot be used and are left out, of all parts together (default 0: none, they are refused)"
DEVICE_HELP = "cpu, cuda (one GPU of several: cuda:1), or auto (default): a GPU, if there is one"
FORMS = {  # what else is to know of a table; each task says the same way which it takes
    "labels": ("A,B,C", "labels: columns of 0 and 1, one for each label, instead of --label"),
    "delimiter": ("MARK", "labels: what stands between labels in one field (found if it is one of ; | ,)"),
}


def layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that become a plan."""
    group = parser.add_argument_group("plan")
    group.add_argument("--rank", type=int, default=8, metavar="R", help="rank of every layer (default 8)")
    group.add_argument(
        "--layers",
        action="append",
        metavar="RULE",
        help='which layers: "all-linear" (default), "all-conv", "attention", "mlp", "all", a role, the end of a layer '
        'path, "re:REGEX"; repeat it, and add "=R" for a rank of its own: --layers attention=8 --layers mlp=16',
    )
    group.add_argument("--blocks", metavar="RANGE", help='only these blocks of the stack: "0-3", "4-", "last 2"')
    group.add_argument("--method", default="lora", metavar="NAME", help="lora (default); all are in docs/methods.md")
    group.add_argument("--scale", help='"16/r" (default of most methods), "16/sqrt(r)" or a number')
    group.add_argument("--start", metavar="NAME", help="kaiming (default), gaussian, orthogonal, pissa; or see there")
    group.add_argument(
        "--share", default="", metavar="FACTORS", help='"a", "b" or "a+b": one for all layers of a role and shape'
    )
    group.add_argument("--bias", default="none", help="biases to train fully: none (default), adapted or all")
    group.add_argument(
        "--trained", action="append", default=[], metavar="NAME", help='module trained fully; "*" is the base'
    )
    group.add_argument("--clip-rank", action="store_true", help="lower the rank where a layer's side demands it")
    group.add_argument(
        "--soft-prompt",
        metavar="METHOD[:N]",
        help="rows that learn in front of every text: soft:20, prefix:20 ... (docs/methods.md); alone, if no --layers",
    )
    group.add_argument("--soft-prompt-words", metavar="TEXT", help="words that the prompt begins as")


def rules_from(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of `lorakit.plan`. PlanError or UsageError for what no model could have."""
    from lorakit.errors import UsageError
    from lorakit.rules import refuse_rules

    rules: dict[str, int] = {}
    for rule in args.layers or []:
        name, equals, rank = rule.rpartition("=")
        if equals and rank.isdigit():
            rules[name] = int(rank)
        elif equals and not rule.startswith("re:"):
            raise UsageError(f"--layers {rule}: the rank after '=' must be a whole number")
        else:
            rules[rule] = args.rank
    scale: float | str | None = args.scale
    with suppress(TypeError, ValueError):  # a rule, or none
        scale = float(args.scale)
    for rank in {args.rank, *rules.values()}:
        refuse_rules(rank, args.method, scale, args.start, args.bias)
    return {
        "rank": args.rank,
        "layers": rules or None,
        "method": args.method,
        "scale": scale,
        "start": args.start,
        "share": args.share,
        "blocks": args.blocks,
        "trained": args.trained,
        "bias": args.bias,
        "clip_rank": args.clip_rank,
        "soft_prompt": _prompt_from(args),
    }


def _prompt_from(args: argparse.Namespace) -> "PromptPlan | None":
    from lorakit.errors import UsageError
    from lorakit.prompt import PromptPlan

    if args.soft_prompt is None:
        if args.soft_prompt_words is not None:
            raise UsageError("--soft-prompt-words says how a prompt begins; name one with --soft-prompt soft:20")
        return None
    found = PromptPlan.parse(args.soft_prompt)
    found.settled()
    return found


def worded(rules: dict[str, Any], text: str | None, tokenizer: Any) -> dict[str, Any]:
    """The rules with the words of the prompt, as the base's tokenizer has them."""
    if text is None:
        return rules
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {**rules, "soft_prompt": replace(rules["soft_prompt"], words=tuple(words))}


def plan_flags_given(args: argparse.Namespace) -> list[str]:
    """Plan flags that differ from their defaults."""
    defaults: dict[str, Any] = {
        "rank": 8,
        "layers": None,
        "blocks": None,
        "method": "lora",
        "scale": None,
        "start": None,
        "share": "",
        "soft_prompt": None,
        "soft_prompt_words": None,
    }
    defaults |= {"bias": "none", "trained": [], "clip_rank": False}
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that name columns."""
    for name, what in COLUMNS.items():
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"column of the {what} (found by its usual names)")
    for name, (word, what) in FORMS.items():
        parser.add_argument(f"--{name}", metavar=word, help=what)
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut texts that are longer than the model takes (generate: the beginning of the prompt)",
    )


def device_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that names a device; `fit` has it among its settings."""
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)


def flags_for(task: Any, args: argparse.Namespace, names: Iterable[str], known: Sequence[str]) -> dict[str, Any]:
    """Those of the flags that were given, as arguments; UsageError for one that this task does not know."""
    from lorakit.errors import UsageError, nearest

    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given:
        if name not in known:
            flag = name.replace("_", "-")
            raise UsageError(f"task '{task.name}' takes no --{flag}{nearest(name, known)}")
    return given


def columns_for(task: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The named columns, as arguments of the task's `read`."""
    return flags_for(task, args, (*COLUMNS, *FORMS), task.columns)


def speaks() -> bool:
    """Whether this process is the only one, or the first that torchrun started: the others keep quiet."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """A line for people, on stderr."""
    if speaks():
        print(message, file=sys.stderr, flush=True)


def progress(n_total: int, unit: str) -> Callable[[int, str], None] | None:
    """A bar with rate and remaining time on a terminal; None in a pipe."""
    if not sys.stderr.isatty() or not speaks():
        return None
    from lorakit.errors import MissingExtraError

    try:
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError("tqdm", "text") from None
    told = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    look: dict[str, Any] = {"dynamic_ncols": True} if told else {"ncols": _USUAL[0], "nrows": _USUAL[1]}
    bar = tqdm(total=n_total, unit=unit, **look)

    def move(done: int, note: str) -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done >= n_total:
            bar.close()

    return move


def bar(n_total: int, unit: str) -> Callable[[int, int], None]:
    """`progress` for whoever tells how many are done, and of how many; in a pipe a line every ten seconds.

    Those that are told may be others, windows of the rows: their share of all is that of the units.
    """
    move, last = progress(n_total, unit), time.monotonic()

    def tell(told: int, of: int) -> None:
        nonlocal last
        done = n_total * told // of
        if move is not None:
            move(done, "")
        elif time.monotonic() - last >= _PAUSE_S:
            last = time.monotonic()
            say(f"{done:,} of {n_total:,} {unit}s")

    return tell


def size(n_bytes: int) -> str:
    """1.35 MB."""
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.2f} GB"
