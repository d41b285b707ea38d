"""A run goes on after a kill as if nothing had happened; it is told what stands in its way, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest

import lorakit as lk
from lorakit.errors import AdapterError, FitError, UsageError
from tiny_text import small_task

place, base, data = small_task(180)

QUICK = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3}


RUN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lorakit as lk
from lorakit.data import load_splits
place, out, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
def watch(record, total):
    print(record.kind, record.step, flush=True)
    if sys.argv[3] == "slow":
        import time; time.sleep(0.05)
lk.fit(str(place / "base"), load_splits(place / "data.csv"), out=out, resume=resume, watch=watch,
       epochs=6, batch_size=8, learning_rate=1e-2, checkpoint_steps=4)
"""


def start(place, out, how):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUN, str(place), str(out), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("file", ["records.jsonl", "prefix_train_0.bin", "process"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(place, base, data, tmp_path, file):
    (tmp_path / file).write_bytes(b"")
    told = "holds a run that ended before its first checkpoint;.* replace it with --overwrite"
    for resume in (True, False):
        with pytest.raises(UsageError, match=told) as refused:
            lk.fit(base, data, out=tmp_path, resume=resume, max_steps=1)
        assert "go on with" not in str(refused.value)
    lk.fit(base, data, out=tmp_path, overwrite=True, max_steps=1)
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize("way", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_directory_that_is_written_is_refused_until_its_run_ends(base, data, tmp_path, way):
    told = []

    def watch(record, total):
        with pytest.raises(UsageError) as refused:
            lk.fit(base, data, out=tmp_path / "run", max_steps=1, **way)
        told.append(str(refused.value))
        with pytest.raises(AdapterError, match=f"is being written by process {os.getpid()}, and has no adapter yet"):
            lk.predict(tmp_path / "run", ["i like rain"])

    lk.fit(base, data, out=tmp_path / "run", max_steps=2, checkpoint_steps=1, watch=watch)
    assert len(told) >= 3
    assert set(told) == {
        f"'{tmp_path / 'run'}' is being written by process {os.getpid()}; wait for its end, or name another directory"
    }
    assert not (tmp_path / "run" / "process").exists()
    lk.fit(base, data, out=tmp_path / "run", max_steps=1, overwrite=True)


def test_who_comes_second_to_a_directory_does_not_write_over_the_first(base, data, tmp_path):
    def meanwhile(_):
        lk.fit(base, data, out=tmp_path / "run", max_steps=1)

    with pytest.raises(UsageError, match="is not empty: it holds a finished run"):
        lk.fit(base, data, out=tmp_path / "run", max_steps=2, ready=meanwhile)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_a_run_that_fails_before_it_writes_leaves_no_directory(base, data, tmp_path, monkeypatch):
    def fail(*_):
        assert (tmp_path / "run").is_dir()
        raise HaltError

    monkeypatch.setattr(import_module("lorakit.fit.run"), "Learner", fail)
    with pytest.raises(HaltError):
        lk.fit(base, data, out=tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()


def test_without_locks_a_run_is_written_all_the_same(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("lorakit.fit.hold"), "fcntl", None)
    lk.fit(base, data, out=tmp_path / "run", max_steps=1)
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run" / "process").exists()


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_as_the_uninterrupted_one(place):
    whole = start(place, place / "whole", "fresh")
    assert whole.communicate(timeout=120)[1].count("Error") == 0
    assert whole.returncode == 0
    killed = start(place, place / "killed", "slow")
    for line in killed.stdout:
        if line.split() == ["step", "22"]:  # between two checkpoints, in the second epoch
            with pytest.raises(UsageError, match=f"is being written by process {killed.pid};"):
                lk.fit(str(place / "base"), place / "data.csv", out=place / "killed", resume=True)
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait(timeout=60)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert (place / "killed" / "checkpoint").is_dir()
    assert (place / "killed" / "process").is_file()
    resumed = start(place, place / "killed", "resume")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert not (place / "killed" / "process").exists()
    assert "step 1\n" not in out, "it began anew instead of going on"
    assert lk.load(place / "killed" / "adapter") == lk.load(place / "whole" / "adapter")
    one, two = (
        [
            {key: value for key, value in json.loads(line).items() if key != "step_s"}
            for line in (place / name / "records.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    )
    assert one == two


class HaltError(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 12, "patience": 1, "learning_rate": 5e-2},
        {"epochs": 1, "max_steps": 8, "checkpoint_steps": 4},
        {"epochs": 2, "checkpoint_steps": 6},
    ],
    ids=["stopped early", "within an epoch", "at the end of an epoch"],
)
def test_a_run_halted_behind_its_last_step_ends_as_the_uninterrupted_one(base, data, tmp_path, settings):
    call = {**QUICK, **settings, "threads": 1, "dtype": "fp32"}
    whole = lk.fit(base, data, out=tmp_path / "whole", **call)
    steps, kind = whole.summary["steps"], "valid" if "patience" in settings else "step"

    def watch(record, _):
        if record.kind == kind and record.step == steps:
            raise HaltError

    with pytest.raises(HaltError):
        lk.fit(base, data, out=tmp_path / "cut", watch=watch, **call)
    resumed = lk.fit(base, data, out=tmp_path / "cut", resume=True, **call)
    assert resumed.adapter == whole.adapter
    told = ("steps", "epochs", "best_epoch", "stopped_early")
    assert [resumed.summary[name] for name in told] == [whole.summary[name] for name in told]
    assert whole.summary["stopped_early"] == ("patience" in settings)


def test_how_often_a_checkpoint_is_written_may_change(base, data, stopped):
    lk.fit(base, data, out=stopped, resume=True, checkpoint_steps=50, **QUICK)


@pytest.fixture
def stopped(base, data, tmp_path):
    """A run that was interrupted after its second epoch."""

    def watch(record, _):
        if record.kind == "valid" and record.epoch == 1:
            raise HaltError

    out = tmp_path / "stopped"
    with pytest.raises(HaltError):
        lk.fit(base, data, out=out, watch=watch, threads=2, **QUICK)
    return out


def test_resuming_another_run_is_refused_in_words(base, data, stopped):
    other_plan = lk.plan(base.model, blocks="last 1")
    other_rows = replace(data, train=replace(data.train, texts=tuple(reversed(data.train.texts))))
    for change, words in (
        ({"learning_rate": 1e-3}, r"learning_rate was 0\.005, now 0\.001;"),
        ({"plan": other_plan}, "the plan was Plan(12 layers, lora, rank 8 x 12.*now Plan(6 layers, .*; call as before"),
        ({"data": other_rows}, "one that was interrupted: the training rows are others; call as before"),
    ):
        call = {"data": data, **QUICK, **change}
        with pytest.raises(FitError, match=words.replace("(", r"\(")):
            lk.fit(base, call.pop("data"), out=stopped, resume=True, **call)
    weight = base.model.encoder.layer[0].output.dense.weight.data
    before = weight.clone()
    weight.mul_(2)
    try:
        with pytest.raises(FitError, match="interrupted: the base has other weights; call as before"):
            lk.fit(base, data, out=stopped, resume=True, **QUICK)
    finally:
        weight.copy_(before)


@pytest.mark.slow
def test_a_resumed_run_may_take_other_threads_and_passes_and_tells_what_was_lost(base, data, stopped):
    lines = (stopped / "records.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 19
    (stopped / "records.jsonl").write_text("".join(lines[:10]))
    result = lk.fit(base, data, out=stopped, resume=True, threads=1, tokens_per_pass=64, **QUICK)
    assert result.summary["threads"] == 1
    assert result.summary["memory"]["tokens_per_pass"] == 64
    assert result.summary["settled"].keys() == {"tokens_per_pass"}  # of the first call
    told = "records.jsonl lacked 8 steps before the checkpoint, so they are not in the curve"
    assert result.summary["notes"] == [told]


def test_a_damaged_checkpoint_is_refused_with_a_way_out(base, data, stopped):
    for name in ("state.json", "state.safetensors"):
        whole = (stopped / "checkpoint" / name).read_bytes()
        (stopped / "checkpoint" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FitError, match="the checkpoint is damaged .*begin the run again with --overwrite"):
            lk.fit(base, data, out=stopped, resume=True, **QUICK)
        (stopped / "checkpoint" / name).write_bytes(whole)


FULL = """
import resource, signal, sys
import lorakit as lk
from lorakit.errors import FitError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def watch(record, total):
    if (record.kind, record.epoch) == (sys.argv[4], int(sys.argv[5])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    own = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3, "threads": 1}
    lk.fit(sys.argv[1], sys.argv[2], out=sys.argv[3], watch=watch, **own)
except FitError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "epoch", "way"), [("valid", 1, "the same command with --resume"), ("start", 0, "begin")]
)
def test_a_full_disk_is_told_and_nothing_is_lost(place, base, kind, epoch, way):
    """A size limit on files stands in for a full disk: the same errors come from the same calls."""
    out = place / f"full_{kind}"
    words = [sys.executable, "-c", FULL, str(place / "base"), str(place / "data.csv"), str(out), kind, str(epoch)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"cannot write into '{out}'" in done.stdout
    assert f"free some space, then {way}" in done.stdout
    again = {"resume": True} if kind == "valid" else {"overwrite": True}
    whole = lk.fit(str(place / "base"), place / "data.csv", out=out, **again, **QUICK)
    assert whole.adapter == lk.fit(str(place / "base"), place / "data.csv", **QUICK).adapter
