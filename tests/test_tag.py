"""Tags of words: which tokens are read, loss and metrics against plain torch, a fit, and the verbs."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import lorakit as lk
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.memory import in_memory
from lorakit.data.tagged import load_tagged, make_tagged
from lorakit.errors import DataError
from lorakit.fit.learner import scores_of
from lorakit.fit.settings import Settings
from lorakit.tasks.base import load_base
from lorakit.tasks.tag import Tag
from lorakit.trunk import Trunk
from tiny_text import WORDS, tiny_bert

QUICK = {"epochs": 10, "batch_size": 4, "learning_rate": 1e-2, "threads": 1, "patience": 10}


def slots(path, n_rows=200):
    """Texts whose words of weather and food are tagged; "much" goes on with the weather."""
    draw, lines = random.Random(0), []
    for _ in range(n_rows):
        for _ in range(draw.randint(2, 4)):
            kind = draw.choice(list(WORDS))
            lines.append(f"{draw.choice(WORDS[kind])}\t{'O' if kind == 'tools' else f'B-{kind}'}")
            lines.append("much\tI-weather" if kind == "weather" else "and\tO")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tag")
    tiny_bert(folder / "base")
    slots(folder / "data.conll")
    return folder


@pytest.fixture(scope="module")
def base(place):
    return load_base(str(place / "base"))


@pytest.fixture(scope="module")
def data(place):
    return load_splits(place / "data.conll", read=load_tagged)


@pytest.fixture(scope="module")
def result(place, base, data):
    return lk.fit(base, data, "tag", out=place / "run", **QUICK)


def pieces():
    """Words in pieces, as BERT cuts them; a word of combining marks alone has none."""
    words = ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "new", "york", "'", "s", "."]
    cut = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    cut.normalizer = normalizers.BertNormalizer()
    cut.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cut.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=cut, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def test_the_first_token_of_each_word_is_read_as_transformers_counts_them():
    texts = [["playing", "New", "York's", "new.", "x"], ["s"]]
    tokenizer = pieces()
    tokens = Tag(("O", "x")).examples(make_tagged(texts), tokenizer, truncate=False)
    encoded = tokenizer(texts, is_split_into_words=True)
    assert [list(ids) for ids in tokens.ids] == encoded["input_ids"]
    for i, reads in enumerate(tokens.reads):
        owners = encoded.word_ids(i)
        assert list(reads) == [owners.index(k) for k in range(len(texts[i]))]


def test_a_word_that_the_tokenizer_drops_is_unknown():
    tokenizer = pieces()
    tokens = Tag(("O", "x")).examples(make_tagged([["new", "\ufe0f", "york"]]), tokenizer, truncate=False)
    assert tokenizer.convert_ids_to_tokens(tokens.ids[0]) == ["[CLS]", "new", "[UNK]", "york", "[SEP]"]
    assert tokens.reads[0] == (1, 2, 3)


def test_a_byte_level_tokenizer_is_read_at_the_first_bytes_of_a_word():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    cut.pre_tokenizer, cut.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = Tag(("O", "x")).examples(
        make_tagged([["ab", "cd"]]), PreTrainedTokenizerFast(tokenizer_object=cut), truncate=False
    )
    first, second = tokens.reads[0]
    assert first == 0
    assert second in (2, 3)  # the space before a word belongs to it


def test_loss_and_metrics_are_those_of_plain_torch(base, data):
    task = Tag.of(data, base)
    tokens = task.examples(data.test, base.tokenizer, truncate=False)
    task.prepare(base.model)
    torch.manual_seed(1)
    nn.init.normal_(base.model.classifier.weight)
    try:
        batch = tokens.gather(range(len(tokens)))
        with torch.no_grad(), Trunk(base.model, head="classifier") as trunk:
            hidden = batch.hidden(trunk)
            loss = task.loss(base.model, hidden, batch)
            at_once = task.scores(base.model, hidden, batch)
            in_passes = scores_of(base.model, task, trunk, tokens, Settings(tokens_per_pass=32))
        words = [list(row) for row in data.test.words]
        encoded = base.tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for i, tags in enumerate(data.test.tags):
            owners = encoded.word_ids(i)
            for k, tag in enumerate(tags):
                labels[i, owners.index(k)] = task.labels.index(tag)
        with torch.no_grad():
            states = base.model(encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
            logits = base.model.classifier(states)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        right = (logits.argmax(-1) == labels)[labels != -100].float().mean()
        for scores in (at_once, in_passes):
            found = task.metrics(scores, tokens)
            assert found["token_accuracy"] == pytest.approx(float(right))
            assert found["loss"] == pytest.approx(float(expected) / int((labels != -100).sum()), rel=1e-5)
        assert tokens.n_labels(range(len(tokens))) == int((labels != -100).sum())
    finally:
        del base.model._modules["classifier"]


def test_f1_is_of_whole_spans():
    task = Tag(("B-x", "B-y", "I-x", "I-y", "O"))
    rows = load_tagged_rows([("a b c", "B-x I-x O"), ("a b", "B-y O")])
    tokens = task.examples(rows, pieces(), truncate=False)
    said = [["B-x", "O", "B-y"], ["B-y", "O"]]  # right: one of three; there: two; words: three of five
    scores = torch.full((2, 9), torch.nan)
    for i, tags in enumerate(said):
        for k, tag in enumerate(tags):
            scores[i, 3 * k : 3 * k + 3] = torch.tensor([task.labels.index(tag), 0.5, 1.0])
    found = task.metrics(scores, tokens)
    assert (found["precision"], found["recall"]) == (pytest.approx(1 / 3), 1 / 2)
    assert found["f1"] == pytest.approx(2 / 5)
    assert (found["token_accuracy"], found["loss"]) == (pytest.approx(3 / 5), 1.0)


def load_tagged_rows(pairs):
    return load_tagged(in_memory([{"words": words, "tags": tags} for words, tags in pairs]))


def test_it_learns_and_a_run_serves_predict_and_evaluate(place, data, result):
    assert result.before["f1"] < 0.3
    assert result.metrics["f1"] > 0.8
    found = lk.evaluate(place / "run", data.test)
    assert found.metrics == result.metrics
    assert found.f1_interval[0] <= found.metrics["f1"] <= found.f1_interval[1]
    hits = sum(round(one["recall"] * one["spans"]) for one in found.per_label.values())
    assert hits == round(found.metrics["recall"] * sum(one["spans"] for one in found.per_label.values()))
    assert "95 % interval" in str(found) and "weather" in str(found)
    first, second = lk.predict(place / "run", ["rain  much saw and soup", ["and", "hail"]])
    assert first.tags == ("B-weather", "I-weather", "O", "O", "B-food")
    assert [(span.label, span.text, span.begin, span.end) for span in first.spans] == [
        ("weather", "rain much", 0, 2),
        ("food", "soup", 4, 5),
    ]
    assert all(0.2 < span.probability <= 1 for span in first.spans)
    assert str(first) == "[rain much : weather] saw and [soup : food]"
    assert second.tags == ("O", "B-weather")


def test_a_fit_that_was_stopped_goes_on_to_the_same_end(base, data, tmp_path):
    short = {**QUICK, "epochs": 2}

    class StopError(Exception):
        pass

    def stop(record, _):
        if record.kind == "valid" and record.epoch == 1:
            raise StopError

    with pytest.raises(StopError):
        lk.fit(base, data, "tag", out=tmp_path / "run", watch=stop, **short)
    again = lk.fit(base, data, "tag", out=tmp_path / "run", resume=True, **short)
    result = lk.fit(base, data, "tag", **short)
    assert again.adapter == result.adapter and again.metrics == result.metrics


def test_what_cannot_be_used_is_told(place, base, data, result):
    other = load_tagged_rows([("rain and", "B-snow O")])
    with pytest.raises(DataError, match="row 1: tag 'B-snow' was not in the training data"):
        lk.evaluate(place / "run", other)
    with pytest.raises(DataError, match="no tags to evaluate"):
        lk.evaluate(place / "run", make_tagged(["rain"]))
    long = ["rain " * 30]
    with pytest.raises(DataError, match="longer than 24 tokens, the longest in row 1 with 32"):
        lk.predict(place / "run", long)
    (cut,) = lk.predict(place / "run", long, truncate=True)
    assert len(cut.tags) == len(cut.words) == 22
    with pytest.raises(DataError, match="row 1: it is empty"):
        lk.predict(place / "run", [" "])
    with pytest.raises(DataError, match="words and tags are both '1'"):
        Tag.read(place / "data.conll", tags="1")


def test_the_verbs(place, result, capsys, tmp_path):
    def told(*words):
        code = main([str(word) for word in words])
        streams = capsys.readouterr()
        assert code == 0, streams.err
        return streams.out

    out = told("fit", place / "base", place / "data.conll", "--task", "tag", "--out", tmp_path / "run", "--epochs", "1")
    assert "held-out f1" in out and "token accuracy" in out
    assert told("predict", place / "run", "--say", "rain much soup") == "[rain much : weather] [soup : food]\n"
    (found,) = json.loads(told("predict", place / "run", "--say", "rain much", "--json"))
    assert found["spans"][0]["text"] == "rain much" and found["tags"] == ["B-weather", "I-weather"]
    assert len(json.loads(told("predict", place / "run", place / "data.conll", "--json"))) == 200
    metrics = json.loads(told("evaluate", place / "run", place / "data.conll", "--json"))
    told("merge", place / "run", "--out", tmp_path / "merged")
    merged = json.loads(told("evaluate", tmp_path / "merged", place / "data.conll", "--json"))
    assert merged["metrics"]["f1"] == pytest.approx(metrics["metrics"]["f1"], abs=0.02)  # bf16 meanwhile
