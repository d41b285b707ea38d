"""curve.png: training loss and validation metric over steps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import MissingExtraError
from lorakit.files import write_bytes


def draw_curve(records: Sequence[dict[str, Any]], path: Path, metric: str) -> None:
    """Draws records (as in records.jsonl) to a PNG: losses, and on the right a metric from 0 to 1.

    Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None
    steps = [record for record in records if record["kind"] == "step"]
    valid = [record for record in records if record["kind"] == "valid"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in steps], _smooth([r["loss"] for r in steps]), color="#3b6ea5", label="training loss")
    axes.plot([r["step"] for r in valid], [r["loss"] for r in valid], "o-", color="#c0392b", label="validation loss")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    right = axes.twinx()
    name = metric.replace("_", " ")
    right.plot(
        [r["step"] for r in valid], [r[metric] for r in valid], "s--", color="#2c7a4b", label=f"validation {name}"
    )
    right.set(ylabel=name, ylim=(0, 1.02))
    lines = axes.get_lines() + right.get_lines()
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=False)
    axes.spines["top"].set_visible(False)
    right.spines["top"].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, format="png")
    write_bytes(path, stream.getvalue())


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, so that the trend can be seen."""
    result: list[float] = []
    for value in values:
        result.append(value if not result else keep * result[-1] + (1 - keep) * value)
    return result
