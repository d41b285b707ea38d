"""The shipped messages are what their card says: complete, balanced, all different."""

import re
from collections import Counter
from itertools import combinations

from lorakit.data import load_rows, load_splits

INTENTS = 12


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def jaccard(x: set[str], y: set[str]) -> float:
    return len(x & y) / len(x | y)


def test_the_english_messages_are_split_640_160_160_with_every_intent_in_each_part():
    splits = load_splits("demo:support")
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (640, 160, 160)
    assert len(splits.labels) == INTENTS
    for part in (splits.train, splits.valid, splits.test):
        counts = Counter(part.labels)
        assert len(counts) == INTENTS
        assert max(counts.values()) - min(counts.values()) <= 1


def test_no_two_english_messages_are_near_duplicates():
    splits = load_splits("demo:support")
    texts = [text for part in (splits.train, splits.valid, splits.test) for text in part.texts]
    assert len(set(texts)) == len(texts) == 960
    bags = [words(text) for text in texts]
    nearest = max(((jaccard(x, y), i, j) for (i, x), (j, y) in combinations(enumerate(bags), 2)), default=(0, 0, 0))
    assert nearest[0] <= 0.45, (texts[nearest[1]], texts[nearest[2]])


def test_messages_do_not_come_from_templates():
    """Few messages begin alike: with templates, whole groups share their first words."""
    splits = load_splits("demo:support")
    for label in splits.labels:
        starts = Counter(
            " ".join(text.lower().split()[:3])
            for part in (splits.train, splits.valid, splits.test)
            for text, own in zip(part.texts, part.labels)
            if own == label
        )
        assert starts.most_common(1)[0][1] <= 4, (label, starts.most_common(1))


def test_the_chinese_messages_are_120_ten_of_each_intent_and_all_different():
    rows = load_rows("demo:support_zh")
    assert len(rows) == 120
    assert set(Counter(rows.labels).values()) == {10}
    assert set(rows.labels) == set(load_splits("demo:support").labels)
    pairs = [{text[i : i + 2] for i in range(len(text) - 1)} for text in rows.texts]
    assert max(jaccard(x, y) for x, y in combinations(pairs, 2)) <= 0.2
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in rows.texts)
