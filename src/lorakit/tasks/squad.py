"""Exact match and F1 of an answer, as SQuAD's script defines them (Rajpurkar et al., 2016, 2018; evaluate-v2.0).

Case, punctuation and the words a, an, the do not count. Chinese and Japanese characters count as a word each, and their
punctuation not at all, as CMRC 2018 does; a text without such characters is treated to the letter as by SQuAD's script.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FULL_WIDTH = re.compile(r"[\u3000-\u3004\u3008-\u3020\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
_CHARACTERS = re.compile(r"([\u3040-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def normalized(text: str) -> list[str]:
    """The words that count.

    >>> normalized("The Battle of  Hastings, 1066!")
    ['battle', 'of', 'hastings', '1066']
    """
    plain = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return _CHARACTERS.sub(r" \1 ", _FULL_WIDTH.sub(" ", plain)).split()


def compared(found: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 of an answer, the best by each over all right ones; without any, "" is right."""
    right = [words for words in map(normalized, answers) if words] or [[]]
    said = normalized(found)
    return float(any(said == words for words in right)), max(_f1(said, words) for words in right)


def _f1(said: Sequence[str], words: Sequence[str]) -> float:
    if not said or not words:
        return float(said == words)
    return 2 * (Counter(said) & Counter(words)).total() / (len(said) + len(words))
