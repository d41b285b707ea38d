"""Several processes on one run: they end as one does, and when one is killed the others say so and nothing is lost."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import UsageError
from lorakit.fit.workers import Workers
from several import begin, end, environment, free_port, losses, waited
from tiny_chat import CHATML, chat_table, pairs, tiny_causal
from tiny_text import WORDS, small_task, table, tiny_bert, told_topics

place, _, _ = small_task(180)


@pytest.mark.parametrize("fixed", [False, True])
def test_shares_are_all_texts_once_and_about_equal(fixed: bool) -> None:
    sizes = [3, 50, 7, 7, 20, 1, 9, 30, 11]
    shares = [Workers(3, number).share(range(9), sizes, fixed) for number in range(3)]
    assert sorted(text for share in shares for text in share) == list(range(9))
    loads = [sum(sizes[text] for text in share) for share in shares]
    assert fixed or max(loads) - min(loads) <= max(sizes) - sum(sizes) // 3 + 7
    assert Workers().share(range(9), sizes, fixed) == list(range(9))


def test_one_process_needs_nobody() -> None:
    with Workers() as alone:
        tensor = torch.ones(3)
        alone.add(tensor)
        assert tensor.tolist() == [1, 1, 1]
        assert alone.gather("x") == ["x"]
        assert alone.agreed(5) == 5
        assert alone.first


def test_accelerate_that_starts_one_of_several_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert Workers.started().size == 1  # it was asked for one
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="say --multi_gpu in the place of --cpu"):
        Workers.started()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert (Workers.started(shard=True).size, Workers.started().number) == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["torch.distributed.run", "--nproc-per-node"], ["accelerate.commands.launch"]])
def test_launchers_start_processes_that_share_the_work(words: list[str], place: Path) -> None:
    if words[0].startswith("accelerate"):
        words = [*words, "--multi_gpu", "--main_process_port", free_port(), "--num_processes"]
    command = [sys.executable, "-m", *words, "2", "-m", "lorakit", "fit", "base", "data.csv", "--out", words[0]]
    command += ["--max-steps", "3", "--threads", "1"]
    told, again = (
        subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120)
        for _ in range(2)
    )
    assert told.returncode == 0, told.stderr
    assert "on 2 processes of 1 threads" in told.stdout
    assert again.returncode == 1
    last = [line for line in again.stderr.splitlines() if "traceback :" in line][-1]
    assert f"lorakit: '{words[0]}' is not empty" in last


@pytest.mark.slow
def test_two_processes_end_as_one_and_a_lost_one_costs_nothing(place: Path) -> None:
    end(begin(place, "one", size=1))
    told = end(begin(place, "two"))
    assert "held-out accuracy" in told[0][0]
    assert told[1] == ("", "")
    found, wanted = losses(place / "two"), losses(place / "one")
    assert len(found) == len(wanted) > 20
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5
    summary = json.loads((place / "two" / "summary.json").read_text())
    assert summary["processes"] == 2

    for lost in (0, 1):
        out = f"lost_{lost}"
        run = begin(place, out)
        waited(lambda out=out: (place / out / "checkpoint" / "state.json").is_file())  # type: ignore[misc]
        run[lost].send_signal(signal.SIGKILL)
        told_last = run[1 - lost].communicate(timeout=120)[1]
        run[lost].communicate()
        assert run[1 - lost].returncode == 1, told_last
        assert "has lost another one" in told_last
        assert "--resume" in told_last
        assert "Traceback" not in told_last
        end(begin(place, out, "--resume"))
        assert lk.load(place / out / "adapter") == lk.load(place / "two" / "adapter")
        assert losses(place / out) == found


@pytest.mark.slow
def test_two_processes_learn_to_write_as_one_does(tmp_path: Path) -> None:
    tiny_causal(tmp_path / "base", "llama", CHATML)
    chat_table(tmp_path / "data.jsonl", 60)
    words = ["-m", "lorakit", "fit", "base", "data.jsonl", "--task", "generate", "--epochs", "2", "--dtype", "fp32"]
    end(begin(tmp_path, "one", size=1, words=words))
    told = end(begin(tmp_path, "two", words=words))
    assert "ends by itself" in told[0][0]
    assert told[1] == ("", "")
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) == 8
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["24", "1"])  # with one text a step the second process has none
def test_two_processes_learn_to_embed_as_one_does(tmp_path: Path, batch: str) -> None:
    tiny_bert(tmp_path / "base")
    table(tmp_path / "data.csv", 90)
    words = ["-m", "lorakit", "fit", "base", "data.csv", "--task", "embed", "--epochs", "2", "--dtype", "fp32"]
    words += ["--batch-size", batch, "--max-steps", "6", "--learning-rate", "0.003"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", "--tokens-per-pass", "64", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) > 6
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-4
    two, one = (lk.load(tmp_path / name / "adapter").layers for name in ("two", "one"))
    for path, layer in one.items():
        for name, tensor in layer.factors.items():
            assert float((two[path].factors[name] - tensor).abs().max()) < 1e-3


@pytest.mark.slow
def test_two_processes_learn_to_prefer_as_one_does(tmp_path: Path) -> None:
    tiny_causal(tmp_path / "base", "llama", CHATML)
    rows = [{"prompt": p, "chosen": a, "rejected": f"{a} again"} for p, a in pairs(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["-m", "lorakit", "fit", "base", "data.jsonl", "--task", "prefer", "--epochs", "2", "--dtype", "fp32"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) == 8
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("task", ["labels", "regress", "tag", "answer", "complete"])
def test_two_processes_learn_what_one_does(task: str, tmp_path: Path) -> None:
    write = tiny_causal if task == "complete" else tiny_bert
    write(tmp_path / "base")
    data = learnable(task, tmp_path)
    words = ["-m", "lorakit", "fit", "base", data, "--task", task, "--epochs", "2", "--dtype", "fp32", "--threads", "1"]
    words += ["--batch-size", "7", "--learning-rate", "0.003", "--tokens-per-pass", "64"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) > 8
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5 * max(1, *wanted)
    two, one = (json.loads((tmp_path / name / "summary.json").read_text())["test"] for name in ("two", "one"))
    assert one
    assert two == pytest.approx(one, abs=1e-3)


def learnable(task: str, place: Path) -> str:
    """The name of a data file for a task, with 60 rows."""
    rows = told_topics(60)
    if task == "tag":
        told = (
            "".join(f"{word} {topic if word in WORDS[topic] else 'O'}\n" for word in said.split())
            for said, _, topic, _ in rows
        )
        text, name = "\n".join(told), "data.conll"
    elif task == "complete":
        text, name = "\n".join(f"{prompt} {answer}" for prompt, answer in pairs(200)), "data.txt"
    else:
        row_of = {
            "labels": lambda said, other, one, two: {"text": f"{said} {other}", "labels": sorted({one, two})},
            "regress": lambda said, other, one, two: {"text": said, "text2": other, "score": float(one == two)},
            "answer": lambda said, other, one, two: {
                "context": f"{said} {other}",
                "question": f"the {two}",
                "answers": {"text": [other], "answer_start": [len(said) + 1]},
            },
        }[task]
        text, name = "".join(json.dumps(row_of(*row)) + "\n" for row in rows), "data.jsonl"
    (place / name).write_text(text, encoding="utf-8")
    return name


_PREFIX = """
import os, sys, time
import lorakit as lk
import lorakit.fit.run
from lorakit.tasks.base import load_base
from lorakit.trunk.prefix import Prefix
how, _, out = sys.argv[1:]
module, number = sys.modules["lorakit.fit.run"], os.environ["RANK"]
if how == "late" and number == "0":
    clear = module.clear
    module.clear = lambda place: (time.sleep(1), clear(place))
if how == "full" and number == "1":
    def full(*_):
        raise OSError("no space left on device")
    Prefix.__init__ = full
base = load_base("base")
found = lk.fit(base, "data.csv", plan=lk.plan(base.model, blocks="last 1"), out=out, prefix="file", epochs=2,
               batch_size=8, learning_rate=3e-3, dtype="fp32", threads=1)
print(found.summary["prefix"])
"""


@pytest.mark.slow
def test_all_processes_keep_the_frozen_prefix_or_none_does(place: Path) -> None:
    ((alone, _),) = end(begin_prefix(place, "alone", "kept", 1))
    for how in ("late", "full"):
        told = {out for out, _ in end(begin_prefix(place, f"two_{how}", how, 2))}
        assert len(told) == 1
        assert (alone in told) is (how == "late")
        assert all("no space left on device" in out for out in told) is (how == "full")
        assert losses(place / f"two_{how}") == pytest.approx(losses(place / "alone"), abs=1e-5)


def begin_prefix(place: Path, out: str, how: str, size: int) -> list[subprocess.Popen[str]]:
    return begin(place, out, size=size, words=["-c", _PREFIX, how])
