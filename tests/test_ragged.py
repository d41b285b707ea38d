"""Rows of unlike length in one array are the rows that they were made of."""

import pytest
import torch

from lorakit.data.batches import Tokens
from lorakit.data.ragged import Ragged

ROWS = [(5, 3), (), (1,), (9, 9, 9), ()]


@pytest.mark.parametrize("kind", [int, float])
def test_rows_come_back(kind):
    rows = [tuple(kind(x) / (1 if kind is int else 2) if kind is float else x for x in row) for row in ROWS]
    found = Ragged.of(rows)
    assert list(found) == rows
    assert found[-2] == rows[3]
    assert found[1:4] == rows[1:4]
    assert found.lengths == [2, 0, 1, 3, 0] == [found.length(i) for i in range(5)]
    assert found.rows([3, 1, 0]).tolist() == [*rows[3], *rows[0]]
    assert found.rows([]).tolist() == found.rows([1, 4]).tolist() == []
    assert found.rows([0]).dtype == (torch.int64 if kind is int else torch.float32)
    assert found == Ragged.of(found)
    assert found != Ragged.of(rows[:-1])
    with pytest.raises(IndexError):
        found[5]


def test_a_float_anywhere_makes_them_all_floats_and_nothing_is_fine_too():
    found = Ragged.of([(1, 2), (3,), (0.5, 4)])
    assert list(found) == [(1.0, 2.0), (3.0,), (0.5, 4.0)]
    assert list(Ragged.of([])) == []
    assert list(Ragged.of([(), ()])) == [(), ()]


def test_texts_of_one_example_stay_together():
    pairs = Tokens(((1, 2), (3,), (4,), (5, 6, 7)), ((0,), (), (1,), ()), ((1,), (0,), (0,), (2,)), (1, 2), 0, each=2)
    assert len(pairs) == 2
    assert pairs.lengths == [3, 4]
    batch = pairs.gather([1, 0])
    assert batch.ids.tolist() == [4, 5, 6, 7, 1, 2, 3]
    assert batch.reads.tolist() == [0, 3, 5, 6]
    assert batch.labels.tolist() == [1, 0]
    assert (batch.examples, batch.texts) == ((1, 0), (2, 3, 0, 1))
    assert pairs.n_labels([0, 1]) == 2
