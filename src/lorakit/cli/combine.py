"""Make one adapter of several: their weighted sum, exactly, or TIES, DARE and magnitude pruning. Without the model.

Each adapter stands with its weight behind the last colon (1 if there is none); a negative one takes away.

example: lorakit combine runs/en:0.7 runs/law:0.3 --out both
         lorakit combine runs/all:1 runs/bad:-1 --rank 8 --out better
         lorakit combine runs/en runs/law --how ties --density 0.3 --out both
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli import Reply
from lorakit.cli.common import size

if TYPE_CHECKING:
    from lorakit.adapter import Adapter


def arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="adapter or run directory")
    parser.add_argument(
        "--how",
        default="linear",
        help="linear (default), ties, dare_linear, dare_ties, magnitude_prune; with _svd behind it on whole deltas",
    )
    parser.add_argument("--density", type=float, default=0.5, help="share of numbers kept, by rules that drop some")
    parser.add_argument("--sign", default="total", help="what elects signs in ties: total (default) or frequency")
    parser.add_argument("--seed", type=int, default=0, help="of what is random in dare")
    parser.add_argument("--trained", default="", help="whole parameters (heads): mean, none, or one of the directories")
    group = parser.add_argument_group("truncate the result; one of them")
    group.add_argument("--rank", type=int, metavar="R", help="rank of every layer")
    group.add_argument("--energy", type=float, metavar="SHARE", help="what each layer keeps, 0 to 1")
    group.add_argument(
        "--error", type=float, metavar="SHARE", help="what all together may lose (relative norm), 0 to 1"
    )
    group.add_argument("--budget", type=int, metavar="N", help="numbers that all layers have together")
    group.add_argument("--keep", type=float, metavar="SHARE", help="the same as a share, 0 to 1")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the adapter goes")


def run(args: argparse.Namespace) -> Reply:
    """Loads, combines, saves; says how much the adapters do the same."""
    from itertools import combinations

    from lorakit.algebra.combine import combine
    from lorakit.algebra.compare import compare
    from lorakit.errors import UsageError

    out = Path(args.out)
    if out.exists():
        raise UsageError(f"'{out}' exists already; name another directory")
    given: dict[str, tuple[Adapter, float]] = {}
    for word in args.adapters:
        name, adapter, weight = _read(word)
        if name in given:
            raise UsageError(f"'{name}' is given twice; give it once, with the sum of its weights")
        given[name] = adapter, weight
    names = ("rank", "energy", "error", "budget", "keep", "density", "sign", "seed", "trained")
    made = combine(given, args.how, **{name: getattr(args, name) for name in names})
    made.save(out)
    ranks = sorted({layer.rank for layer in made.layers.values()})
    lines = [
        f"{len(made.layers)} layers, rank {'/'.join(map(str, ranks))}, {size(made.n_bytes)}, written to {args.out}"
    ]
    if "truncated" in made.meta:
        lines.append(f"truncated: all deltas together changed by {made.meta['truncated']['error']:.1%}")
    cosines = []
    for (one, (first, _)), (two, (second, _)) in combinations(given.items(), 2):
        if first.layers.keys() & second.layers.keys():
            cosines.append([one, two, compare(first, second).cosine])
            lines.append(f"cosine of {one} and {two}: {cosines[-1][2]:+.3f}")
    weights = {name: weight for name, (_, weight) in given.items()}
    error = made.meta.get("truncated", {}).get("error", 0.0)
    values = {"out": args.out, "ranks": ranks, "bytes": made.n_bytes, "weights": weights, "cosines": cosines}
    return Reply("\n".join(lines), {**values, "error": error})


def _read(word: str) -> tuple[str, "Adapter", float]:
    """Name, adapter and weight."""
    from lorakit.errors import UsageError
    from lorakit.fit.use import adapter_in

    name, colon, told = word.rpartition(":")
    if not colon or Path(word).exists():
        return word, adapter_in(word), 1.0
    try:
        weight = float(told)
    except ValueError:
        raise UsageError(f"'{told}' behind '{name}' is no weight; write {name}:0.5") from None
    return name, adapter_in(name), weight
