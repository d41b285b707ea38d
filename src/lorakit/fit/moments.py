"""The moments of a fitted adapter: what `truncate` may go by, at the end of every run.

They are taken with the very factors that the adapter has, from a few batches: r x r numbers need no more.
"""

from collections.abc import Mapping

from lorakit.adapter import Adapter
from lorakit.attach import moments_watched
from lorakit.data.batches import Examples
from lorakit.fit.learner import Learner
from lorakit.moments import Moments

_MOST, _FEWEST, _SHARE = 8, 2, 0.01  # batches; of the run's steps


def moments_of(learner: Learner, examples: Examples, n_steps: int) -> dict[str, Moments]:
    """Of every pair, with the parameters as they are."""
    batches = learner.batches(examples)[: max(_FEWEST, min(_MOST, round(_SHARE * n_steps)))]
    with moments_watched(learner.model) as watched:
        for indices in batches if len(watched) else ():
            learner.gradients(examples, indices)
            watched.step(examples.n_labels(indices))
    learner.flat.clear()
    sums = watched.sums()
    learner.workers.add(sums)
    return watched.found(sums)


def still_theirs(moments: Mapping[str, Moments], before: Adapter, after: Adapter) -> dict[str, Moments]:
    """Those of layers that are still what they were when they were watched."""
    same = {path for path, layer in after.layers.items() if layer.same_as(before.layers[path])}
    return {path: found for path, found in moments.items() if path in same}
