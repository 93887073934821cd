"""How much of what a teller says it has only learned by heart, and when a run begins to do so.

A run memorises, at an evaluation, if either
- the held-out loss has risen above its lowest by more than `RISE` of it, while the loss of the training
  records has fallen since then; or
- at least `HIGH_SHARE` of the answers to training pictures are training answers, word for word or
  nearly, and the held-out loss is at least `WIDE_GAP` above that of the training records.

The first is overfitting as it shows in the losses alone. The second needs both signs: where only few
answers are possible, a model that has understood them gives them too, and then the gap stays small.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from deadpan.data.records import normalised

NEAR = 0.9
"""From this similarity on, an answer counts as nearly a training answer."""

RISE = 0.01
"""Of the lowest held-out loss; less counts as chance."""
HIGH_SHARE = 0.5
WIDE_GAP = 0.5
"""In nats a token: the held-out answers' tokens are exp(0.5) = 1.6 times less likely."""


def verbatim(answers: Sequence[str], training: Iterable[str]) -> list[bool]:
    """For each answer, whether it is a training answer word for word."""
    known = {normalised(text) for text in training}
    return [normalised(answer) in known for answer in answers]


def nearly_verbatim(answers: Sequence[str], training: Iterable[str]) -> list[bool]:
    """For each answer, whether it is a training answer, or at least `NEAR` of one.

    Similarity is difflib's: twice the characters in matching runs, over the characters of both.
    """
    return [source is not None for source in sources(answers, training)]


def sources(answers: Sequence[str], training: Iterable[str]) -> list[str | None]:
    """For each answer, the training answer that it repeats or nearly repeats, or None.

    That is one with the same words, or else the first of which it is at least `NEAR`.
    """
    known: dict[str, str] = {}
    for text in training:
        known.setdefault(normalised(text), text)
    found = [_near(normalised(answer), known) for answer in answers]
    return [None if key is None else known[key] for key in found]


def _near(answer: str, known: Mapping[str, str]) -> str | None:
    if answer in known:
        return answer
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
            return text
    return None


@dataclass(frozen=True)
class Reading:
    """What tells whether a run memorises, at one evaluation.

    Attributes:
        step: The optimizer step.
        held_out: Mean -log p of the held-out answers' tokens, in nats.
        training: The same of training records.
        share: Nearly verbatim answers to training pictures, from 0 to 1; None if none was asked.
    """

    step: int
    held_out: float
    training: float
    share: float | None

    @property
    def gap(self) -> float:
        return self.held_out - self.training


def sign(now: Reading, best: Reading | None) -> str | None:
    """Why a run counts as memorising, in words, or None if it does not.

    Args:
        now: This evaluation.
        best: The evaluation with the lowest held-out loss before this one, if there is one.
    """
    if (
        best is not None
        and now.held_out > best.held_out * (1 + RISE)
        and now.training < best.training
    ):
        return (
            f"since step {best.step} the held-out loss has risen from {best.held_out:.3f} to "
            f"{now.held_out:.3f}, while that of training records fell from {best.training:.3f} to "
            f"{now.training:.3f}"
        )
    if now.share is not None and now.share >= HIGH_SHARE and now.gap >= WIDE_GAP:
        return (
            f"{now.share:.0%} of its answers to training pictures are training answers, and its "
            f"loss is {now.gap:.2f} higher on held-out pictures than on those"
        )
    return None
