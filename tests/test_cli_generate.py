"""The verbs with a language model: fit, predict, evaluate, merge, inspect, plan; and what is told when it cannot be."""

import gzip
import json
import re

import pytest

import lorakit as lk
from lorakit.cli import main
from lorakit.tasks import decode
from tiny_chat import CHATML, chat_table, tiny_causal
from tiny_text import table


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_causal(folder / "base", "llama", CHATML)
    chat_table(folder / "data.jsonl")
    table(folder / "labels.csv")
    assert main(fit_words(folder, folder / "run")) == 0
    return folder


def fit_words(folder, out, *more):
    words = ["fit", str(folder / "base"), str(folder / "data.jsonl"), "--task", "generate", "--out", str(out)]
    return [*words, "--epochs", "12", "--learning-rate", "0.01", *more]


def told(capsys, *words):
    """Exit code, stdout, stderr."""
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_fit_tells_loss_before_and_after_and_whether_answers_end(place, capsys, tmp_path):
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress((place / "data.jsonl").read_bytes()))
    words = ["fit", place / "base", tmp_path / "data.jsonl.gz", "--task", "generate", "--out", tmp_path / "run"]
    code, out, err = told(capsys, *words, "--epochs", "2", "--template", "plain")
    assert code == 0, err
    assert "held-out loss" in out
    assert "->" in out
    assert "perplexity" in out
    assert "ends by itself" in out
    assert "expected" in out
    assert "187 answers to learn; first row: 'sort" in err
    assert "epoch 1: step 12 of 24, valid loss" in err
    assert re.search(r"the model sees: .*sort \w+ and \w+ .*«\w+ then \w+ .*»", err)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["template"] == ""
    assert 0 <= summary["ends_by_itself"] <= 1
    assert set(summary["example"]) == {"prompt", "answer", "expected"}


@pytest.mark.slow
def test_predict_writes_answers(place, capsys, tmp_path):
    code, out, err = told(capsys, "predict", place / "run", "--say", "sort rain and soup")
    assert (code, err) == (0, "")
    assert out.split()[1] == "then"
    answer = out.strip()
    code, out, _ = told(capsys, "predict", place / "run", "--say", "sort rain and soup", "--say", "sort rain and soup")
    assert out == f"> sort rain and soup\n{answer}\n\n> sort rain and soup\n{answer}\n"
    code, out, err = told(
        capsys, "predict", place / "run", "--say", "sort rain and soup", "--max-new-tokens", "1", "--json"
    )
    assert json.loads(out) == [{"text": "sort rain and soup", "answer": answer.split()[0], "stopped": False}]
    assert "1 of 1 answers were cut at their bound; --max-new-tokens N" in err
    drawn = ["predict", place / "run", "--say", "sort rain and soup", "--temperature", "4", "--seed", "1"]
    assert told(capsys, *drawn) == told(capsys, *drawn)
    code, out, _ = told(capsys, "predict", place / "run", place / "data.jsonl", "--json")
    assert len(json.loads(out)) == 240


def test_answers_are_in_the_file_as_they_are_written(place, capsys, tmp_path, monkeypatch):
    out, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    words = ["predict", place / "run", place / "data.jsonl", "--max-new-tokens", "1", "--out", out]
    inner, kept = decode._continue, []

    def killed(*given):
        kept.append(len(part.read_text().splitlines()))
        if len(kept) == 3:
            raise KeyboardInterrupt
        return inner(*given)

    monkeypatch.setattr(decode, "_SORTED", 16)
    monkeypatch.setattr(decode, "_continue", killed)
    code, _, err = told(capsys, *words)
    assert (code, kept, out.exists()) == (130, [0, 16, 32], False)
    assert f"note: the 32 answers before that are in '{part}'" in err
    monkeypatch.setattr(decode, "_continue", inner)
    assert told(capsys, *words)[0] == 2 and part.exists()
    before = part.read_text()
    part.unlink()
    assert told(capsys, *words)[0] == 0 and not part.exists()
    assert out.read_text().startswith(before) and len(out.read_text().splitlines()) == 240


