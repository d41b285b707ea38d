"""recommend: loss, ranks and metrics against plain computations; that it learns; what travels with a run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit as lk
from lorakit.attach import attach, merge
from lorakit.cli import main
from lorakit.data import load_splits
from lorakit.data.interactions import Interactions
from lorakit.data.pairs import UNIFORM
from lorakit.errors import DataError, LorakitError, UsageError
from lorakit.fit.learner import Learner, scores_of
from lorakit.fit.settings import Settings
from lorakit.tasks.base import Base
from lorakit.tasks.recommend import Recommend, at_top
from lorakit.tasks.tables import Catalog, Tables, fresh_tables, load_tables, packed, unpacked
from several import begin, end, losses
from tiny_taste import draw_taste, taste_table

QUICK = {"task": "recommend", "batch_size": 128, "epochs": 12, "learning_rate": 0.02}


def rows_of(triples):
    users, items, times = zip(*triples)
    return Interactions(users, items, tuple(map(float, times)), "here", tuple(range(2, len(users) + 2)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base of the first season, trained and merged; the rows of a second one, in which tastes moved."""
    folder = tmp_path_factory.mktemp("taste")
    taste_table(folder / "first.csv", draw_taste())
    taste_table(folder / "second.csv", draw_taste(1, shift=1))
    lk.fit("new:16", folder / "first.csv", out=folder / "first", **QUICK)
    assert main(["merge", str(folder / "first"), "--out", str(folder / "base")]) == 0
    return folder


@pytest.fixture(scope="module")
def second(place):
    return load_splits(place / "second.csv", read=Recommend.read)


