"""Interactions with a planted taste: groups of users like groups of items; elsewhere they like others."""

from pathlib import Path

import torch

N_USERS, N_ITEMS, N_GROUPS = 60, 80, 4


def draw_taste(seed: int = 0, shift: int = 0, each: int = 12, users: int = N_USERS) -> list[tuple[str, str, int]]:
    """Users, items and times. Group g of the users takes most of its items from group `g + shift` of the items, the
    first of a group more often than its last."""
    generator = torch.Generator().manual_seed(seed)
    size = N_ITEMS // N_GROUPS
    inside = torch.arange(size).float().mul(-0.12).exp()
    rows: list[tuple[str, str, int]] = []
    for user in range(users):
        weights = torch.full((N_GROUPS, size), 0.01)
        weights[(user + shift) % N_GROUPS] += inside
        picks = torch.multinomial(weights.flatten(), each, replacement=False, generator=generator)
        picks = picks[torch.randperm(each, generator=generator)]
        rows += [(f"u{user}", f"i{int(item)}", time) for time, item in enumerate(picks)]
    return rows


def taste_table(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    """A CSV file of them, its rows in no order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7)).tolist()
    lines = [",".join(map(str, rows[i])) for i in order]
    path.write_text("\n".join(["userId,movieId,timestamp", *lines]) + "\n", encoding="utf-8")
    return path
