"""How much of what a teller says it has only learned by heart."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

NEAR = 0.9
"""From this similarity on, an answer counts as nearly a training answer."""

_NOT_WORDS = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """A text's letters and characters alone: punctuation and spaces do not make a new joke."""
    return _NOT_WORDS.sub("", text).lower()


def verbatim(answers: Sequence[str], training: Iterable[str]) -> list[bool]:
    """For each answer, whether it is a training answer word for word."""
    known = {normalised(text) for text in training}
    return [normalised(answer) in known for answer in answers]


def nearly_verbatim(answers: Sequence[str], training: Iterable[str]) -> list[bool]:
    """For each answer, whether it is a training answer, or at least `NEAR` of one.

    Similarity is difflib's: twice the characters in matching runs, over the characters of both.
    """
    known = {normalised(text) for text in training}
    return [_near(normalised(answer), known) for answer in answers]


def _near(answer: str, known: set[str]) -> bool:
    if answer in known:
        return True
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(answer)
    for text in known:
        matcher.set_seq1(text)
        # The two quick bounds spare most of the full comparisons.
        if (
            matcher.real_quick_ratio() >= NEAR
            and matcher.quick_ratio() >= NEAR
            and matcher.ratio() >= NEAR
        ):
            return True
    return False
