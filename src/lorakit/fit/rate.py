"""The learning rate: by a rule from the base's width and the plan, or by a range test on training rows.

The rule is the one of tinker-cookbook (Llama, after "LoRA without regret", Thinking Machines, 2025): ten times the rate
of full fine-tuning, whatever the rank, `5e-4 (2000 / width)^0.781`. How methods and scales differ from its LoRA with
alpha 16 is measured (dev/LOG.md). The range test is that of Smith (2017), "Cyclical learning rates", arXiv 1506.01186.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lorakit.data.batches import Examples
from lorakit.errors import NotFiniteError
from lorakit.fit.learner import Learner
from lorakit.fit.loop import total_steps
from lorakit.method import METHODS, settled
from lorakit.plan import LayerPlan, Plan, resolve_scale
from lorakit.prompt import PROMPTS
from lorakit.whole import resolve_trained

_LOWEST, _HIGHEST = 1e-5, 2e-2
_FULL, _FEW, _HEAD = 0.1, 2.0, 5.0  # beside a pair: pretrained matrices that learn whole; norms and biases; a head
_BELOW, _ABOVE = 32.0, 64.0  # the range: from so far below the rule's rate to so far above
_FEWEST, _MOST, _SHARE = 30, 60, 0.1  # steps of the test, and their share of the run's
_CYCLE = 4  # batches that take turns, so that the mean over a turn moves by what is learned only
_FALL = 0.05  # of the first loss: less tells nothing
_RISE = 0.25  # of the fall: when so much is lost again, the rate is too high
_MARGIN = 4.0  # below that rate
_STEPS = 10  # in which the chosen rate learns half of it


class Rate(NamedTuple):
    """A learning rate, why this one, and the rates that were tried with the mean loss at each."""

    value: float
    why: str
    tried: tuple[tuple[float, float], ...] = ()

    def note(self) -> dict[str, Any]:
        """For the summary."""
        return {"why": self.why, "tried": [[float(f"{x:.3g}") for x in pair] for pair in self.tried]}


def default_rate(learner: Learner, plan: Plan) -> Rate:
    """By the rule."""
    width = learner.trunk.width
    value = min(5e-4 * (2000 / width) ** 0.781, _HIGHEST)
    told = [f"width {width}"]
    dims = _trained_of_base(learner, plan)
    whole = any(dim > 1 for dim in dims)
    if plan.layers:
        pace = statistics.median(_pace(layer) for layer in plan.layers.values())
    elif plan.prompt is not None:
        pace = PROMPTS[plan.prompt.method].pace
    else:
        pace = 1.0 if whole else _FEW if dims else _HEAD
    told += [f"times {pace:.2g} for what learns"] if pace != 1 else []
    told += [f"times {_FULL:g} for pretrained weights that learn as a whole"] if whole else []
    value *= pace * (_FULL if whole else 1.0)
    return Rate(float(f"{max(value, _LOWEST):.2g}"), f"by rule: {', '.join(told)}")


def _pace(layer: LayerPlan) -> float:
    """How much faster than LoRA at its usual scale this layer may learn; `Method.pace` is that at the method's own.

    A step of Adam moves b by the rate, and the delta by that times the scale; a, and a head, move whatever the scale.
    """
    method = METHODS[layer.method]
    if not method.takes_rank:
        return method.pace
    usual = resolve_scale(method.scale, layer.rank)
    return float(method.pace * min(abs(usual / settled(layer).scale_value) ** 0.75, 4.0))


def _trained_of_base(learner: Learner, plan: Plan) -> list[int]:
    """Dimensions of every pretrained parameter that learns as a whole."""
    if learner.task.from_scratch:
        return []
    head = learner.task.head
    found = resolve_trained(learner.model, plan.trained)
    return [p.dim() for name, p in found.items() if not (head and name.startswith(f"{head}."))]


def tried_rate(learner: Learner, examples: Examples, plan: Plan) -> Rate:
    """By a range test around the rule's rate, of at most a tenth of the run's steps but 30 at least and 60 at most.

    What learns, and the optimizer's memory, are put back bit for bit. Where the test tells nothing, the rule's rate.
    """
    usual = default_rate(learner, plan)
    n_steps = min(max(_FEWEST, round(_SHARE * total_steps(len(examples), learner.settings))), _MOST)
    curve = range_test(learner, examples, usual.value / _BELOW, usual.value * _ABOVE, n_steps)
    found = pick(curve)
    if found is None:
        why = f"{usual.why}, for no rate that was tried lowered the loss by {_FALL:.0%}"
        return Rate(usual.value, why, tuple(curve))
    return Rate(float(f"{found[0]:.2g}"), found[1], tuple(curve))


def range_test(
    learner: Learner, examples: Examples, low: float, high: float, n_steps: int
) -> list[tuple[float, float]]:
    """Rate and loss of steps whose rate rises from `low` to `high` by equal factors, on a few batches in turn.

    Ends early where the loss has risen again.
    """
    batches = learner.batches(examples)[:_CYCLE]
    before = {name: tensor.clone() for name, tensor in learner.memory().items()}
    curve: list[tuple[float, float]] = []
    try:
        for k in range(n_steps):
            rate = low * (high / low) ** (k / (n_steps - 1))
            curve.append((rate, learner.step(examples, batches[k % len(batches)], rate).loss))
            if _broken(curve) is not None:
                break
    except NotFiniteError:  # too high by far
        pass
    finally:
        learner.restore(before)
        learner.flat.clear()
    return curve


def _means(curve: Sequence[tuple[float, float]]) -> list[float]:
    """Mean loss over each turn of the batches, the first that ends at step `_CYCLE - 1`."""
    return [statistics.fmean(loss for _, loss in curve[k : k + _CYCLE]) for k in range(len(curve) - _CYCLE + 1)]


def _broken(curve: Sequence[tuple[float, float]]) -> float | None:
    """The first rate at which a good part of what was learned is lost again."""
    means = _means(curve)
    for k in range(1, len(means)):
        lowest = min(means[:k])
        if means[k] - lowest > max(_RISE * (means[0] - lowest), _FALL * means[0]):
            return curve[k + _CYCLE - 1][0]
    return None


def pick(curve: Sequence[tuple[float, float]]) -> tuple[float, str] | None:
    """A rate at which 10 steps go as far as the rising rates went until half of all that was learned was learned.

    That way is the sum of the rates: it hardly depends on how fast they rise. But no more than a quarter of the rate at
    which the loss rises again. None if it never falls.
    """
    means = _means(curve)
    if not means or means[0] - min(means) < _FALL * abs(means[0]):
        return None
    half = next(k for k, mean in enumerate(means) if mean <= (means[0] + min(means)) / 2)
    way = sum(rate for rate, _ in curve[: half + _CYCLE // 2])
    broken = _broken(curve)
    if broken is not None and broken / _MARGIN < way / _STEPS:
        return broken / _MARGIN, f"by trial: a quarter of {broken:.2g}, where the loss rose again"
    return (
        way / _STEPS,
        f"by trial of {curve[0][0]:.2g} to {curve[-1][0]:.2g}: half of what was learned in {_STEPS} steps",
    )
