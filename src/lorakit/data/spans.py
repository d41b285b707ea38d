"""Spans that tags mark: BIO, BIOES, BILOU, BMES, or plain tags; by the rules of conlleval (Tjong Kim Sang, 2000).

With prefixes a span goes on while a B or I is followed by an I or E of the same type; everything else begins anew, so
that every sequence of tags has spans, also one that breaks the scheme. Plain tags: neighbours with the same tag are one
span, if there is an "O"; if there is none (parts of speech), every word is a span (conlleval -r).
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lorakit.errors import DataError

OUTSIDE = "O"
_PREFIXED = re.compile(r"([BIMELSU])(?:([-_])(.+))?$", re.S)
_MEANS = {"M": "I", "L": "E", "U": "S"}  # BMES and BILOU


class Place(NamedTuple):
    """Words `begin` to `end` (the first behind it), and what they are."""

    label: str
    begin: int
    end: int


def scheme_of(tags: Iterable[str]) -> str:
    """ "prefixed", "runs" or "words": how these tags, all that there are, mark spans. DataError for a mixture."""
    found = set(tags)
    odd, even = plain_and_prefixed(found)
    if odd and even:
        raise DataError(f"tag '{odd[0]}' has no prefix, and '{even[0]}' has one; write all tags in one scheme")
    return ("runs" if OUTSIDE in found else "words") if odd else "prefixed"


def plain_and_prefixed(tags: Iterable[str]) -> tuple[list[str], list[str]]:
    """The tags that cannot have a prefix, and those that cannot be without one; sorted.

    >>> plain_and_prefixed(["city", "B-city", "O", "S"])
    (['city'], ['B-city'])
    """
    found = sorted(set(tags) - {OUTSIDE})
    odd = [tag for tag in found if not _PREFIXED.match(tag)]
    return odd, [tag for tag in found if _parts(tag)[0] in ("B", "I") and _parts(tag)[2]]


def completed(tags: Iterable[str]) -> tuple[str, ...]:
    """The tags, and of every type all prefixes that other types have; sorted."""
    found = set(tags)
    if scheme_of(found) == "prefixed":
        parts = [_parts(tag) for tag in found - {OUTSIDE}]
        prefixes = {prefix for prefix, _, _ in parts}
        found |= {f"{prefix}{mark}{label}" for _, mark, label in parts for prefix in prefixes}
    return tuple(sorted(found))


def places(tags: Sequence[str], scheme: str) -> list[Place]:
    """The spans of one text, in their order.

    >>> places(["B-city", "I-city", "O", "I-day"], "prefixed")
    [Place(label='city', begin=0, end=2), Place(label='day', begin=3, end=4)]
    """
    found: list[Place] = []
    before = (OUTSIDE, "")
    for k, tag in enumerate(tags):
        now = _said(tag, scheme)
        if now[1] == before[1] and before[0] in ("B", "I") and now[0] in ("I", "E"):
            found[-1] = found[-1]._replace(end=k + 1)
        elif now[0] != OUTSIDE:
            found.append(Place(now[1], k, k + 1))
        before = now
    return found


def _said(tag: str, scheme: str) -> tuple[str, str]:
    """One of B, I, E, S, O; and the type."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if scheme != "prefixed":
        return ("I" if scheme == "runs" else "S"), tag
    prefix, _, label = _parts(tag)
    return _MEANS.get(prefix, prefix), label


def _parts(tag: str) -> tuple[str, str, str]:
    """Prefix, what stands behind it, type; each may be empty."""
    found = _PREFIXED.match(tag)
    return (found[1], found[2] or "", found[3] or "") if found else ("", "", tag)
