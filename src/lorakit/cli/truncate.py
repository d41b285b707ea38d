"""Shrink an adapter: every delta by its best approximation of smaller rank, exactly and without the model.

By a rank, by shares of what each layer does (--energy), or under one budget over all layers (--error, --budget,
--keep), where layers that do little lose most. Of a run, directions are worth what the loss would rise by without
them, as its last pass told (moments.safetensors); of other adapters, and with --by weights, what they change of the
weights.

--recover lets the small adapter learn for a few steps more, on the rows that the run learned from, and writes a run.

example: lorakit truncate runs/demo --rank 4 --out runs/demo-r4
         lorakit truncate runs/demo --keep 0.25 --recover demo:support --out runs/demo-small
"""

import argparse
from pathlib import Path
from typing import Any

from lorakit.cli import Reply
from lorakit.cli.common import size

_BY = ("loss", "weights")
_RECOVERY, _FEWEST = 0.12, 30  # steps of it: a share of the run's, and at least so many


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory")
    group = parser.add_argument_group("how small; one of them")
    group.add_argument("--rank", type=int, metavar="R", help="new rank of every layer")
    group.add_argument("--energy", type=float, metavar="SHARE", help="what each layer keeps, 0 to 1")
    group.add_argument(
        "--error", type=float, metavar="SHARE", help="what all together may lose (relative norm), 0 to 1"
    )
    group.add_argument("--budget", type=int, metavar="N", help="numbers that all layers have together")
    group.add_argument("--keep", type=float, metavar="SHARE", help="the same as a share of now, 0 to 1")
    parser.add_argument("--by", choices=_BY, help="what directions are worth (default: loss, where it is known)")
    parser.add_argument("--recover", metavar="DATA", help="learn a few steps more on these rows")
    parser.add_argument("--recover-steps", type=int, metavar="N", help="so many (default: 12 %% of the run's)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the smaller adapter goes")


def run(args: argparse.Namespace) -> Reply:
    """Loads, truncates, saves; with --recover fits."""
    from lorakit.algebra.truncate import truncate
    from lorakit.errors import UsageError
    from lorakit.fit.use import adapter_in
    from lorakit.moments import FILE, load_moments

    out, place = Path(args.out), Path(args.adapter)
    if out.exists():
        raise UsageError(f"'{out}' exists already; name another directory")
    if args.recover_steps is not None and not args.recover:
        raise UsageError("--recover-steps says how long to recover; name the rows with --recover")
    adapter = adapter_in(place)
    known = (place / FILE).is_file()
    if args.by == "loss" and not known:
        raise UsageError(f"'{place}' holds no {FILE}, which the end of a fit writes; leave --by out")
    moments = load_moments(place / FILE, adapter) if known and args.by != "weights" else None
    goal = {name: getattr(args, name) for name in ("rank", "energy", "error", "budget", "keep")}
    small = truncate(adapter, **goal, moments=moments)
    told = small.meta["truncated"]
    ranks = sorted({layer.rank for layer in small.layers.values()})
    gone = len(adapter.layers) - len(small.layers)
    cut = gone or any(small.layers[path].rank < layer.rank for path, layer in adapter.layers.items())
    text = f"{size(adapter.n_bytes)} -> {size(small.n_bytes)}, rank {'/'.join(map(str, ranks)) or 'none'}"
    text += f", {gone} of {len(adapter.layers)} layers gone" if gone else ""
    text += f"; all deltas together changed by {told['error']:.1%}"
    text += f", the loss by about {told['nats']:.2g} (foretold)" if "nats" in told else ""
    if not cut:
        text += "\nnote: nothing was cut: no layer has a greater rank than was asked for, and it is written as it was"
    values = {"bytes_before": adapter.n_bytes, "bytes": small.n_bytes, "ranks": ranks, "out": args.out, "gone": gone}
    values |= {key: value for key, value in told.items() if key != "asked"}
    if args.recover:
        metrics = _recovered(small, place, args)
        text += f"\nrecovered: {metrics['told']}"
        values["recovered"] = metrics
    else:
        small.save(out)
    return Reply(f"{text}\nwritten to {args.out}", values)


def _recovered(small: Any, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Goes on learning as the run did that is at `place`, at half its rate."""
    from lorakit.data import load_splits
    from lorakit.errors import UsageError
    from lorakit.files import read_json
    from lorakit.fit.run import fit
    from lorakit.fit.use import load_base_of
    from lorakit.tasks.task import figure, task_of

    file = place / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    if "settings" not in summary:
        raise UsageError(
            f"--recover learns as the run did, and '{place}' is no run of this lorakit; fit --from does it"
        )
    task = task_of(small.meta["task"])
    steps = args.recover_steps or max(_FEWEST, round(_RECOVERY * summary["steps"]))
    again = {"max_steps": steps, "learning_rate": summary["settings"]["learning_rate"] / 2, "device": "auto"}
    choices = {name: small.meta["task"][name] for name in task.choices if name in small.meta["task"]}
    settings = {**summary["settings"], **again, "dtype": "auto", "skip_bad": 0, "shard": False, **choices}
    base = load_base_of(small, task=task)
    data = load_splits(args.recover, seed=settings["seed"], read=task.read)
    result = fit(base, data, task.name, adapter=small, out=args.out, consume=True, **settings)
    name = result.summary["metric"]
    told = f"{name} {figure(name, result.before[name])} -> {figure(name, result.metrics[name])} in {steps} steps"
    return {"steps": steps, "before": result.before, "test": result.metrics, "told": told}
