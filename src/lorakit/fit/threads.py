"""How many threads a fit trains with: as many as the user asked for, else as a short trial finds fastest.

More are not always faster: where others use the same processors, every parallel loop waits for its slowest thread. Our
C functions run on the threads that torch is set to (kernels/native).
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lorakit.data.batches import Examples, passes
from lorakit.errors import NotFiniteError
from lorakit.fit.learner import Learner
from lorakit.fit.loop import total_steps

_SHORT_S = 60.0  # a run below it is over before a trial has paid
_TRIAL_S, _TRIAL_SHARE = 2.0, 0.005  # the longest trial: seconds, or this share of the run, if that is more
_ROUNDS, _CLEAR = 3, 1.5  # passes before a count is given up; one fewer if it is slower by that factor
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_WISHES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Within the block torch's number of threads may be changed."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processors() -> int:
    """Processors that this process may use: its affinity, bounded by the quota of a container's control group."""
    found = len(_affinity())
    with suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        found = min(found, math.ceil(int(quota) / int(period)))
    return max(1, found)


def choose_threads(learner: Learner, examples: Examples) -> int:
    """The count to train with. Nothing that learns is changed; torch is left on whatever count came last."""
    now = torch.get_num_threads()
    if any(name in os.environ for name in _WISHES) or now not in (len(_affinity()), _cores()):
        return now  # the user's own wish
    most = processors()
    if most == 1:
        return 1
    if learner.flat.values.device.type != "cpu":
        return now  # the work is not theirs
    usual = max(1, min(now, most // learner.workers.size))
    if learner.workers.size > 1:  # their passes wait for each other, so that each would time all
        return usual
    settings = learner.settings
    batch = learner.batches(examples)[0]
    part = passes(examples, batch, settings.most_tokens)[-1]

    def timed(count: int) -> float:
        torch.set_num_threads(count)
        began = time.perf_counter()
        learner.gradients(examples, part)
        return time.perf_counter() - began

    try:
        timed(usual)  # builds kernels
        share = sum(examples.lengths[i] for i in part) / (settings.batch_size * statistics.fmean(examples.lengths))
        whole = timed(usual) / share * total_steps(len(examples), settings)
        if whole < _SHORT_S:
            return usual
        return race(timed, candidates(most, usual), max(_TRIAL_S, _TRIAL_SHARE * whole))
    except NotFiniteError:
        return usual  # the loop meets it in the first step, and says in which row
    finally:
        learner.flat.clear()


def candidates(most: int, usual: int) -> list[int]:
    """Counts worth a trial, the usual one first: 1, 2, 4 ... and `most`.

    >>> candidates(12, 6)
    [6, 1, 2, 4, 8, 12]
    """
    powers = {2**k for k in range(most.bit_length())}
    return [usual, *sorted((powers | {most}) - {usual})]


def race(timed: Callable[[int], float], counts: Sequence[int], seconds: float) -> int:
    """The count with the fastest passes, tried in turns until it is clear or `seconds` are over.

    `timed` runs one pass with so many threads and says how long it took. If not even one round fits, the first count.
    """
    times: dict[int, list[float]] = {count: [] for count in counts}
    left, spent = list(counts), 0.0
    while len(left) > 1:
        for count in left:
            if spent >= seconds:
                return fastest({count: times[count] for count in left}) if all(times.values()) else counts[0]
            times[count].append(timed(count))
            spent += times[count][-1]
        left = contenders({count: times[count] for count in left})
    return left[0]


def fastest(times: Mapping[int, Sequence[float]]) -> int:
    """The count with the lowest median; of equals the smaller."""
    return min(times, key=lambda count: (statistics.median(times[count]), count))


def contenders(times: Mapping[int, Sequence[float]]) -> list[int]:
    """Counts that may yet be the fastest: whose best pass beats the median of the fastest."""
    best, n_rounds = fastest(times), min(map(len, times.values()))
    bound = statistics.median(times[best]) * (1.0 if n_rounds >= _ROUNDS else _CLEAR)
    if n_rounds < _ROUNDS - 1:
        return list(times)
    return [count for count in times if count == best or min(times[count]) < bound]


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _cores() -> int:
    """Processors of the affinity that are not two of one core: torch begins with as many threads where it has MKL."""
    places = (Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in _affinity())
    try:
        return len({place.read_text(encoding="ascii") for place in places})
    except OSError:
        return len(_affinity())
