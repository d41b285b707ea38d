"""Bases of recommenders: a table of users and one of items, whose rows multiplied are the scores.

On disk a directory: `tables.safetensors` (`users (n, d)`, `items (m, d)`, `bias (m,)`) and `names.json` (who stands in
which row; what each user had). Our own module is `Tables`. Any other torch module with embeddings is a base too, from
Python: `Base(module, Catalog(users, items), "mine", "", 0)`; it is called with users `(b,)` and items `(m,)` and gives
the scores of all pairs `(b, m)`, or, where it only scores pair by pair, with as many of both.
"""

import base64
import binascii
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.attach.lookups import looked_up
from lorakit.data.faults import BadRow, refuse
from lorakit.data.interactions import Interactions
from lorakit.errors import DataError, LorakitError, UsageError, listed
from lorakit.files import read_json, read_tensors, write_json, write_tensors
from lorakit.kernels.pairs import pair_loss
from lorakit.kernels.products import linear
from lorakit.tasks.base import Base

NEW = "new:"
WEIGHTS, NAMES = "tables.safetensors", "names.json"
_MOST_ITEMS = 1 << 24  # places of items are told in float32
_FIRST = 0.1  # standard deviation of fresh tables
_ALL_PAIRS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_AT_ONCE = 1 << 18  # pairs that a module which scores pair by pair is given together