def tiny(n_users=7, n_items=40, width=6, seed=0):
    """A base with random tables, its task and training pairs: each user had five items."""
    generator = torch.Generator().manual_seed(seed)
    model = Tables(n_users, n_items, width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    catalog = Catalog(tuple(f"u{k}" for k in range(n_users)), tuple(f"i{k}" for k in range(n_items)))
    taken = [torch.randperm(n_items, generator=generator)[:7].tolist() for _ in range(n_users)]
    train, held = (
        rows_of([(f"u{user}", f"i{item}", 0) for user, items in enumerate(taken) for item in items[part]])
        for part in (slice(0, 5), slice(5, 7))
    )
    base = Base(model.eval(), catalog, "tiny", "", 0)
    task = Recommend(packed(catalog.pairs(train)))
    return base, task, task.examples(train, catalog, truncate=False), task.examples(held, catalog, truncate=False)


def learner_of(base, task, **settings):
    trunk = task.trunk(base.model, dtype="fp32", pad=0)
    return Learner(base.model, task, trunk, Settings(learning_rate=0.01, **settings))


# ---------------------------------------------------------------- loss


def test_the_loss_is_the_softmax_over_the_sample_by_the_odds_of_each_item():
    base, task, train, _ = tiny()
    indices = (3, 11, 12, 30)
    batch = train.for_step(indices, 5).gather(indices)
    bias, users, items = (p.detach() for p in base.model.parameters())
    counts = np.bincount(train.items.numpy(), minlength=40)
    wanted = 0.0
    for i in indices:
        logits = []
        for item in dict.fromkeys(batch.candidates.tolist()):
            score = float(users[train.users[i]] @ items[item] + bias[item])
            odds = 1 - (1 - counts[item] / 35) ** 4 * (1 - 1 / 40) ** UNIFORM
            logits.append(score - math.log(odds))
        wanted -= F.log_softmax(torch.tensor(logits), 0)[batch.candidates.tolist().index(int(train.items[i]))]
    assert float(task.loss(base.model, base.model, batch).detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_an_item_is_in_the_sample_as_often_as_its_odds_say():
    train = tiny(n_items=4000)[2]
    seen, odds, n = np.zeros(4000), np.full(4000, np.nan), 1500
    for k in range(n):
        indices = torch.randperm(35, generator=torch.Generator().manual_seed(k))[:8].tolist()
        step = train.for_step(indices, 0)
        seen[step.candidates] += 1
        real = step.log_odds.isfinite()
        odds[step.candidates[real]] = step.log_odds[real].exp()
    rare = train.counts.numpy() == 0
    # 3,965 items, each in 12 % of 1,500 samples: the mean is known to 0.02 %
    assert (seen[rare] / n).mean() == pytest.approx(np.nanmean(odds[rare]), rel=5e-3)
    # 35 items, each in 32 %: 8 of 35 rows without replacement are a little more than with it
    assert (seen[~rare] / n).mean() == pytest.approx(np.nanmean(odds[~rare]), rel=0.12)


def test_negatives_are_fixed_by_the_seed_and_the_steps_rows():
    _, _, train, _ = tiny(n_items=4000)
    first, again = train.for_step((1, 2, 3), 0), train.for_step((1, 2, 3), 0)
    assert torch.equal(first.candidates, again.candidates)
    for other in (train.for_step((1, 2, 3), 1), train.for_step((1, 2, 4), 0)):
        assert not torch.equal(first.candidates[:20], other.candidates[:20])


def test_steps_in_small_passes_have_the_gradient_of_one_pass():
    found = []
    for most in (4096, 8):
        base, task, train, _ = tiny()
        attach(base.model, task.plan(base.model, 2), seed=1)
        learner = learner_of(base, task, tokens_per_pass=most)
        with torch.no_grad():
            learner.flat.values.add_(0.1)
        loss, _ = learner.gradients(train, tuple(range(35)))
        found.append((loss, learner.flat.gradients.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_tables_with_labels_give_the_loss_of_their_scores_to_all_that_learns():
    base, task, train, _ = tiny()
    attach(base.model, task.plan(base.model, 2), seed=1)
    learning = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.1)
    batch = train.for_step(range(35), 5).gather(range(35))
    scores = base.model(batch.users, batch.candidates)
    wanted = F.cross_entropy(scores - batch.log_odds, batch.labels, reduction="sum")
    loss = task.loss(base.model, base.model, batch)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert len(learning) == 5
    for one, other in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(wanted, learning)):
        assert float(other.abs().max()) > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_step_makes_nothing_of_the_size_of_a_table_and_teaches_only_rows_that_occur():
    base, task, train, _ = tiny(n_users=40_000, n_items=3000, width=32)
    attach(base.model, task.plan(base.model, 2), seed=1)
    learner = learner_of(base, task)
    with torch.no_grad():
        learner.flat.values.add_(0.1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    indices = tuple(range(0, 1000, 10))
    learner.flat.clear()
    with Watch():
        learner.loss(train.for_step(indices, 0).gather(indices), train).backward()
    assert largest <= 2 * 40_000 + 1  # the gradient of `a (2, users)`; the table has 32 x 40,000
    (a,) = (p for name, p in learner.flat.named.items() if name.startswith("users") and name.endswith(".a"))
    assert set(a.grad.abs().sum(0).nonzero().flatten().tolist()) == set(train.users[list(indices)].tolist())


# ---------------------------------------------------------------- metrics


def plain_metrics(scores, had, held):
    """The definitions, user by user, with lists and sets."""
    ndcg, recall, hit = [], [], []
    for user, right in held.items():
        ranked = sorted((i for i in range(scores.shape[1]) if i not in had[user]), key=lambda i: (-scores[user, i], i))
        gains = [1 / math.log2(place + 2) for place, item in enumerate(ranked[:10]) if item in right]
        ideal = sum(1 / math.log2(place + 2) for place in range(min(10, len(right))))
        ndcg.append(sum(gains) / ideal)
        recall.append(len(gains) / len(right))
        hit.append(bool(gains))
    return [float(np.mean(values)) for values in (ndcg, recall, hit)]


def test_metrics_equal_their_definitions():
    base, task, train, held = tiny(n_users=50, n_items=60)
    with task.trunk(base.model, dtype="fp32", pad=0) as trunk:
        found = task.metrics(scores_of(base.model, task, trunk, held, Settings(tokens_per_pass=40)), held)
    had, right = ({u: set(part.items[part.users == u].tolist()) for u in range(50)} for part in (train, held))
    scores = (base.model.users.weight @ base.model.items.weight.T + base.model.bias).detach()
    names = ("ndcg@10", "recall@10", "hit_rate@10")
    assert [found[name] for name in names] == pytest.approx(plain_metrics(scores.numpy(), had, right))
    counts = np.bincount(train.items.numpy(), minlength=60)
    assert found["popular_ndcg@10"] == pytest.approx(plain_metrics(np.tile(counts, (50, 1)), had, right)[0])
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores[held.users], held.items)))


def test_more_held_out_items_than_places_can_be_perfect():
    ndcg, recall, hit = at_top(torch.arange(1.0, 13.0), torch.zeros(12, dtype=torch.int64), 1)
    assert (float(ndcg), float(recall), float(hit)) == (pytest.approx(1), pytest.approx(10 / 12), 1)


# ---------------------------------------------------------------- it learns


