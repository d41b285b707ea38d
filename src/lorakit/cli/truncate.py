"""Shrink an adapter: every delta by its best approximation of smaller rank, exactly and without the model.

example: lorakit truncate runs/demo --rank 4 --out runs/demo-r4
"""

import argparse
from pathlib import Path

from lorakit.cli import Reply
from lorakit.cli.common import size


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapter", help="adapter or run directory")
    parser.add_argument("--rank", type=int, metavar="R", help="new rank of every layer")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="or: share of squared singular values to keep, 0 to 1"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the smaller adapter goes")


def run(args: argparse.Namespace) -> Reply:
    """Loads, truncates, saves."""
    from lorakit.algebra.truncate import truncate
    from lorakit.errors import UsageError
    from lorakit.fit.use import adapter_in

    out = Path(args.out)
    if out.exists():
        raise UsageError(f"'{out}' exists already; name another directory")
    adapter = adapter_in(args.adapter)
    small = truncate(adapter, rank=args.rank, energy=args.energy)
    small.save(out)
    ranks = sorted({layer.rank for layer in small.layers.values()})
    cut = any(small.layers[path].rank < layer.rank for path, layer in adapter.layers.items())
    told = "/".join(map(str, ranks)) or "none"
    text = f"{size(adapter.n_bytes)} -> {size(small.n_bytes)}, rank {told}, written to {args.out}"
    if not cut:
        text += "\nnote: nothing was cut: no layer has a greater rank than was asked for, and it is written as it was"
    return Reply(text, {"bytes_before": adapter.n_bytes, "bytes": small.n_bytes, "ranks": ranks, "out": args.out})