def test_evaluate_inspect_plan_and_merge(place, capsys, tmp_path):
    code, out, _ = told(capsys, "evaluate", place / "run", place / "data.jsonl", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["metrics"].keys() == {"loss", "perplexity", "token_accuracy"}
    low, high = found["intervals"]["loss"]
    assert low < found["metrics"]["loss"] < high
    assert (found["n_rows"], found["n_tokens"]) == (240, 960)
    code, out, _ = told(capsys, "evaluate", place / "run", place / "data.jsonl")
    assert "(95 % interval" in out and "240 rows, 960 tokens of answers" in out
    code, out, _ = told(capsys, "inspect", place / "run", "--base", place / "base")
    assert "model.layers.0.self_attn.q_proj" in out
    code, out, _ = told(capsys, "plan", place / "base", "--task", "generate", "--layers", "attention")
    assert code == 0
    assert "model.layers.1.self_attn.o_proj" in lk.Plan.parse(out).layers
    code, _, err = told(capsys, "merge", place / "run", "--out", tmp_path / "merged")
    assert code == 0, err
    code, out, err = told(capsys, "evaluate", tmp_path / "merged", place / "data.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["loss"] == pytest.approx(found["metrics"]["loss"], rel=0.05)  # bf16 meanwhile
    words = ["--say", "sort rain and soup"]
    assert told(capsys, "predict", tmp_path / "merged", *words)[1] == told(capsys, "predict", place / "run", *words)[1]


def test_the_merged_model_gives_the_same_logits_as_the_adapter(place, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    assert main(["merge", str(place / "run"), "--out", str(tmp_path / "m")]) == 0
    plain, adapted = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "m", place / "base"))
    lk.attach(adapted, lk.load(place / "run" / "adapter"))
    ids = torch.tensor([[4, 8, 12, 16, 20]])
    with torch.no_grad():
        assert float((plain(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max()) < 1e-4


BAD = [
    (["fit", "BASE", "DATA", "--task", "generat", "--out", "OUT"], 2, ["did you mean 'generate'"]),
    (["fit", "BASE", "DATA", "--task", "generate", "--out", "OUT", "--label", "x"], 2, ["no --label", "prompt"]),
    (["fit", "BASE", "DATA", "--task", "generate", "--out", "OUT", "--pool", "cls"], 2, ["no --pool", "template"]),
    (["fit", "BASE", "DATA", "--task", "generate", "--out", "OUT", "--template", "x"], 2, ["'x'", "auto, plain"]),
    (
        ["fit", "BASE", "DATA", "--task", "generate", "--out", "OUT", "--answer", "y"],
        1,
        ["no column 'y'", "completion"],
    ),
    (["fit", "BASE", "LABELS", "--task", "generate", "--out", "OUT"], 1, ["text, label", "--prompt", "--answer"]),
    (["fit", "BASE", "DATA", "--out", "OUT"], 1, ["prompt, completion", "--text"]),
    (["predict", "RUN", "--say", "x", "--label", "y"], 2, ["no --label"]),
    (["predict", "RUN", "--say", " "], 1, ["row 1", "empty"]),
    (["predict", "RUN", "--say", "x", "--max-new-tokens", "0"], 2, ["max_new_tokens is 0"]),
    (["predict", "RUN", "--say", "sort " * 80], 1, ["longer than 63 tokens", "--truncate"]),
    (["evaluate", "RUN", "LABELS"], 1, ["text, label"]),
]


@pytest.mark.parametrize(("words", "code", "parts"), BAD, ids=[" ".join(words[-3:])[:40] for words, _, _ in BAD])
def test_bad_input_gets_one_sentence_and_the_right_exit_code(place, capsys, tmp_path, words, code, parts):
    names = {"BASE": place / "base", "DATA": place / "data.jsonl", "LABELS": place / "labels.csv", "RUN": place / "run"}
    names["OUT"] = tmp_path / "out"
    found, _, err = told(capsys, *(names.get(word, word) for word in words))
    assert found == code, err
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


def test_options_of_another_task_are_refused(place, capsys, tmp_path):
    from tiny_text import tiny_bert

    tiny_bert(tmp_path / "bert")
    words = ["fit", tmp_path / "bert", place / "labels.csv", "--out", tmp_path / "run", "--epochs", "1"]
    assert told(capsys, *words, "--prompt", "text")[0] == 2
    assert told(capsys, *words)[0] == 0
    code, _, err = told(capsys, "predict", tmp_path / "run", "--say", "x", "--temperature", "1")
    assert (code, "task 'classify' takes no --temperature" in err) == (2, True)
