"""Embeddings: the loss against a loop over pairs, many passes against one, what is found, PEFT, its whole way."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lorakit as lk
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.matches import Matches, load_matches
from lorakit.errors import DataError, UsageError
from lorakit.fit.learner import Learner
from lorakit.fit.settings import Settings
from lorakit.fit.use import open_run
from lorakit.tasks.base import load_base
from lorakit.tasks.embed import Embed
from lorakit.trunk import Trunk
from tiny_text import WORDS, table, tiny_bert

QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "dtype": "fp32"}


def triples(negatives=True):
    """A word in some phrase; the word that is its partner; a word that is not."""
    topics = list(WORDS)
    rows = []
    for phrase in ("i like {}", "{} a {} the {}", "very much {} and", "the {}"):
        for k in range(30):
            word, partner, other = (WORDS[topics[(k + step) % 3]][(k + step) // 3 % 10] for step in (0, 1, 5))
            row = {"query": phrase.replace("{}", word), "positive": f"{partner} and"}
            rows.append(row | ({"negative": f"{other} and"} if negatives else {}))
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    tiny_bert(folder / "base")
    table(folder / "labels.csv", 180)
    written(folder / "pairs.jsonl", triples(negatives=False))
    written(folder / "triples.jsonl", triples())
    return folder


@pytest.fixture(scope="module")
def run(place):
    return lk.fit(str(place / "base"), place / "labels.csv", "embed", out=place / "run", **QUICK)


def by_loops(vectors, keys, temperature, symmetric):
    """The loss, pair by pair: `vectors (examples, texts, d)`, `keys` alike."""
    n, each = keys.shape
    total = 0.0
    candidates = [(i, side) for side in range(1, each) for i in range(n)]

    def belong(i, key):
        return key == keys[i, 0] or any(keys[j, 0] == keys[i, 0] and keys[j, 1] == key for j in range(n))

    for i in range(n):
        against = [c for c in candidates if c == (i, 1) or not belong(i, keys[c])]
        logits = torch.stack([vectors[i, 0] @ vectors[c] for c in against]) / temperature
        total = total + logits.logsumexp(0) - logits[against.index((i, 1))]
        if symmetric:
            back = [j for j in range(n) if j == i or not belong(j, keys[i, 1])]
            logits = torch.stack([vectors[i, 1] @ vectors[j, 0] for j in back]) / temperature
            total = total + logits.logsumexp(0) - logits[back.index(i)]
    return total / 2 if symmetric else total


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("classes", [False, True])
def test_the_loss_is_that_of_a_loop_over_pairs(each, symmetric, classes):
    g = torch.Generator().manual_seed(each)
    vectors = torch.nn.functional.normalize(torch.randn(7, each, 5, generator=g, dtype=torch.float64), dim=-1)
    vectors.requires_grad_()
    keys = torch.arange(7 * each).view(7, each)
    if classes:
        keys = torch.tensor([0, 1, 0, 2, 2, 1, 3])[:, None].expand(7, each)
    else:
        keys[3, 1] = keys[0, 1]  # a positive of two queries
        keys[4, 0] = keys[1, 0]  # a query with two positives
        keys[5, 0] = keys[2, 1]  # a query that is a positive elsewhere
        keys[6, each - 1] = keys[5, 1]
    keys = keys.contiguous()
    wanted = by_loops(vectors, keys, 0.2, symmetric)
    task = Embed(temperature=0.2, symmetric=symmetric)
    found = task.coupled_loss(vectors.view(7, -1), keys.flatten())
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    (one,), (other,) = (torch.autograd.grad(loss, vectors) for loss in (found, wanted))
    assert torch.allclose(one, other, atol=1e-9)
    assert float(one.abs().max()) > 0.01


@pytest.mark.parametrize("name", ["labels.csv", "pairs.jsonl", "triples.jsonl"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_step_in_many_passes_is_one_in_a_single_pass(place, name, symmetric):
    found = []
    for most in (4096, 40):
        base = load_base(str(place / "base"))
        data = load_splits(place / name, read=load_matches)
        task = Embed.of(data, base).chosen({"symmetric": symmetric})
        examples = task.examples(data.train, base.tokenizer, truncate=False)
        lk.attach(base.model, lk.plan(base.model), seed=0)
        settings = Settings(batch_size=24, tokens_per_pass=most, learning_rate=1e-3)
        with Trunk(base.model, pad=examples.pad) as trunk:
            learner = Learner(base.model, task, trunk, settings)
            batches = learner.batches(examples)
            for indices in batches[:2]:  # after a step no factor is zero
                seen = learner.step(examples, indices, 0.01)
            loss, n_tokens = learner.gradients(examples, batches[2])
            found.append((seen.loss, loss, learner.flat.gradients.clone(), n_tokens))
            learner.close()
    (before, one, gradient, n_tokens), (before_too, many, gradient_too, n_tokens_too) = found
    assert n_tokens == n_tokens_too > 3 * 40
    assert before == pytest.approx(before_too, rel=1e-5)
    assert one == pytest.approx(many, rel=1e-5)
    size = float(gradient.abs().max())
    assert size > 1e-3
    assert float((gradient - gradient_too).abs().max()) < 1e-4 * size


def test_a_text_that_stands_in_many_rows_is_kept_once(place):
    base = load_base(str(place / "base"))
    rows = Matches(("rain", "sun", "rain"), ("soup", "soup", "cake"), None, None, "here", (2, 3, 4))
    found = Embed().examples(rows, base.tokenizer, truncate=False)
    assert found.members == [(0, 1), (2, 1), (0, 3)]
    assert len(found.text_lengths) == 4
    assert found.gather([0, 2]).labels.tolist() == [0, 1, 0, 3]
    assert found.belonging() == [{1, 3}, {1}, {1, 3}]


def test_every_epoch_draws_other_pairs_of_a_class_and_the_same_seed_the_same(place):
    base = load_base(str(place / "base"))
    data = load_matches(place / "labels.csv")
    found = Embed().examples(data, base.tokenizer, truncate=False)
    assert {len(own) for own in found.members} == {1}
    drawn = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        found.begin(seed, epoch)
        drawn.append(list(found.members))
        for i, (one, other) in enumerate(found.members):
            assert one != other
            assert found.texts.labels[one] == found.texts.labels[other]
            assert found.lengths[i] == found.texts.lengths[one] + found.texts.lengths[other]
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] != drawn[2]
    assert len({other for _, other in drawn[0]}) > 60


@pytest.mark.parametrize("form", ["classes", "pairs"])
def test_metrics_equal_a_plain_search(place, form):
    base = load_base(str(place / "base"))
    task = Embed(temperature=0.3)
    rows = {
        "classes": Matches(("a", "b", "c", "d", "e", "a"), None, None, tuple("xxyyzx"), "here", (1, 2, 3, 4, 5, 6)),
        "pairs": Matches(tuple("abcda"), tuple("efgeh"), tuple("uvwxy"), None, "here", (1, 2, 3, 4, 5)),
    }[form]
    examples = task.examples(rows, base.tokenizer, truncate=False)
    g = torch.Generator().manual_seed(6)
    vectors = {text: torch.nn.functional.normalize(torch.randn(4, generator=g), dim=0) for text in "abcdefghuvwxy"}
    scores = torch.stack([torch.cat([vectors[text] for text in own]) for own in zip(*rows.columns())])
    ranks, losses = [], []
    for i, query in enumerate(rows.queries):
        if form == "classes":
            pool = {text: label == rows.labels[i] for text, label in zip(rows.queries, rows.labels) if text != query}
        else:
            right = {p for q, p in zip(rows.queries, rows.positives) if q == query}
            pool = {text: text in right for text in rows.positives}
        near = {text: float(vectors[query] @ vectors[text]) for text in pool}
        if not any(pool.values()):
            continue
        order = sorted(pool, key=lambda text: -near[text])
        ranks.append(1 + sum(not pool[text] for text in order[: next(k for k, t in enumerate(order) if pool[t])]))
        wrong = sum(math.exp(near[text] / 0.3) for text in pool if not pool[text])
        each = [-math.log((p := math.exp(near[text] / 0.3)) / (p + wrong)) for text in pool if pool[text]]
        losses.append(sum(each) / len(each))
    assert len(ranks) == 5
    found = task.metrics(scores, examples)
    assert found["recall_at_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 < found["recall_at_1"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels.csv", "pairs.jsonl", "triples.jsonl"])
def test_it_learns_what_belongs_together(place, name):
    words = {**QUICK, "epochs": 30, "patience": 30, "temperature": 0.1}
    found = lk.fit(str(place / "base"), place / name, "embed", symmetric=name == "pairs.jsonl", **words)
    assert found.metrics["loss"] < 0.7 * found.before["loss"]
    assert found.metrics["recall_at_1"] > found.before["recall_at_1"] + 0.3


def test_a_saved_run_gives_vectors_to_search_with(run, place):
    texts = ["i like rain and snow", "i like soup and rice", "i like fog", "i like hammer"]
    found = lk.predict(place / "run", texts)
    vectors = np.stack(found)
    assert vectors.shape == (4, 32)
    assert np.allclose((vectors**2).sum(1), 1, atol=1e-5)
    near = vectors @ vectors.T
    assert near[0, 2] > max(near[0, 1], near[0, 3])
    measured = lk.evaluate(place / "run", place / "labels.csv")
    assert measured.metrics["recall_at_1"] > 0.9
    low, high = measured.recall_interval
    assert low <= measured.metrics["recall_at_1"] <= high
    pairs = lk.evaluate(place / "run", load_matches(place / "pairs.jsonl"))
    assert (pairs.n_rows, pairs.n_candidates) == (120, len(set(load_matches(place / "pairs.jsonl").positives)))


def test_peft_gives_the_same_vectors(run, place):
    from peft import PeftModel

    assert json.loads((place / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == (
        "FEATURE_EXTRACTION"
    )
    base = load_base(str(place / "base"))
    texts = ["i like rain and snow", "i like soup", "the hammer"]
    model = PeftModel.from_pretrained(base.model, str(place / "run" / "adapter")).eval()
    rows = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
    mask = rows["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    adapter, task = open_run(place / "run")
    ours = load_base(str(place / "base"))
    examples = task.examples(task.asked(texts), ours.tokenizer, truncate=False)
    lk.attach(ours.model, adapter)
    with torch.no_grad(), Trunk(ours.model, pad=examples.pad) as trunk:
        batch = examples.gather([0, 1, 2])
        found = task.scores(ours.model, batch.hidden(trunk), batch)
    assert float((found - wanted).abs().max()) < 1e-5
    assert torch.allclose(torch.tensor(np.stack(lk.predict(place / "run", texts))), wanted, atol=0.05)  # bf16, perhaps


def test_forms_of_tables_and_what_is_wrong_with_them(tmp_path, place):
    assert load_matches(place / "labels.csv").form == "texts with labels"
    assert load_matches(place / "triples.jsonl").form == "triples"
    other = written(tmp_path / "other.jsonl", [{"anchor": "a", "passage": "b"}, {"anchor": "c", "passage": "d"}])
    assert load_matches(other).positives == ("b", "d")
    assert load_matches(other, answers=False).queries == ("a", "c")
    named = written(tmp_path / "named.jsonl", [{"x": "a", "y": "b", "z": "c"}])
    assert load_matches(named, query="x", positive="y", negative="z").negatives == ("c",)
    two = [{"sentence1": f"a {k}", "sentence2": f"b {k}", "label": k % 2} for k in range(4)]
    mrpc = written(tmp_path / "mrpc.jsonl", two)
    told = "'sentence1' and 'sentence2', and here each row is one text; name its column with --text COLUMN, or, where"
    for answers in (True, False):
        with pytest.raises(DataError, match=told):
            load_matches(mrpc, answers=answers)
        assert load_matches(mrpc, text="sentence2", answers=answers).queries[0] == "b 0"
    assert load_matches(mrpc, query="sentence1", positive="sentence2").positives[0] == "b 0"
    with pytest.raises(DataError, match=r"neither a column with positives .* nor one with labels .* x, y, z: name one"):
        load_matches(named)
    with pytest.raises(DataError, match="no other column with a usual name for the queries"):
        load_matches(named, positive="y")
    with pytest.raises(DataError, match="columns are named for pairs and for classes"):
        load_matches(named, text="x", positive="y")
    for fault, row in {
        "row 2: column 'passage' is empty": {"anchor": "a", "passage": ""},
        "row 2: column 'anchor' is 3": {"anchor": 3, "passage": "b"},
        "row 2: 'a' stands in two of its columns": {"anchor": "a", "passage": "a"},
    }.items():
        with pytest.raises(DataError, match=fault):
            load_matches(written(tmp_path / "bad.jsonl", [{"anchor": "a", "passage": "b"}, row]))


def test_rows_that_cannot_be_learned_from_are_refused(place, tmp_path):
    base = load_base(str(place / "base"))
    lines = [f"{word} and {word},{topic}" for topic, words in WORDS.items() for word in words]
    (tmp_path / "alone.csv").write_text("\n".join(["text,label", *lines, "x,odd", "x,odd", "x,odd"]), encoding="utf-8")
    with pytest.raises(DataError, match="row 33: label 'odd' has one text only; a pair needs two"):
        lk.fit(base, tmp_path / "alone.csv", "embed")
    (tmp_path / "one.csv").write_text("\n".join(["text,label", *lines[:10]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"one class only \('weather'\)"):
        lk.fit(base, tmp_path / "one.csv", "embed")
    task = Embed.of(load_splits(place / "pairs.jsonl", read=load_matches), base)
    with pytest.raises(DataError, match=r"1 of 1 texts are longer than 24 tokens, the longest in row 1 with 32"):
        task.examples(task.asked(["rain " * 30]), base.tokenizer, truncate=False)
    with pytest.raises(DataError, match="row 2 is empty"):
        task.asked(["a", " "])
    with pytest.raises(UsageError, match="temperature is 0; it must be a number above 0"):
        lk.fit(base, place / "pairs.jsonl", "embed", temperature=0)
    with pytest.raises(DataError, match="single texts"):
        task.evaluate(task.asked(["a"]), base, lambda _: torch.zeros(1), truncate=False)
    alone = load_matches(written(tmp_path / "alone.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]))
    with pytest.raises(DataError, match="no label with two texts, so nothing can be found in it; add rows"):
        task.evaluate(alone, base, lambda found: torch.eye(len(found), 4), truncate=False)


def test_a_step_is_the_same_whatever_the_memory_of_earlier_blocks(place):
    plain = lk.plan(load_base(str(place / "base")).model, blocks="last 1")
    results = [
        lk.fit(str(place / "base"), place / "labels.csv", "embed", plan=plain, prefix=prefix, **{**QUICK, "epochs": 3})
        for prefix in ("off", "memory")
    ]
    assert "1 of 2 blocks" in results[1].summary["prefix"]
    one, other = ([r["loss"] for r in result.records if r["kind"] == "step"] for result in results)
    assert one == pytest.approx(other, rel=1e-3)


def told(capsys, *words):
    code = main([str(word) for word in words])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_the_command_line_fits_predicts_evaluates_and_merges(place, capsys, tmp_path):
    words = ["fit", place / "base", place / "triples.jsonl", "--task", "embed", "--out", tmp_path / "run"]
    code, out, err = told(capsys, *words, "--epochs", "2", "--temperature", "0.1", "--symmetric", "--pool", "cls")
    assert code == 0, err
    assert "held-out recall_at_1" in out
    assert "triples; first row" in err
    assert "the model sees: [CLS] " in err and err.count(" | ") >= 2
    task = open_run(tmp_path / "run")[1]
    assert task == Embed("cls", 24, 0.1, True)
    code, out, err = told(capsys, "predict", tmp_path / "run", "--say", "rain", "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["text"] == "rain"
    assert sum(x * x for x in found["vector"]) == pytest.approx(1, abs=1e-5)
    code, out, _ = told(capsys, "predict", tmp_path / "run", place / "labels.csv", "--text", "text")
    assert len(out.splitlines()) == 180
    assert out.startswith("32 numbers (")
    assert len(told(capsys, "predict", tmp_path / "run", place / "triples.jsonl")[1].splitlines()) == 120
    assert told(capsys, "merge", tmp_path / "run", "--out", tmp_path / "merged")[0] == 0
    ours, merged = (told(capsys, "evaluate", tmp_path / name, place / "triples.jsonl") for name in ("run", "merged"))
    assert ours[0] == merged[0] == 0, merged[2]
    assert "recall@1" in ours[1]
    again = np.stack(lk.predict(tmp_path / "merged", ["rain"]))
    assert np.allclose(again[0], found["vector"], atol=0.05)
    assert replace(task, pool="mean") != task
