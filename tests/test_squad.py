"""Exact match and F1, against SQuAD's script (evaluate-v2.0.py), whose functions stand here as they are there."""

import collections
import random
import re
import string

import pytest

from lorakit.tasks.squad import compared


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def compute_f1(a_gold, a_pred):
    gold_toks, pred_toks = normalize_answer(a_gold).split(), normalize_answer(a_pred).split()
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def script(prediction, answers):
    golds = [text for text in answers if normalize_answer(text)] or [""]
    exact = max(int(normalize_answer(gold) == normalize_answer(prediction)) for gold in golds)
    return exact, max(compute_f1(gold, prediction) for gold in golds)


def test_english_is_measured_as_the_script_does():
    draw = random.Random(0)
    words = ["The", "a", "cat", "Cat's", "sat,", "on", "1,066", "mat.", "—", "an", "  ", "U.S.", "naïve"]
    for _ in range(2000):
        said = " ".join(draw.choices(words, k=draw.randint(0, 4)))
        right = [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        assert compared(said, right) == pytest.approx(script(said, right)), (said, right)


def test_chinese_is_measured_by_characters():
    assert compared("北京大学", ["《北京大学》。"]) == (1.0, 1.0)
    exact, f1 = compared("北京", ["北京大学"])
    assert (exact, f1) == (0.0, pytest.approx(2 * 1 * 0.5 / 1.5))