class Tables(nn.Module):
    """Matrix factorisation with a bias of the items: `score(u, i) = users[u] . items[i] + bias[i]`.

    `fresh` tables know nothing yet.
    """

    fresh = False

    def __init__(self, n_users: int, n_items: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(n_users, width)
        self.items = nn.Embedding(n_items, width)
        self.bias = nn.Parameter(torch.zeros(n_items))

    def forward(
        self, users: Tensor, items: Tensor, labels: Tensor | None = None, log_odds: Tensor | float = 0.0
    ) -> Tensor:
        """Scores `(b, m)` of users `(b,)` with items `(m,)`.

        With `labels (b,)`, the place of each user's own item among these: the summed cross-entropy in nats, by scores
        less `log_odds (m,)`.
        """
        bias = self.bias.index_select(0, items)
        if labels is not None:
            return pair_loss(looked_up(self.users, users), looked_up(self.items, items), bias - log_odds, labels)
        product = nn.functional.linear if torch.is_grad_enabled() else linear
        return product(self.users(users), self.items(items), bias)

    def save_pretrained(self, place: str | Path) -> None:
        """Writes the tables."""
        tensors = {"users": self.users.weight, "items": self.items.weight, "bias": self.bias}
        write_tensors(Path(place) / WEIGHTS, {name: tensor.detach() for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Catalog:
    """Names of the users and items, in the order of their tables, and what each user had (`seen`: see `packed`)."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    seen: str = ""

    def __post_init__(self) -> None:
        for noun, names in (("user", self.users), ("item", self.items)):
            if not names:
                raise DataError(f"the catalog has no {noun}s")
            if len(set(names)) < len(names):
                raise DataError(f"the catalog names {noun} {Counter(names).most_common(1)[0][0]!r} twice")

    def __repr__(self) -> str:
        return f"Catalog({len(self.users)} users, {len(self.items)} items)"

    @cached_property
    def user_numbers(self) -> dict[str, int]:
        """Name -> row."""
        return {name: number for number, name in enumerate(self.users)}

    @cached_property
    def item_numbers(self) -> dict[str, int]:
        """Name -> row."""
        return {name: number for number, name in enumerate(self.items)}

    def pairs(self, rows: Interactions) -> np.ndarray[Any, Any]:
        """Rows of both tables, `(n, 2)`. DataError for users and items that the tables do not have."""
        bad: list[BadRow] = []
        for noun, names, known in (
            ("user", rows.users, self.user_numbers),
            ("item", rows.items or (), self.item_numbers),
        ):
            bad += [
                BadRow(rows.source, line, f"{noun} '{name}' is none of the {len(known):,} that the base knows")
                for line, name in zip(rows.lines, names)
                if name not in known
            ]
        refuse(bad, way=f"remove those rows, or train a base with all rows from {NEW}64")
        users = [self.user_numbers[name] for name in rows.users]
        items = [self.item_numbers[name] for name in rows.items or ()]
        return np.array([users, items], dtype=np.int64).T

    def save_pretrained(self, place: str | Path) -> None:
        """Writes the names."""
        write_json(Path(place) / NAMES, {"users": list(self.users), "items": list(self.items), "seen": self.seen})


def packed(pairs: np.ndarray[Any, Any]) -> str:
    """Pairs `(n, 2)` of rows as a short text; `unpacked` gives them back, sorted, each once."""
    if not len(pairs):
        return ""
    users, items = _once(pairs).T.astype("<i4")
    steps = np.diff(users, prepend=np.int32(0))
    return base64.b64encode(zlib.compress(steps.tobytes() + items.tobytes(), 9)).decode("ascii")


def unpacked(*texts: str) -> np.ndarray[Any, Any]:
    """The pairs of all of these texts, sorted by user and item, each once."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for text in texts:
        if text:
            steps, items = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4").reshape(2, -1)
            found.append(np.stack([np.cumsum(steps), items], axis=1).astype(np.int64))
    return _once(np.concatenate(found))


def _once(pairs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack(np.divmod(np.unique(_keys(pairs)), _MOST_ITEMS), axis=1)


def _keys(pairs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    keys: np.ndarray[Any, Any] = pairs[:, 0].astype(np.int64) * _MOST_ITEMS + pairs[:, 1]
    return keys


def without(pairs: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The pairs that are none of the others, in their order."""
    kept: np.ndarray[Any, Any] = pairs[~np.isin(_keys(pairs), _keys(others))]
    return kept


def fresh_tables(name: str, users: Sequence[str], items: Sequence[str]) -> Base:
    """Tables that know nothing, of the width that `new:64` asks for."""
    digits = name.removeprefix(NEW)
    width = int(digits) if digits.isdecimal() else 0
    if not 1 <= width <= 4096:
        raise UsageError(f"'{name}' asks for tables of width '{digits}'; write {NEW}64, or another width up to 4096")
    model = Tables(len(users), len(items), width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in (model.users, model.items):
            table.weight.normal_(0, _FIRST, generator=generator)
    model.fresh = True
    return Base(model.eval(), Catalog(tuple(users), tuple(items)), name, "", 0)


def load_tables(place: str | Path) -> Base:
    """The base in a directory of tables. LorakitError names what is wrong with it."""
    folder = Path(place)
    if not (folder / NAMES).is_file() or not (folder / WEIGHTS).is_file():
        raise LorakitError(
            f"'{place}' is no directory of tables ({WEIGHTS}, {NAMES}); train one with {NEW}64 and merge that run"
        )
    names, tensors = read_json(folder / NAMES), read_tensors(folder / WEIGHTS)
    faults = [f"{WEIGHTS} lacks '{name}'" for name in ("users", "items", "bias") if name not in tensors]
    faults += [f"{NAMES} lacks '{name}'" for name in ("users", "items") if not isinstance(names.get(name), list)]
    if faults:
        raise LorakitError(f"'{place}': {listed(faults)}")
    users, items, bias = (tensors[name].float() for name in ("users", "items", "bias"))
    wanted = (len(names["users"]), len(names["items"]))
    if (len(users), len(items), len(bias)) != (*wanted, wanted[1]) or users.shape[1:] != items.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in ("users", "items", "bias"))
        raise LorakitError(f"'{place}': {NAMES} has {wanted[0]} users and {wanted[1]} items, {WEIGHTS} has {shapes}")
    model = Tables(len(users), len(items), users.shape[1])
    model.load_state_dict({"users.weight": users, "items.weight": items, "bias": bias})
    note = read_json(folder / "lorakit_task.json") if (folder / "lorakit_task.json").is_file() else {}
    try:
        seen = packed(unpacked(names.get("seen", ""), note.get("seen", "")))
    except (ValueError, zlib.error, binascii.Error) as error:
        raise LorakitError(f"'{place}': what users had is damaged ({error}); merge the run again") from None
    return Base(model.eval(), Catalog(tuple(names["users"]), tuple(names["items"]), seen), str(place), "", 0)


def scores_of_pairs(model: nn.Module, users: Tensor, items: Tensor) -> Tensor:
    """Scores `(b, m)` of users `(b,)` with items `(m,)`, by a module that gives all pairs or one for each."""
    if gives_all_pairs(model):
        scores: Tensor = model(users, items)
        return scores
    n_rows = max(1, _AT_ONCE // len(items))
    found = []
    for start in range(0, len(users), n_rows):
        part = users[start : start + n_rows]
        pairs: Tensor = model(part.repeat_interleave(len(items)), items.repeat(len(part)))
        found.append(pairs.reshape(len(part), len(items)))
    return torch.cat(found)


@torch.no_grad()
def gives_all_pairs(model: nn.Module) -> bool:
    """Does it give `(b, m)` for `b` users and `m` items? UsageError if it gives no score for each pair either."""
    if isinstance(model, Tables):
        return True
    if model in _ALL_PAIRS:
        return _ALL_PAIRS[model]
    device = next(model.parameters()).device
    few, zeros = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    try:
        found = tuple(model(few, zeros).shape) == (2, 3)
    except (RuntimeError, ValueError, IndexError, TypeError):
        found = False
    if not found:
        told = ""
        try:
            pairs = model(few, few)
            told = "" if pairs.numel() == len(few) else f"it gives {tuple(pairs.shape)}"
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            told = f"it fails: {str(error).splitlines()[0]}"
        if told:
            raise UsageError(
                f"{type(model).__name__}(users, items) must give a score for every pair, (b, m) for b users and m "
                f"items or (n,) for n of both; with 2 and 2 {told}"
            )
    _ALL_PAIRS[model] = found
    return found


def refuse_other_base(model: nn.Module, catalog: Any) -> None:
    """UsageError for a base whose embeddings do not have the catalog's rows."""
    if not isinstance(catalog, Catalog):
        raise UsageError(
            f"recommend needs the names of users and items: Base(module, Catalog(users, items), ...), not "
            f"{type(catalog).__name__}; or name a directory of tables, or {NEW}64"
        )
    sizes = [layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)]
    for noun, n in (("users", len(catalog.users)), ("items", len(catalog.items))):
        if n not in sizes:
            raise UsageError(f"no embedding of {type(model).__name__} has {n} rows for the {n} {noun} ({sizes})")
    if len(catalog.items) > _MOST_ITEMS:
        raise UsageError(f"{len(catalog.items):,} items are more than the {_MOST_ITEMS:,} that can be ranked")
    gives_all_pairs(model)


def named_tables(note: Mapping[str, Any], name: str) -> Base:
    """The base of this name, fresh again where the note knows its names."""
    if name.startswith(NEW):
        if not note.get("users"):
            raise UsageError(f"'{name}' would begin anew; name the directory of tables that this was trained on")
        return fresh_tables(name, note["users"], note["items"])
    return load_tables(name)