def test_a_base_from_scratch_learns_more_than_what_is_popular(place):
    found = load_tables(place / "base")
    assert found.model.users.weight.shape == (60, 16)
    summary = json.loads((place / "first" / "summary.json").read_text())
    assert summary["test"]["ndcg@10"] > summary["test"]["popular_ndcg@10"] + 0.15
    assert summary["before"]["ndcg@10"] < summary["test"]["ndcg@10"] - 0.15
    assert not {"seen", "users", "items"} & set(summary)  # not for people
    assert summary["dtype"] == "fp32"


def test_an_adapter_follows_a_shift_of_taste_and_leaves_the_base_as_it_was(place, second):
    base = load_tables(place / "base")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = lk.fit(base, second, plan=Recommend.plan(base.model, 4), **QUICK)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert set(result.adapter.layers) == {"users", "items"}
    assert set(result.adapter.trained) == {"bias"}
    assert result.before["ndcg@10"] < 0.15
    assert result.metrics["ndcg@10"] > result.metrics["popular_ndcg@10"] + 0.15
    again = lk.fit(base, second, plan=Recommend.plan(base.model, 4), **QUICK)
    assert again.adapter == result.adapter


class HaltError(Exception):
    pass


def test_a_run_that_was_stopped_ends_as_the_uninterrupted_one(place, second, tmp_path):
    words = {**QUICK, "epochs": 4, "checkpoint_steps": 2}
    whole = lk.fit(place / "base", second, out=tmp_path / "whole", **words)

    def halt(record, total):
        if record.kind == "step" and record.step == 9:  # behind a checkpoint, inside the second epoch
            raise HaltError

    with pytest.raises(HaltError):
        lk.fit(place / "base", second, out=tmp_path / "cut", watch=halt, **words)
    resumed = lk.fit(place / "base", second, out=tmp_path / "cut", resume=True, **words)
    assert resumed.adapter == whole.adapter
    assert resumed.metrics == whole.metrics


@pytest.mark.slow  # processes that import torch
def test_two_processes_learn_tastes_as_one_does(place, tmp_path):
    words = ["-m", "lorakit", "fit", str(place / "base"), str(place / "second.csv"), "--task", "recommend"]
    words += ["--epochs", "2", "--batch-size", "128", "--learning-rate", "0.02", "--threads", "1"]
    end(begin(tmp_path, "one", size=1, words=words))
    end(begin(tmp_path, "two", words=words))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) > 6
    assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5
    two, one = (lk.load(tmp_path / name / "adapter").layers for name in ("two", "one"))
    for path, layer in one.items():
        for name, tensor in layer.factors.items():
            assert float((two[path].factors[name] - tensor).abs().max()) < 1e-3


# ---------------------------------------------------------------- in use


@pytest.fixture(scope="module")
def run(place, second):
    lk.fit(place / "base", second, out=place / "second", **QUICK)
    return place / "second"


def test_predict_gives_what_was_not_had_best_first(place, second, run):
    (found,) = lk.predict(run, ["u3"], k=7)
    assert found.known
    assert len(found.items) == 7
    assert list(found.scores) == sorted(found.scores, reverse=True)
    season = {item for user, item, _ in draw_taste() if user == "u3"}
    first = load_splits(place / "first.csv", read=Recommend.read).train
    had = {item for rows in (first, second.train) for user, item in zip(rows.users, rows.items) if user == "u3"}
    assert not had & set(found.items)
    assert season & had  # what the base learned from is not recommended either
    (everything,) = lk.predict(run, ["u3"], k=500)
    assert (
        set(everything.items) == {f"i{k}" for k in range(80)} & set(load_tables(place / "base").tokenizer.items) - had
    )


def test_who_is_not_known_gets_the_popular_items_and_is_told(second, run):
    found = lk.predict(run, ["nobody", "u1", "nobody"], k=3)
    assert [(one.user, one.known) for one in found] == [("nobody", False), ("u1", True)]
    counts = {item: second.train.items.count(item) for item in set(second.train.items)}
    assert list(found[0].scores) == sorted(counts.values(), reverse=True)[:3]
    assert [counts[item] for item in found[0].items] == list(found[0].scores)
    with pytest.raises(UsageError, match="k is 0"):
        lk.predict(run, ["u1"], k=0)
    with pytest.raises(DataError, match="user 2 is empty"):
        lk.predict(run, ["u1", " "])


