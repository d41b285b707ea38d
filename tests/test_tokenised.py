"""Tokenised rows are taken from the cache where they are the same, and never where they are not."""

from dataclasses import replace

import pytest
import torch

from lorakit.cache import keep_below
from lorakit.fit import tokenised as module
from lorakit.fit.tokenised import tokenised
from lorakit.tasks.classify import Classify
from tiny_text import small_task

place, base, data = small_task(60)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_WORTH_S", 0.0)
    return tmp_path / "lorakit" / "tokens"


@pytest.fixture
def counted(monkeypatch):
    made = []
    plain = Classify.examples

    def examples(self, *given, **named):
        made.append(1)
        return plain(self, *given, **named)

    monkeypatch.setattr(Classify, "examples", examples)
    return made


def same(one, other):
    parts = ("ids", "labels", "reads", "types", "lines", "pad", "each", "lengths")
    return all(getattr(one, name) == getattr(other, name) for name in parts)


def test_the_same_rows_are_made_once(cache, counted, base, data):
    task = Classify.of(data, base)
    first = tokenised(task, data.train, base.tokenizer, truncate=False)
    again = tokenised(task, data.train, base.tokenizer, truncate=False)
    assert len(counted) == len(list(cache.iterdir())) == 1
    assert same(first, again)
    assert torch.equal(first.gather([3, 1]).ids, again.gather([3, 1]).ids)


def test_whatever_is_other_is_made_anew(cache, counted, base, data):
    task = Classify.of(data, base)
    tokenised(task, data.train, base.tokenizer, truncate=False)
    texts = (data.train.texts[0] + " rain", *data.train.texts[1:])
    for number, (goal, rows, truncate) in enumerate(
        (
            (task, replace(data.train, texts=texts), False),
            (task, data.train, True),
            (replace(task, pool="cls"), data.train, False),
            (replace(task, labels=tuple(reversed(task.labels))), data.train, False),
            (task, replace(data.train, lines=tuple(n + 1 for n in data.train.lines)), False),
        ),
        2,
    ):
        tokenised(goal, rows, base.tokenizer, truncate=truncate)
        assert len(counted) == number
    base.tokenizer.add_tokens(["and rain"])
    tokenised(task, data.train, base.tokenizer, truncate=False)
    assert len(counted) == number + 1
    base.tokenizer.eos_token = base.tokenizer.sep_token  # where a task has ends of its own they are others now
    tokenised(task, data.train, base.tokenizer, truncate=False)
    assert len(counted) == number + 2


def test_a_damaged_file_is_made_anew_and_quick_work_is_not_kept(cache, counted, base, data, monkeypatch):
    task = Classify.of(data, base)
    first = tokenised(task, data.train, base.tokenizer, truncate=False)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:99])
    assert same(tokenised(task, data.train, base.tokenizer, truncate=False), first)
    assert same(tokenised(task, data.train, base.tokenizer, truncate=False), first)
    assert len(counted) == 2
    file.unlink()
    monkeypatch.setattr(module, "_WORTH_S", 60.0)
    tokenised(task, data.train, base.tokenizer, truncate=False)
    assert not list(cache.iterdir())


def test_the_oldest_go_first(tmp_path):
    import os

    for k, name in enumerate("abc"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (k, k))
    keep_below(tmp_path, 25)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "c"]
