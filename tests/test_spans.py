"""Spans of tags, against the rules of conlleval as its script and seqeval write them out."""

import random

import pytest

from lorakit.data.spans import completed, places, scheme_of
from lorakit.errors import DataError


def ends(before, tag, type_before, kind):
    """seqeval's end_of_chunk, which is conlleval's with E and S."""
    return (
        before in ("E", "S")
        or (before in ("B", "I") and tag in ("B", "S", "O"))
        or (before != "O" and type_before != kind)
    )


def begins(before, tag, type_before, kind):
    """seqeval's start_of_chunk."""
    return (
        tag in ("B", "S") or (before in ("E", "S", "O") and tag in ("E", "I")) or (tag != "O" and type_before != kind)
    )


def chunks(tags):
    """The loop of conlleval."""
    found, begin, before, type_before = [], 0, "O", ""
    for k, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if ends(before, prefix, type_before, kind):
            found.append((type_before, begin, k))
        if begins(before, prefix, type_before, kind):
            begin = k
        before, type_before = prefix, kind
    return found


@pytest.mark.parametrize("prefixes", ["BI", "BIES"])
def test_spans_are_those_of_conlleval_also_where_tags_break_the_scheme(prefixes):
    draw = random.Random(0)
    known = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("x", "y"))]
    for _ in range(3000):
        tags = draw.choices(known, k=draw.randint(1, 7))
        assert [tuple(place) for place in places(tags, "prefixed")] == chunks(tags), tags


def test_other_schemes_say_the_same_in_other_letters():
    assert places(["B-x", "M-x", "E-x", "S-y"], "prefixed") == places(["B-x", "I-x", "L-x", "U-y"], "prefixed")
    assert places(["B", "M", "E", "S", "O"], "prefixed") == [("", 0, 3), ("", 3, 4)]
    assert places(["B_LOC", "I_LOC"], "prefixed") == [("LOC", 0, 2)]


def test_plain_tags_run_on_where_there_is_an_outside_and_stand_alone_where_there_is_none():
    assert scheme_of(["LOC", "O", "PER"]) == "runs"
    assert places(["LOC", "LOC", "PER", "O", "LOC"], "runs") == [("LOC", 0, 2), ("PER", 2, 3), ("LOC", 4, 5)]
    assert scheme_of(["NN", "VB"]) == "words"
    assert places(["NN", "NN", "VB"], "words") == [("NN", 0, 1), ("NN", 1, 2), ("VB", 2, 3)]


def test_a_type_gets_every_prefix_and_a_mixture_is_refused():
    assert completed(["O", "B-x", "B-y", "I-y"]) == ("B-x", "B-y", "I-x", "I-y", "O")
    assert completed(["NN", "VB"]) == ("NN", "VB")
    with pytest.raises(DataError, match="'LOC' has no prefix, and 'B-LOC' has one"):
        scheme_of(["O", "B-LOC", "LOC"])
