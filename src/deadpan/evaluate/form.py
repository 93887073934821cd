"""Is it a joke, and is it about the picture? Definitions, as code.

*Joke form.* One finished line of 4 to 60 characters that does not describe. A line describes if it speaks of the
picture as a picture (图里, 图中, 图片, 画面, 照片), or if it says that something is somewhere (左边有两只猫).
Whether it is funny, no definition decides.

*Grounded.* It names something that the picture shows, or puns on it, by a list that the records carry
(`concepts`). Names are found longest first, so 熊猫 is not 猫; a name that is part of a pun is the pun's.
"""

import re
from collections.abc import Iterable, Mapping

SHORTEST, LONGEST = 4, 60
"""Characters of a joke."""

_OF_A_PICTURE = re.compile("图里|图中|图片|画面|照片|这张图")
_SOMEWHERE = re.compile(
    "(上面|左边|中间|右边|下面|上方|下方|左侧|右侧|旁边|背景)(里|中|是|有|放|站|坐)+着?[一二两三四五六几许多]"
)
_ENDS = ("。", "？", "！", "”", "…", ".", "?", "!")


def is_description(text: str) -> bool:
    """Whether a line says what is in a picture rather than something about it."""
    return bool(_OF_A_PICTURE.search(text) or _SOMEWHERE.search(text))


def is_joke_form(text: str, finished: bool = True) -> bool:
    """Whether an answer has the form of a joke.

    Args:
        text: The answer.
        finished: Whether the model ended it, rather than the token limit.
    """
    return (
        finished
        and "\n" not in text
        and SHORTEST <= len(text) <= LONGEST
        and text.endswith(_ENDS)
        and not is_description(text)
    )


class Grounding:
    """Finds which concepts an answer names or puns on.

    Args:
        concepts: Everything that any picture of the records shows: each name with its puns.
    """

    def __init__(self, concepts: Mapping[str, Iterable[str]]) -> None:
        self._concept_of: dict[str, str] = {}
        for name, puns in concepts.items():
            for word in (name, *puns):
                self._concept_of.setdefault(word, name)
        words = sorted(self._concept_of, key=len, reverse=True)
        self._words = re.compile("|".join(map(re.escape, words))) if words else None

    def named(self, text: str) -> set[str]:
        """The concepts that a text names or puns on."""
        if self._words is None:
            return set()
        return {self._concept_of[word] for word in self._words.findall(text)}

    def is_grounded(self, text: str, pictured: Iterable[str]) -> bool:
        """Whether a text is about something that the picture shows."""
        return not self.named(text).isdisjoint(pictured)
