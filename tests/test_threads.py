"""How many threads a fit takes: the user's wish, the machine's bounds, the fastest in a trial; put back at its end."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

import lorakit as lk
from lorakit.errors import FitError
from lorakit.fit import run as fit_run
from lorakit.fit import settle, threads
from lorakit.fit.threads import candidates, choose_threads, contenders, fastest, processors, race
from tiny_text import small_task

QUICK = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3}

place, base, data = small_task(90)


@pytest.fixture
def open_choice(monkeypatch):
    """A machine of two processors, and a user who has said nothing."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: torch.get_num_threads())
    monkeypatch.setattr(threads, "processors", lambda: 2)
    monkeypatch.setattr(threads, "_TRIAL_S", 0.3)


def test_the_lowest_median_wins_and_of_equals_the_smaller_count():
    assert fastest({2: [1.0, 9.0, 1.2], 1: [1.1, 1.3, 1.2]}) == 1
    assert fastest({4: [1.0], 2: [0.9], 1: [3.0]}) == 2
    assert contenders({1: [1.0, 1.1, 1.2], 2: [1.3, 1.5, 1.2], 4: [1.05, 7, 8]}) == [1, 4]
    assert contenders({1: [1.0, 1.1], 2: [1.4, 1.5]}) == [1, 2]  # too few passes to give it up
    assert contenders({1: [1.0, 1.1], 2: [3.0, 3.1]}) == [1]
    assert contenders({1: [1.0], 2: [9.0]}) == [1, 2]  # the first builds kernels


def test_counts_to_try_are_powers_of_two_and_all():
    assert candidates(1, 1) == [1]
    assert candidates(2, 2) == [2, 1]
    assert candidates(12, 12) == [12, 1, 2, 4, 8]


def test_a_race_ends_when_it_is_clear_and_takes_no_longer_than_it_may():
    asked = []

    def timed(count):
        asked.append(count)
        return {2: 0.028, 1: 0.02}[count]  # two threads are slower: others use the processors

    assert race(timed, [2, 1], seconds=2.0) == 1
    assert asked == [2, 1] * 3
    asked.clear()
    noise = {1: itertools.cycle([0.020, 0.022, 0.030]), 2: itertools.cycle([0.030, 0.020, 0.022])}
    assert race(lambda count: asked.append(count) or next(noise[count]), [2, 1], seconds=1.0) in (1, 2)
    assert 40 <= len(asked) <= 44  # 1.0 s of passes of 0.024 s
    assert race(lambda _: 5.0, [4, 1, 2], seconds=2.0) == 4  # not one round fits: the usual count


def test_the_wish_of_the_user_is_kept(monkeypatch, open_choice):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert choose_threads(None, None) == torch.get_num_threads()  # torch has read the variable when it began
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.undo()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(len(threads._affinity()) + 3)
    try:
        assert choose_threads(None, None) == len(threads._affinity()) + 3
    finally:
        torch.set_num_threads(1)


CODE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lorakit.fit.threads import choose_threads, processors
print(processors(), choose_threads(None, None))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not tell the affinity; runs on Linux"
)
@pytest.mark.slow  # a process that imports torch
def test_one_processor_gives_one_thread():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "1"]


def test_the_quota_of_a_container_bounds_the_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(64)))
    for text, wanted in (("max 100000", 64), ("250000 100000", 3), ("10000 100000", 1), ("nonsense", 64)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
        assert processors() == wanted
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "absent")
    assert processors() == 64


def test_a_trial_changes_nothing_that_learns(base, data, monkeypatch, open_choice):
    monkeypatch.setattr(threads, "_SHORT_S", 0.0)
    seen = []

    def watched(learner, *rest):
        before = {name: tensor.clone() for name, tensor in learner.memory().items()}
        seen.append(settle.settle(learner, *rest))
        after = learner.memory()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not learner.flat.gradients.any()
        return seen[-1]

    monkeypatch.setattr(fit_run, "settle", watched)
    result = lk.fit(base, data, ema=0.9, **QUICK)
    assert seen[0]["threads"] in (1, 2)
    assert result.summary["threads"] == result.summary["settled"]["threads"] == seen[0]["threads"]


def test_a_short_run_has_no_race(base, data, monkeypatch, open_choice):
    monkeypatch.setattr(threads, "race", lambda *_: pytest.fail("it raced"))
    assert lk.fit(base, data, **QUICK).summary["threads"] == 1


def test_the_number_is_set_for_the_fit_and_put_back_also_after_errors(base, data):
    found = []
    result = lk.fit(base, data, threads=3, watch=lambda *_: found.append(torch.get_num_threads()), **QUICK)
    assert set(found) == {3}
    assert result.summary["threads"] == 3
    assert "threads" not in result.summary["settled"]
    assert torch.get_num_threads() == 1

    def stop(*_):
        raise FitError("stopped")

    with pytest.raises(FitError, match="stopped"):
        lk.fit(base, data, threads=2, watch=stop, **QUICK)
    assert torch.get_num_threads() == 1


def test_a_resumed_run_keeps_the_number_that_was_settled(place, base, data, monkeypatch):
    def stop(record, _):
        if record.kind == "valid":
            raise KeyboardInterrupt

    monkeypatch.setattr(settle, "choose_threads", lambda *_: 3)
    with pytest.raises(KeyboardInterrupt):
        lk.fit(base, data, out=place / "run", watch=stop, **QUICK)
    monkeypatch.setattr(settle, "choose_threads", lambda *_: pytest.fail("it chose again"))
    found = []
    watch = lambda *_: found.append(torch.get_num_threads())  # noqa: E731
    result = lk.fit(base, data, out=place / "run", resume=True, watch=watch, **QUICK)
    assert set(found) == {3}
    assert result.summary["threads"] == result.summary["settled"]["threads"] == 3
