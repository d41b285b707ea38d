"""Train an adapter on your rows, keep the best by the validation rows, prove it on the test rows.

DATA is a CSV, TSV, JSON Lines, JSON (all four also gzip-ed) or Parquet file, a directory with train/valid/test files, a
Hugging Face dataset directory, or demo:support; for --task complete also a text file or a folder of text and code. What
each task reads, and in which shapes, is in docs/tasks. Parts that are not given are split off the training rows. The
run directory gets plan.toml, adapter/ (which PEFT reads too), records.jsonl, curve.png and summary.json.

Started by torchrun or accelerate launch, several processes share the work of every step and end as one would.

example: lorakit fit minilm demo:support --out runs/demo
         lorakit fit Qwen/Qwen2.5-0.5B-Instruct mine.jsonl --task generate --out runs/mine
         lorakit fit Qwen/Qwen2.5-0.5B stories.txt --task complete --out runs/stories
         lorakit fit new:64 ratings.csv --task recommend --out runs/base --batch-size 1024
         lorakit fit google-t5/t5-small news.csv --task translate --source-prefix "summarize: " --out runs/short
         torchrun --nproc-per-node 2 -m lorakit fit minilm demo:support --out runs/two
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import (
    BASE_HELP,
    DEVICE_HELP,
    SKIP_HELP,
    TASK_HELP,
    columns_for,
    data_arguments,
    flags_for,
    layer_arguments,
    plan_flags_given,
    progress,
    rules_from,
    say,
    size,
    speaks,
    worded,
)


def rate(text: str) -> float | str:
    """A learning rate as it is written."""
    return float(text) if text[:1] in "0123456789." else text


_SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "epochs": (int, "most passes over the training rows"),
    "batch-size": (int, "texts in one step"),
    "learning-rate": (rate, "peak of the schedule: a number, default (by width and method) or auto (tries rates)"),
    "warmup": (float, "share of the steps that warm up"),
    "weight-decay": (float, "of AdamW"),
    "clip": (float, "bound on the norm of the gradient"),
    "patience": (int, "evaluations without a better one before it stops"),
    "seed": (int, "of everything random"),
    "max-steps": (int, "bound on the steps, 0 for none"),
    "checkpoint-steps": (int, "checkpoint every so many steps too, 0 for every epoch only"),
    "schedule": (str, "after the warm-up: cosine or linear down to 0, or constant"),
    "lora-plus": (float, "how much faster the factors b learn (LoRA+), 1 for equally"),
    "ema": (float, "decay of an average of the parameters to evaluate and keep, 0 for none"),
    "tokens-per-pass": (int, "most tokens at once: bounds memory, changes no result; 0 for what memory allows"),
    "threads": (int, "threads to train with; 0 for OMP_NUM_THREADS, or what a short trial finds fastest"),
    "device": (str, DEVICE_HELP),
    "prefix": (str, "frozen blocks' states over the epochs: auto, memory, file, or off"),
    "dtype": (str, "of what is frozen: bf16, fp32, or auto"),
    "skip-bad": (int, SKIP_HELP),
}
_CHOICES: dict[str, dict[str, Any]] = {  # each task says which of them it knows
    "beta": {"type": float, "help": "prefer: how firmly the model is held to its base (default 0.1)"},
    "label-smoothing": {"type": float, "help": "prefer: share of pairs that may be the wrong way round (default 0)"},
    "variant": {"help": "prefer: sigmoid (default: DPO) or ipo"},
    "temperature": {"type": float, "help": "embed: what similarities are divided by (default 0.05)"},
    "window": {"type": int, "help": "complete: tokens of a window, in which longer texts are cut (default 1024)"},
    "overlap": {"type": int, "help": "complete: tokens of the window before that each one sees again (default 0)"},
    "symmetric": {"action": "store_true", "default": None, "help": "embed: each positive is to find its query too"},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("base", help=BASE_HELP)
    parser.add_argument("data", help="file, directory, or demo:support")
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--valid", metavar="FILE", help="validation rows")
    parser.add_argument("--test", metavar="FILE", help="test rows")
    data_arguments(parser)
    parser.add_argument("--task", default="classify", help=TASK_HELP)
    parser.add_argument("--pool", help="classify, labels, regress, embed: mean, cls or last; image: own, cls or mean")
    parser.add_argument(
        "--template", help="generate, prefer: auto (default: the base's chat template, if any) or plain"
    )
    parser.add_argument("--source-prefix", metavar="TEXT", help="translate: text in front of every source")
    parser.add_argument(
        "--quantize", metavar="FORMAT", help="keep the base in few bits: int8, nf4 or int4 (see lorakit quantize)"
    )
    parser.add_argument("--plan", metavar="FILE", help="train by this plan instead of the flags below")
    parser.add_argument("--from", dest="adapter", metavar="DIR", help="go on with this adapter or run on other rows")
    parser.add_argument("--settings", metavar="FILE", help="TOML file with the settings below, same names")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out that was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    layer_arguments(parser)
    group = parser.add_argument_group("settings")
    for name, (kind, what) in _SETTINGS.items():
        words = [f"--{name}", *(["--lr"] if name == "learning-rate" else [])]
        group.add_argument(*words, type=kind, metavar=kind.__name__.upper(), help=what)
    group.add_argument(
        "--shard", action="store_true", help="each of several processes holds a part of the frozen blocks"
    )
    group = parser.add_argument_group("settings of one task")
    for name, more in _CHOICES.items():
        group.add_argument(f"--{name}", **more)


def run(args: argparse.Namespace) -> Reply:
    """Loads, trains, reports."""
    from lorakit.data import load_splits
    from lorakit.data.faults import skipping, usable
    from lorakit.device import resolve_device
    from lorakit.errors import StoppedError, UsageError
    from lorakit.fit.directory import claim
    from lorakit.fit.run import fit
    from lorakit.fit.settings import GO_ON, make_settings
    from lorakit.fit.use import adapter_in
    from lorakit.fit.workers import Workers
    from lorakit.method import STARTS
    from lorakit.plan import Plan
    from lorakit.quantize import quantize
    from lorakit.tasks.task import TASKS

    task = TASKS[args.task]
    settings = _settings(args, task)
    chosen = make_settings({name: value for name, value in settings.items() if name not in task.choices})
    Workers.started(shard=chosen.shard)
    resolve_device(chosen.device)  # what is not here is said before anything is read
    if not args.out:
        raise UsageError("--out is empty; name a directory for the run")
    if speaks():
        claim(Path(args.out), args.resume, args.overwrite)
    columns, wishes = columns_for(task, args), flags_for(task, args, ("pool", "template", "source_prefix"), task.wishes)
    seed = settings.get("seed", 0)
    said = [flag for flag in ("--plan", "--from") if getattr(args, {"--from": "adapter"}.get(flag, "plan"))]
    if said and (twice := [*said[1:], *plan_flags_given(args)]):
        raise UsageError(f"{said[0]} says what to train; {', '.join(twice)} would say it twice")
    out, rules = Path(args.out), rules_from(args)
    with skipping(settings.get("skip_bad", 0)):
        data = load_splits(args.data, valid=args.valid, test=args.test, seed=seed, read=task.read, **columns)
        data, base = usable(data, lambda rows: task.base_for(args.base, rows, **wishes))
        given = Plan.load(args.plan) if args.plan else None
        adapter = adapter_in(args.adapter) if args.adapter else None
        if args.quantize:
            starts = {layer.start for layer in given.layers.values()} if given else {rules.get("start") or ""}
            keep = any("original" in STARTS[start].needs for start in starts if start)
            say(f"base in {args.quantize}: {quantize(base.model, args.quantize, keep=keep)}")
        if adapter is None and given is None:
            given = task.plan(base.model, **worded(rules, args.soft_prompt_words, base.tokenizer))
        watch = _Watch(task)
        try:
            result = fit(
                base,
                data,
                args.task,
                plan=given,
                adapter=adapter,
                out=out,
                resume=args.resume,
                overwrite=args.overwrite,
                consume=True,
                watch=watch,
                ready=partial(_tell, base.name),
                **settings,
            )
        except KeyboardInterrupt:
            if not watch.began:  # a checkpoint that is there is that of the run before
                way = "it had not begun yet, give the same command again"
            elif (out / "checkpoint").is_dir():
                way = f"{GO_ON} from its checkpoint"
            else:
                way = "no checkpoint was written yet, --overwrite begins anew"
            raise StoppedError(f"interrupted; {way} ('{out}')") from None
    if not speaks():
        return Reply("", {})
    return Reply(_report(task, result.summary, args.out), {**result.summary, "out": args.out})


def _tell(base: str, data: Any) -> None:
    """Which rows are used, and what they are."""
    from lorakit.data.faults import told

    for line in told(data.skipped):
        say(f"note: {line}")
    say(f"{base}: {len(data.train)} rows to learn from, {len(data.valid)} to choose by, {len(data.test)} to report on")
    if n_leaks := data.n_leaks:
        say(f"note: {n_leaks} texts are in the training rows and in the held-out rows too, which flatters the result")
    say(data.train.about())


def _settings(args: argparse.Namespace, task: Any) -> dict[str, Any]:
    from lorakit.fit.settings import read_settings

    settings = read_settings(Path(args.settings)) if args.settings else {}
    for name in _SETTINGS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            settings[name.replace("-", "_")] = value
    for name in ("truncate", "shard"):
        if getattr(args, name):
            settings[name] = True
    names = [name.replace("-", "_") for name in _CHOICES]
    return settings | flags_for(task, args, names, task.choices)


class _Watch:
    """Shows records as they come: a bar on a terminal, a line for each epoch in a pipe."""

    def __init__(self, task: Any) -> None:
        self.names = [task.metric, *(name for name in ("loss", task.drawn) if name != task.metric)][:2]
        self.move: Any = None
        self.note = ""
        self.began = False

    def __call__(self, record: Any, total: int) -> None:
        self.began = True
        if record.kind == "start":
            if record.values["seen"]:
                say(f"the model sees: {_short(record.values['seen'])}")
            say(_memory(record.values))
            return
        if self.move is None:
            self.move = progress(total, "step")
        if record.kind == "valid":
            from lorakit.tasks.task import figure

            first, second = (f"{name.replace('_', ' ')} {figure(name, record.values[name])}" for name in self.names)
            self.note = f"valid {first}"
            if self.move is None:
                say(f"epoch {record.epoch}: step {record.step} of {total}, {self.note}, {second}")
        elif self.move is not None:
            self.move(record.step, f"loss {record.values['loss']:.3f}, {self.note}")


def _short(text: str) -> str:
    """On one line, without its middle."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:120]} [...] {line[-160:]}"


