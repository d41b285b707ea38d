"""Train an adapter on labelled texts, keep the best by the validation rows, prove it on the test rows.

DATA is a CSV, TSV, JSON Lines or Parquet file, a directory with train/valid/test files, a Hugging Face dataset
directory, or demo:support. Parts that are not given are split off the training rows. The run directory gets
plan.toml, adapter/ (which PEFT reads too), records.jsonl, curve.png and summary.json.

example: lorakit fit minilm demo:support --out runs/demo
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import data_arguments, layer_arguments, plan_flags_given, plan_from, progress, say, size

_SETTINGS = {
    "epochs": (int, "most passes over the training rows"),
    "batch-size": (int, "texts in one step"),
    "learning-rate": (float, "peak of the schedule"),
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
    "tokens-per-pass": (int, "most tokens at once: bounds memory, changes no result"),
    "prefix": (str, "frozen blocks' states over the epochs: auto, memory, file, or off"),
    "dtype": (str, "of what is frozen: bf16, fp32, or auto"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("base", help="minilm, a Transformers directory, or a name on the hub")
    parser.add_argument("data", help="file, directory, or demo:support")
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--valid", metavar="FILE", help="validation rows")
    parser.add_argument("--test", metavar="FILE", help="test rows")
    data_arguments(parser)
    parser.add_argument("--task", default="classify", help="classify (default): one label for each text")
    parser.add_argument("--pool", help="mean, cls or last (as the base wants)")
    parser.add_argument("--plan", metavar="FILE", help="train by this plan instead of the flags below")
    parser.add_argument("--settings", metavar="FILE", help="TOML file with the settings below, same names")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out that was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    layer_arguments(parser)
    group = parser.add_argument_group("settings")
    for name, (kind, what) in _SETTINGS.items():
        group.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=what)


def run(args: argparse.Namespace) -> Reply:
    """Loads, trains, reports."""
    from lorakit.data import load_splits
    from lorakit.errors import StoppedError, UsageError
    from lorakit.fit.run import claim, fit
    from lorakit.fit.settings import make_settings
    from lorakit.plan import Plan
    from lorakit.tasks.base import load_base

    settings = _settings(args)
    make_settings(settings)
    if not args.out:
        raise UsageError("--out is empty; name a directory for the run")
    claim(Path(args.out), args.resume, args.overwrite)
    if args.text and args.text == args.label:
        raise UsageError(f"--text and --label are both '{args.text}'; the label needs a column of its own")
    data = load_splits(
        args.data, valid=args.valid, test=args.test, text=args.text, label=args.label, seed=settings.get("seed", 0)
    )
    if args.plan and plan_flags_given(args):
        raise UsageError(f"--plan says what to train; {', '.join(plan_flags_given(args))} would say it twice")
    base = load_base(args.base, pool=args.pool)
    say(
        f"{base.name}: {len(data.train)} rows to learn from, {len(data.valid)} to choose by, "
        f"{len(data.test)} to report on"
    )
    n_leaks = len(set(data.train.texts) & {*data.valid.texts, *data.test.texts})
    if n_leaks:
        say(f"note: {n_leaks} texts are in the training rows and in the held-out rows too, which flatters the accuracy")
    say(f"{len(data.labels)} labels; first row: {data.train.texts[0][:70]!r} -> {(data.train.labels or ('',))[0]}")
    plan = Plan.load(args.plan) if args.plan else plan_from(args, base.model)
    out = Path(args.out)
    try:
        result = fit(
            base,
            data,
            args.task,
            plan=plan,
            out=out,
            resume=args.resume,
            overwrite=args.overwrite,
            watch=_Watch(),
            **settings,
        )
    except KeyboardInterrupt:
        kept = (out / "checkpoint").is_dir()
        way = "the same command with --resume goes on from its checkpoint" if kept else "no checkpoint was written yet"
        raise StoppedError(f"interrupted; {way} ('{out}')") from None
    return Reply(_report(result.summary, args.out), {**result.summary, "out": args.out})


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    from lorakit.fit.settings import read_settings

    settings = read_settings(Path(args.settings)) if args.settings else {}
    for name in _SETTINGS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            settings[name.replace("-", "_")] = value
    if args.truncate:
        settings["truncate"] = True
    return settings


class _Watch:
    """Shows records as they come: a bar on a terminal, a line for each epoch in a pipe."""

    def __init__(self) -> None:
        self.move: Any = None
        self.note = ""

    def __call__(self, record: Any, total: int) -> None:
        if self.move is None and sys.stderr.isatty():
            self.move = progress(total, "step")
        if record.kind == "valid":
            values = record.values
            self.note = f"valid accuracy {values['accuracy']:.3f}"
            if self.move is None:
                say(f"epoch {record.epoch}: step {record.step} of {total}, {self.note}, loss {values['loss']:.3f}")
        elif self.move is not None:
            self.move(record.step, f"loss {record.values['loss']:.3f}, {self.note}")


def _report(summary: dict[str, Any], out: str) -> str:
    before, after = summary["before"], summary["test"]
    program = sys.argv[0] if Path(sys.argv[0]).name == "lorakit" else "lorakit"
    own, whole = summary["adapter_bytes"], summary["base_bytes"]
    return "\n".join(
        [
            "",
            f"held-out accuracy  {before['accuracy']:.1%} -> {after['accuracy']:.1%}   "
            f"(macro F1 {after['macro_f1']:.3f}, {summary['rows']['test']} test rows)",
            f"adapter            {size(own)}, {own / whole:.1%} of the base's {size(whole)}",
            f"training           {summary['steps']} steps in {summary['train_s']:.0f} s, "
            f"{summary['tokens_per_s']:,} tokens/s on {summary['threads']} threads in {summary['dtype']}; "
            f"{summary['total_s']:.0f} s in all",
            *([f"frozen prefix      {summary['prefix']}"] if not summary["prefix"].startswith("off") else []),
            *([f"padded             {summary['padded']}"] if summary["padded"] else []),
            f"kept               epoch {summary['best_epoch']} of {summary['epochs']}, the best on the validation rows"
            f"{'; stopped early, no better one came' if summary['stopped_early'] else ''}",
            f"run directory      {out}",
            f"next               {program} predict {out} --say 'my parcel never came'  |  {program} inspect {out}",
        ]
    )
