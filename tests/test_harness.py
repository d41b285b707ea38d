"""lm-eval's tasks with an adapter and without: its log-likelihoods are ours, and what cannot be is told."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import lorakit as lk
from lorakit.adapter import Adapter
from lorakit.cli import main
from lorakit.data import load_documents
from lorakit.errors import LorakitError, MissingExtraError, UsageError
from lorakit.fit.harness import harness
from lorakit.fit.use import open_run
from tiny_chat import tiny_causal, tokenizer
from tiny_text import WORDS, table, tiny_bert

TEXTS = [
    f"{word} is {topic} and {other} is {topic}" for topic, words in WORDS.items() for word, other in pairwise(words)
]
ROLLING = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
CHOICE = """
task: tiny_topics
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{word}}}} is"
doc_to_choice: [weather, food, tools]
doc_to_target: "{{{{topic}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tiny_causal(folder / "base")
    words = tokenizer()
    words.bos_token = words.eos_token  # as GPT-2's: lm-eval and we begin a text with it; others lm-eval begins twice
    words.save_pretrained(folder / "base")
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = [json.dumps({"word": word, "topic": k}) for k, words in enumerate(WORDS.values()) for word in words]
    (folder / "words.jsonl").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name, task, data in (("rolling", ROLLING, "texts"), ("choice", CHOICE, "words")):
        (folder / f"{name}.yaml").write_text(task.format(data=folder / f"{data}.jsonl"), encoding="utf-8")
    settings = {"epochs": 12, "batch_size": 4, "learning_rate": 1e-2}
    lk.fit(str(folder / "base"), folder / "texts.jsonl", "complete", out=folder / "run", **settings)
    return folder


def test_without_lm_eval_it_says_how_to_get_it(place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"lm-eval is not installed.*lorakit\[harness\]"):
        harness(place / "run", ["hellaswag"])


def test_what_is_no_language_model_and_no_limit_are_refused(place, tmp_path):
    tiny_bert(tmp_path / "bert")
    table(tmp_path / "labelled.csv")
    lk.fit(str(tmp_path / "bert"), tmp_path / "labelled.csv", out=tmp_path / "labels", epochs=1)
    with pytest.raises(UsageError, match="fitted to classify; lm-eval asks causal language models"):
        harness(tmp_path / "labels", ["hellaswag"])
    with pytest.raises(UsageError, match="limit is 0"):
        harness(place / "run", ["hellaswag"], limit=0)


def test_a_file_or_tasks_but_not_both(place, capsys):
    for words in ([], [str(place / "texts.jsonl"), "--harness", "x"]):
        assert main(["evaluate", str(place / "run"), *words]) == 2
        assert "either a file with texts and right answers or --harness TASK" in capsys.readouterr().err


@pytest.fixture
def lm_eval():
    import lm_eval

    return lm_eval


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm-eval's
def test_the_log_likelihood_of_a_text_is_our_loss(place, lm_eval):
    found = harness(place / "run", [str(place / "rolling.yaml")])
    rows = load_documents(place / "texts.jsonl")
    rows = replace(rows, unended=frozenset(rows.lines))  # lm-eval does not ask for the end of a text
    ours = lk.evaluate(place / "run", rows)
    own = found.adapted["tiny_texts"]
    assert own["bits_per_byte"].value == pytest.approx(ours.metrics["bits_per_byte"], rel=0.01)  # half precision
    assert own["byte_perplexity"].value == pytest.approx(2 ** own["bits_per_byte"].value)
    assert found.base is not None
    plain = found.base["tiny_texts"]["bits_per_byte"].value
    adapter, task = open_run(place / "run")
    nothing = Adapter({}, {}, {"base_name": adapter.base_name})
    assert plain == pytest.approx(lk.evaluate((nothing, task), rows).metrics["bits_per_byte"], rel=0.01)
    assert plain > 1.5 * own["bits_per_byte"].value
    assert own["bits_per_byte"].error is None or own["bits_per_byte"].error > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_choices_are_made_as_by_the_models_own_logits(place, lm_eval, capsys):
    words = [str(place / "choice.yaml"), str(place / "rolling.yaml")]
    assert main(["evaluate", str(place / "run"), "--harness", ",".join(words), "--limit", "25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["adapted"]) == {"tiny_topics", "tiny_texts"}
    adapter, task = open_run(place / "run")
    base = task.load_base(adapter.base_name)
    topics = [int(base.tokenizer(topic, add_special_tokens=False)["input_ids"][0]) for topic in WORDS]
    asked = [(word, k) for k, words in enumerate(WORDS.values()) for word in words][:25]
    for side in ("base", "adapted"):
        if side == "adapted":
            lk.attach(base.model, adapter)
        right = 0
        for word, k in asked:
            with torch.no_grad():
                logits = base.model(torch.tensor([base.tokenizer(f"{word} is")["input_ids"]])).logits[0, -1]
            right += int(logits[topics].argmax()) == k
        figure = found[side]["tiny_topics"]["acc"]
        assert figure["value"] == pytest.approx(right / 25)
        assert figure["error"] == pytest.approx(math.sqrt(right / 25 * (1 - right / 25) / 24))
    assert main(["evaluate", str(place / "run"), "--harness", words[0]]) == 0
    out = capsys.readouterr().out
    assert "with the adapter" in out and "the base alone" in out and "tiny_topics  acc" in out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_faults_of_tasks_are_told(place, lm_eval, tmp_path):
    with pytest.raises(UsageError, match="there is no file 'nowhere.yaml'"):
        harness(place / "run", ["nowhere.yaml"])
    (tmp_path / "bad.yaml").write_text(ROLLING.format(data=tmp_path / "none.jsonl"), encoding="utf-8")
    with pytest.raises(LorakitError, match="lm-eval cannot run .*bad.yaml"):
        harness(place / "run", [str(tmp_path / "bad.yaml")])
    with pytest.raises(UsageError, match="lm-eval knows no task 'helaswag'; did you mean 'hellaswag"):
        harness(place / "run", ["helaswag"])
    merged = tmp_path / "merged"
    assert main(["merge", str(place / "run"), "--out", str(merged)]) == 0
    assert harness(merged, [str(place / "choice.yaml")], limit=3).base is None