def test_evaluate_gives_what_the_fit_gave_with_an_interval(second, run):
    found = lk.evaluate(run, second.test)
    assert found.metrics == json.loads((run / "summary.json").read_text())["test"]
    low, high = found.ndcg_interval
    assert low < found.metrics["ndcg@10"] < high
    assert (found.n_rows, found.n_users) == (60, 60)
    assert "60 rows of 60 users" in str(found)
    with pytest.raises(DataError, match="600 of 600 rows were learned from"):
        lk.evaluate(run, second.train)
    with pytest.raises(DataError, match="has users alone; name what they came to have"):
        lk.evaluate(run, replace(second.test, items=None))


def test_a_merged_base_ranks_as_the_adapter_does(place, second, run, tmp_path):
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    one, two = lk.evaluate(run, second.test), lk.evaluate(tmp_path / "merged", second.test)
    assert one.metrics == pytest.approx(two.metrics, abs=1e-6)
    for left, right in zip(*(lk.predict(where, ["u0", "u7"]) for where in (run, tmp_path / "merged"))):
        assert left.items == right.items
        assert left.scores == pytest.approx(right.scores, abs=1e-4)
    seen = unpacked(load_tables(tmp_path / "merged").tokenizer.seen)
    assert len(seen) > len(unpacked(load_tables(place / "base").tokenizer.seen))


# ---------------------------------------------------------------- other bases


class PairByPair(nn.Module):
    """Somebody's module: it scores as many users as items, pair by pair."""

    def __init__(self, tables):
        super().__init__()
        self.who = nn.Embedding.from_pretrained(tables.users.weight.detach().clone())
        self.what = nn.Embedding.from_pretrained(tables.items.weight.detach().clone())

    def forward(self, users, items):
        return (self.who(users) * self.what(items)).sum(-1)


def test_a_module_that_scores_pair_by_pair_learns_as_one_that_gives_all_pairs(place, second):
    tables = load_tables(place / "base")
    own = PairByPair(tables.model)
    result = lk.fit(Base(own, tables.tokenizer, "mine", "", 0), second, **QUICK)
    with torch.no_grad():
        tables.model.bias.zero_()
    plan = lk.plan(tables.model, 8, "embeddings")
    same = lk.fit(tables, second, plan=plan, **QUICK)
    assert set(result.adapter.layers) == {"who", "what"}
    assert result.before == pytest.approx(same.before, rel=1e-4)
    assert result.metrics["ndcg@10"] > result.metrics["popular_ndcg@10"] + 0.1
    attach(own, result.adapter)
    users, items = torch.arange(5), torch.arange(5, 10)
    wanted = own(users, items)
    merge(own)
    assert torch.allclose(own(users, items), wanted, atol=1e-5)


def test_bases_that_do_not_fit_are_named(place, second, tmp_path):
    tables = load_tables(place / "base")
    with pytest.raises(UsageError, match="needs the names of users and items"):
        lk.fit(Base(tables.model, None, "x", "", 0), second, **QUICK)
    odd = nn.ModuleDict({"who": nn.Embedding(60, 3), "what": nn.Embedding(len(tables.tokenizer.items), 3)})
    with pytest.raises(UsageError, match="must give a score for every pair"):
        lk.fit(Base(odd, tables.tokenizer, "x", "", 0), second, **QUICK)
    with pytest.raises(UsageError, match="no embedding of Tables has"):
        lk.fit(Base(Tables(5, 6, 2), tables.tokenizer, "x", "", 0), second, **QUICK)
    with pytest.raises(LorakitError, match="is no directory of tables"):
        lk.fit(tmp_path, second, **QUICK)
    with pytest.raises(UsageError, match="width '0'"):
        fresh_tables("new:0", ["a"], ["b"])
    with pytest.raises(UsageError, match="trained from scratch learn fully; leave rank, layers out"):
        Recommend.plan(fresh_tables("new:4", ["a"], ["b"]).model, 4, "users")
    with pytest.raises(DataError, match="names user 'a' twice"):
        Catalog(("a", "a"), ("b",))
    other = rows_of([("u1", "i1", 1), ("new", "i2", 2), ("u2", "thing", 3)])
    with pytest.raises(DataError, match=r"row 3: user 'new' is none of the 60.*\n?.*row 4: item 'thing'"):
        tables.tokenizer.pairs(other)


def test_pairs_come_back_from_their_short_text():
    pairs = np.array([[4, 9], [0, 3], [4, 1], [4, 9], [70_000, 123_456]])
    assert unpacked(packed(pairs)).tolist() == [[0, 3], [4, 1], [4, 9], [70_000, 123_456]]
    assert unpacked(packed(pairs), packed(np.array([[1, 1]]))).tolist()[1] == [1, 1]
    assert packed(np.empty((0, 2))) == "" and len(unpacked("")) == 0
