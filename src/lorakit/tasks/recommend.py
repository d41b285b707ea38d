"""recommend: items for each user, learned from what users had (implicit feedback), by low-rank updates of two tables.

The loss is a softmax over sampled items (data/pairs.py): the cross-entropy of the item that was had, by scores less the
log of each item's odds to be in the sample, so that it estimates the softmax over all items (Jean et al., 2015,
arXiv 1412.2007; Yi et al., 2019, "Sampling-bias-corrected neural modeling"). Held out, it is that over all items.

Metrics are means over users, of a ranking of all items that the user did not have in training, defined as in RecBole
(Recall, NDCG, Hit): recall@10 is the share of the user's held-out items among the first ten, NDCG@10 has binary gains
and is divided by the best possible one, hit rate@10 is the share of users with any. NDCG is that of implicit, too. On
test rows RecBole takes the validation items out of the ranking, which stay in here. Equal scores rank in the order of
the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.cells import text_of
from lorakit.data.faults import BadRow, refuse
from lorakit.data.interactions import Interactions, load_interactions
from lorakit.data.pairs import PairBatch, Pairs, Seen
from lorakit.data.rows import Splits
from lorakit.errors import DataError, UsageError
from lorakit.plan import Plan
from lorakit.rules import Rules
from lorakit.rules import plan as make_plan
from lorakit.tasks.base import Base
from lorakit.tasks.intervals import bootstrap
from lorakit.tasks.tables import (
    NEW,
    Tables,
    fresh_tables,
    load_tables,
    named_tables,
    packed,
    refuse_other_base,
    scores_of_pairs,
    unpacked,
    without,
)
from lorakit.tasks.task import TASKS, Measured, Scores, Task
from lorakit.trunk import Direct, Trunk

TOP = 10
_CELLS = 1 << 20  # scores of users with all items that are held at once


@dataclass(frozen=True)
class Recommendation:
    """The best items for a user, best first, with their scores. Who is not `known` gets the most popular ones."""

    user: str
    items: tuple[str, ...]
    scores: tuple[float, ...]
    known: bool = True


@dataclass(frozen=True)
class Evaluation(Measured):
    """Metrics over users; `ndcg_interval` is a 95 % bootstrap interval over them."""

    metrics: dict[str, float]
    ndcg_interval: tuple[float, float]
    n_rows: int
    n_users: int

    def __str__(self) -> str:
        low, high = self.ndcg_interval
        found = self.metrics
        return (
            f"ndcg@{TOP} {found[f'ndcg@{TOP}']:.3f} (95 % interval {low:.3f} to {high:.3f}; the most popular items: "
            f"{found[f'popular_ndcg@{TOP}']:.3f}), recall@{TOP} {found[f'recall@{TOP}']:.3f}, hit rate@{TOP} "
            f"{found[f'hit_rate@{TOP}']:.3f}, loss {found['loss']:.3f}, {self.n_rows} rows of {self.n_users} users"
        )


@TASKS.add_class
@dataclass(frozen=True)
class Recommend(Task):
    """What users had in training (`seen`: see tables.packed); and all names, where the base is trained from scratch."""

    name = "recommend"
    part = Interactions
    metric = f"ndcg@{TOP}"
    drawn = f"ndcg@{TOP}"
    columns = ("user", "item", "rating", "time")
    options = ("k",)
    untold = ("seen", "users", "items")
    try_it = "USER"

    seen: str
    users: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    from_scratch: bool = False

    # ---------------------------------------------------------------- before there is one

    @classmethod
    def read(cls, source: str | Path, /, *, answers: bool = True, **columns: str | None) -> Interactions:
        """Users and items of one table."""
        return load_interactions(source, items=answers, **columns)

    @classmethod
    def asked(cls, given: Sequence[str]) -> Interactions:
        """Users. DataError for one without a name."""
        users = tuple(text_of(str(one), f"user {n}").strip() for n, one in enumerate(given, 1))
        return Interactions(users, None, None, "users", tuple(range(1, len(given) + 1)))

    @classmethod
    def base_for(cls, name: str, data: Splits[Any] | None, **wishes: Any) -> Base:
        """A directory of tables; or fresh tables with a row for every user and item of these rows."""
        if not name.startswith(NEW):
            return load_tables(name)
        if data is None:
            raise UsageError(f"the tables of '{name}' have the users and items of its data, and there is none here")
        parts = (data.train, data.valid, data.test)
        _refuse_unlearned(data)
        users, items = ({x for part in parts for x in getattr(part, side) or ()} for side in ("users", "items"))
        return fresh_tables(name, sorted(users), sorted(items))

    @classmethod
    def plan(cls, model: nn.Module, rank: int = 8, layers: Rules | None = None, **rules: Any) -> Plan:
        """Every embedding, and the bias of the items fully; fresh tables learn fully."""
        if getattr(model, "fresh", False):
            usual = signature(make_plan).parameters
            asked = {"rank": rank, "layers": layers, **rules}
            given = [name for name, value in asked.items() if value and value != usual[name].default]
            if given:
                raise UsageError(f"tables that are trained from scratch learn fully; leave {', '.join(given)} out")
            return Plan({}, ("*",))
        trained = tuple(rules.pop("trained", ()))
        if isinstance(model, Tables) and "*" not in trained:
            trained = (*trained, "bias")
        return make_plan(model, rank, layers or "embeddings", trained=trained, **rules)

    @classmethod
    def of(cls, data: Splits[Any], base: Base) -> "Recommend":
        """With what the users of the training rows had."""
        refuse_other_base(base.model, base.tokenizer)
        seen = packed(base.tokenizer.pairs(data.train))
        if not getattr(base.model, "fresh", False):
            return cls(seen=seen)
        _refuse_unlearned(data)
        return cls(seen=seen, users=base.tokenizer.users, items=base.tokenizer.items, from_scratch=True)

    def note(self) -> dict[str, Any]:
        """What an adapter must remember to be used again."""
        names = {"users": list(self.users), "items": list(self.items)} if self.from_scratch else {}
        return {"name": self.name, "seen": self.seen, "from_scratch": self.from_scratch, **names}

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Recommend":
        """The inverse of `note`."""
        users, items = (tuple(note.get(side, ())) for side in ("users", "items"))
        return cls(seen=note["seen"], users=users, items=items, from_scratch=bool(note["from_scratch"]))

    # ---------------------------------------------------------------- in training

    def prepare(self, model: nn.Module) -> None:
        """Nothing: the tables are all there is."""

    def trunk(self, model: nn.Module, *, dtype: str, pad: int, keep: bool = True) -> Trunk:
        """The model as it is, in its own precision."""
        widths = [layer.embedding_dim for layer in model.modules() if isinstance(layer, nn.Embedding)]
        return Direct(model, max(widths))

    def examples(self, rows: Interactions, tokenizer: Any, *, truncate: bool) -> Pairs:
        """All pairs as rows of the tables."""
        users, items = torch.from_numpy(tokenizer.pairs(rows)).T
        return self._pairs(users, items, tokenizer, rows.lines)

    def _pairs(self, users: Tensor, items: Tensor, catalog: Any, lines: tuple[int, ...], k: int = 0) -> Pairs:
        own, n_items = torch.stack([users[: len(items)], items], 1).numpy(), len(catalog.items)
        had = without(unpacked(self.seen, catalog.seen), own)  # what is asked for is among what is ranked
        counts = np.bincount(unpacked(self.seen)[:, 1], minlength=n_items)
        return Pairs(users, items, Seen(had, len(catalog.users)), torch.from_numpy(counts), lines, k)

    def loss(self, model: nn.Module, hidden: Any, batch: PairBatch) -> Tensor:
        """Summed cross-entropy in nats, among the step's candidates."""
        device = next(model.parameters()).device
        users, candidates, log_odds, labels = (
            x.to(device) for x in (batch.users, batch.candidates, batch.log_odds, batch.labels)
        )
        if type(hidden) is Tables:
            loss: Tensor = hidden(users, candidates, labels, log_odds)
            return loss
        logits = scores_of_pairs(hidden, users, candidates).float() - log_odds
        return F.cross_entropy(logits, labels, reduction="sum")

    def scores(self, model: nn.Module, hidden: Any, batch: PairBatch) -> Tensor:
        """Of each pair: the item's rank by the model, its rank by popularity, its loss among all items.

        Of users who ask: their best `k` items, and the scores of these.
        """
        everything = torch.arange(len(batch.pairs.counts), device=next(model.parameters()).device)
        n_rows = max(1, _CELLS // len(everything))
        found = []
        for start in range(0, len(batch.users), n_rows):
            users = batch.users[start : start + n_rows]
            all_scores = scores_of_pairs(hidden, users.to(everything.device), everything).float().cpu()
            if batch.pairs.k:
                all_scores[batch.pairs.seen.of(users)] = -torch.inf
                best = all_scores.topk(min(batch.pairs.k, len(everything)))
                found.append(torch.cat([best.indices.float(), best.values], 1))
                continue
            items = batch.items[start : start + n_rows]
            loss = F.cross_entropy(all_scores, items, reduction="none")
            ranks = [_ranks(by, users, items, batch.pairs.seen) for by in (all_scores, self._popular(batch, users))]
            found.append(torch.stack([*ranks, loss], 1))
        return torch.cat(found)

    @staticmethod
    def _popular(batch: PairBatch, users: Tensor) -> Tensor:
        return batch.pairs.counts.float().repeat(len(users), 1)

    def metrics(self, scores: Tensor, pairs: Pairs) -> dict[str, float]:
        """NDCG, recall and hit rate of the first ten, means over users; the popular items' NDCG; mean loss."""
        users, number = torch.unique(pairs.users, return_inverse=True)
        ndcg, recall, hit = at_top(scores[:, 0], number, len(users))
        popular, _, _ = at_top(scores[:, 1], number, len(users))
        names = (f"ndcg@{TOP}", f"recall@{TOP}", f"hit_rate@{TOP}", f"popular_ndcg@{TOP}")
        found = {name: float(values.mean()) for name, values in zip(names, (ndcg, recall, hit, popular))}
        return {**found, "loss": float(scores[:, 2].double().mean())}

    # ---------------------------------------------------------------- in use

    def load_base(self, name: str) -> Base:
        """The base, as it was loaded for training."""
        return named_tables(self.note(), name)

    def predict(
        self, rows: Interactions, base: Base, scores: Scores, *, truncate: bool, **options: Any
    ) -> list[Recommendation]:
        """The best `k` items (10) among those not had, for each user once. Whom the base does not know gets the most
        popular ones."""
        k = options.get("k", TOP)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise UsageError(f"k is {k!r}; it must be a whole number, 1 or more")
        catalog, users = base.tokenizer, tuple(dict.fromkeys(rows.users))
        known = [user for user in users if user in catalog.user_numbers]
        places = torch.tensor([catalog.user_numbers[user] for user in known], dtype=torch.int64)
        pairs = self._pairs(places, places[:0], catalog, tuple(range(1, len(known) + 1)), k)
        popular = pairs.counts.double().sort(descending=True, stable=True)
        counts = popular.values[:k].tolist()
        usual = tuple(catalog.items[i] for i in popular.indices[:k].tolist()), tuple(counts)
        found = {user: Recommendation(user, *usual, known=False) for user in users}
        for user, row in zip(known, scores(pairs).tolist() if known else ()):
            half = len(row) // 2
            best = [(catalog.items[int(i)], value) for i, value in zip(row[:half], row[half:]) if value != -np.inf]
            found[user] = Recommendation(user, tuple(item for item, _ in best), tuple(value for _, value in best))
        return list(found.values())

    def evaluate(self, rows: Interactions, base: Base, scores: Scores, *, truncate: bool) -> Evaluation:
        """Metrics over the users of these rows. DataError for rows that the run learned from."""
        if rows.items is None:
            raise DataError(f"'{rows.source}' has users alone; name what they came to have, in a column of items")
        pairs = self.examples(rows, base.tokenizer, truncate=truncate)
        given = base.tokenizer.pairs(rows)
        held = without(given, unpacked(self.seen))
        if len(held) < len(given):
            new = set(map(tuple, held.tolist()))
            learned = [line for line, pair in zip(rows.lines, map(tuple, given.tolist())) if pair not in new]
            refuse(
                [BadRow(rows.source, line, "it was learned from, so it proves nothing") for line in learned],
                f"'{rows.source}': {len(learned)} of {len(rows)} rows were learned from, so they prove nothing (row "
                f"{learned[0]} is the first); give interactions that came later, or were held out",
            )
        found = scores(pairs)
        users, number = torch.unique(pairs.users, return_inverse=True)
        ndcg = at_top(found[:, 0], number, len(users))[0]
        return Evaluation(self.metrics(found, pairs), bootstrap(ndcg.tolist()), len(rows), len(users))

    def shown(self, found: Sequence[Recommendation]) -> str:
        """A line for each user."""
        return "\n".join(
            f"{one.user}: {', '.join(one.items)}{'' if one.known else '   (not seen in training: the popular ones)'}"
            for one in found
        )


def _refuse_unlearned(data: Splits[Any]) -> None:
    """BadRowsError for held-out rows of users who have no training rows."""
    learned = set(data.train.users)
    why = "has no training rows, so nothing is learned of that user; add some, or remove the row"
    refuse(
        [
            BadRow(part.source, line, f"user '{user}' {why}")
            for part in (data.valid, data.test)
            for line, user in zip(part.lines, part.users)
            if user not in learned
        ]
    )


def _ranks(scores: Tensor, users: Tensor, items: Tensor, seen: Seen) -> Tensor:
    """From 1, of each user's item in `scores (b, items)` among those that were not had."""
    own = scores.gather(1, items[:, None])
    scores[seen.of(users)] = -torch.inf
    before = torch.arange(scores.shape[1]) < items[:, None]
    return 1 + ((scores > own) | ((scores == own) & before)).sum(1).float()


def at_top(ranks: Tensor, users: Tensor, n_users: int) -> tuple[Tensor, Tensor, Tensor]:
    """NDCG, recall and hit rate of the first ten, of each user `(n_users,)`, by the ranks of held-out items and whose
    they are."""
    zeros = torch.zeros(n_users, dtype=torch.float64)
    inside = (ranks <= TOP).double()
    gains = torch.where(ranks <= TOP, 1 / torch.log2(1 + ranks.double()), 0.0)
    n_hits, n_items = zeros.index_add(0, users, inside), zeros.index_add(0, users, torch.ones_like(inside))
    ideal = torch.cumsum(1 / torch.log2(torch.arange(2, TOP + 2, dtype=torch.float64)), 0)
    ndcg = zeros.index_add(0, users, gains) / ideal[n_items.clamp(max=TOP).long() - 1]
    return ndcg, n_hits / n_items, (n_hits > 0).double()