def _memory(values: Any) -> str:
    needed, free = (size(values[name]) for name in ("estimated_bytes", "free_bytes"))
    return f"memory: about {needed} at the peak, {free} free; passes of up to {values['tokens_per_pass']:,} tokens"


def _report(task: Any, summary: dict[str, Any], out: str) -> str:
    from lorakit.tasks.task import figure

    before, after = summary["before"], summary["test"]
    program = sys.argv[0] if Path(sys.argv[0]).name == "lorakit" else "lorakit"
    processes = f"{summary['processes']} processes of " if summary["processes"] > 1 else ""
    own, whole, settled = summary["adapter_bytes"], summary["base_bytes"], summary["settled"]
    memory = summary["memory"]
    rest = [f"{name.replace('_', ' ')} {figure(name, after[name])}" for name in after if name != task.metric]
    kept = f"epoch {summary['best_epoch']} of {summary['epochs']}, the best on the validation rows"
    tried = f"--say '{task.try_it}'" if task.try_it else "rows.csv"
    tried += " --say2 'the second text'" if summary.get("pairs") else ""
    lines = [
        (
            f"held-out {task.metric}",
            f"{figure(task.metric, before[task.metric])} -> {figure(task.metric, after[task.metric])}   "
            f"({', '.join(rest)}, {summary['rows']['test']} test rows)",
        ),
        ("adapter", f"{size(own)}, {own / whole:.1%} of the base's {size(whole)}"),
        (
            "training",
            f"{summary['steps']} steps in {summary['train_s']:.0f} s, {summary['tokens_per_s']:,} tokens/s on "
            f"{processes}{summary['gpu'] or str(summary['threads']) + ' threads'} in {summary['dtype']}; "
            f"{summary['total_s']:.0f} s in all",
        ),
        *(
            [("learning rate", f"{settled['learning_rate']:g} {settled['notes']['learning_rate']['why']}")]
            if "learning_rate" in settled
            else []
        ),
        *([("sharded", f"each process holds {size(summary['sharded'])} of the base")] if summary["sharded"] else []),
        ("memory", f"peak {size(memory['peak_bytes'])}, estimated {size(memory['estimated_bytes'])}"),
        *(
            [("frozen prefix", summary["prefix"])]
            if not summary["prefix"].startswith("off") or "room" in summary["prefix"]
            else []
        ),
        *([("padded", summary["padded"])] if summary["padded"] else []),
        *([("slower", f"without our C functions: {summary['uncompiled']}")] if summary["uncompiled"] else []),
        ("kept", f"{kept}{'; stopped early, no better one came' if summary['stopped_early'] else ''}"),
        *task.told(summary),
        *(("note", note) for note in summary["notes"]),
        ("run directory", out),
        ("next", f"{program} predict {quote(out)} {tried}  |  {program} inspect {quote(out)}"),
    ]
    return "\n".join(["", *(f"{word:<18} {text}" for word, text in lines)])
