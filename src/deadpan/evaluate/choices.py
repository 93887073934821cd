"""CLoT's questions with given options: which is an answer to the picture, and which answer is liked more?

Of the tasks of CLoT (arXiv 2312.02439), mTn offers m options of which n are answers that people gave, and
the ranking task offers five answers to be put in the order of their likes. There a model is asked in words; here the
options are scored by their likelihood, so that a small teller can be asked too. The wrong options are, as far as
the data carry them:

- a caption of the picture, where captions are given: what a describing model said about it;
- answers to other pictures, never one that is also an answer to this picture nor, where the records say what is
  pictured, one to a picture that shows something of the same.

The options of 2T1, 3T1 and 4T1 are nested: each adds a wrong one. Questions are kept in a file with a checksum, so that
every teller meets the same ones.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

from deadpan.data.records import Record, Turn, normalised
from deadpan.errors import DeadpanError, writing
from deadpan.evaluate.statistics import Items, chance_ndcg, ndcg

RANKING = "ranking"
TASKS = {"2T1": (2, 1), "3T1": (3, 1), "4T1": (4, 1), "5T2": (5, 2)}
"""For each choice task, how many options there are and how many of them are right."""
_RANKED = 5
_WRONG = 3
_TRIES = 200

Context = tuple[tuple[str, ...], tuple[Turn, ...]]
"""What is asked: the pictures' paths as the records write them, and the conversation up to its last question."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question with its options.

    Attributes:
        task: Of `TASKS`, or "ranking".
        images: The pictures' paths, as the records write them.
        turns: The conversation up to its last question.
        options: The options, shuffled.
        origins: Where each option is from: "answer", "caption" or "other picture".
        stars: The likes of each option of a ranking; empty for a choice.
    """

    task: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    options: tuple[str, ...]
    origins: tuple[str, ...]
    stars: tuple[int, ...] = ()

    @property
    def context(self) -> Context:
        """What is asked."""
        return self.images, self.turns


@dataclass(frozen=True)
class QuestionSet:
    """Questions on one file of records.

    Attributes:
        questions: All of them, in the order of the records.
        skipped: For each task without questions, what the records lack.
        seed: What they were drawn with.
    """

    questions: tuple[ChoiceQuestion, ...]
    skipped: Mapping[str, str]
    seed: int

    @property
    def sha256(self) -> str:
        """The checksum of the questions: tellers with equal ones met the same questions."""
        return hashlib.sha256(self._lines().encode()).hexdigest()

    def _lines(self) -> str:
        return "".join(
            json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in self.questions
        )

    def write(self, path: Path) -> None:
        """Write JSON lines: what they are first, then a question a line.

        Raises:
            DeadpanError: If the file cannot be written.
        """
        head = {"seed": self.seed, "skipped": dict(self.skipped), "sha256": self.sha256}
        with writing("questions", path):
            path.write_text(json.dumps(head, ensure_ascii=False) + "\n" + self._lines(), "utf-8")


def read(path: Path) -> QuestionSet:
    """Read questions back.

    Raises:
        DeadpanError: If the file is not one of questions, or has been changed.
    """
    try:
        # Not splitlines, which would also cut at U+2028, as a joke may hold it.
        head, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        about = json.loads(head)
        found = QuestionSet(
            tuple(_question(json.loads(line)) for line in lines), about["skipped"], about["seed"]
        )
        expected = about["sha256"]
    except OSError as error:
        raise DeadpanError(
            f"The file of questions cannot be read: {error.strerror}.", where=path
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DeadpanError(
            "The file does not hold questions.",
            where=path,
            expected="what deadpan evaluate wrote with --questions-out",
        ) from None
    if found.sha256 != expected:
        raise DeadpanError(
            "The questions are not those that were written.",
            where=path,
            expected=f"sha256 {expected[:12]}...",
            found=f"sha256 {found.sha256[:12]}...",
            fix="make them anew: leave --questions out and pass --questions-out",
        )
    return found


def _question(value: dict[str, Any]) -> ChoiceQuestion:
    return ChoiceQuestion(
        value["task"],
        tuple(value["images"]),
        tuple(Turn(turn["role"], turn["text"]) for turn in value["turns"]),
        tuple(value["options"]),
        tuple(value["origins"]),
        tuple(value["stars"]),
    )


@dataclass(frozen=True)
class _Group:
    """All that is known about one context."""

    context: Context
    answers: Mapping[str, tuple[str, int | None]]
    concepts: frozenset[str]

    def is_like(self, other: "_Group") -> bool:
        return self.context[0] == other.context[0] and bool(self.context[0])


def draw(
    records: Sequence[Record], captions: Mapping[str, str] | None = None, seed: int = 0
) -> QuestionSet:
    """Draw one question of each task for each picture, as far as the records carry it.

    Args:
        records: Held-out records.
        captions: A description of each picture, by its path as the records write it.
        seed: Decides which answers are taken and how options are shuffled.
    """
    groups = _groups(records)
    questions: list[ChoiceQuestion] = []
    for group in groups:
        # Seeded by the group itself, so that other records do not move what is drawn here from its own answers.
        dice = random.Random(f"{seed} {group.context!r}")
        questions += _choices(group, groups, captions or {}, dice)
        ranking = _ranking(group, dice)
        if ranking is not None:
            questions.append(ranking)
    return QuestionSet(tuple(questions), _skipped(questions, groups), seed)


def _groups(records: Sequence[Record]) -> list[_Group]:
    by_context: dict[Context, list[Record]] = {}
    for record in records:
        by_context.setdefault((record.images, record.turns[:-1]), []).append(record)
    groups = []
    for context, same in by_context.items():
        answers: dict[str, tuple[str, int | None]] = {}
        for record in same:
            text = record.turns[-1].text.strip()
            answers.setdefault(normalised(text) or text, (text, record.stars))
        concepts = frozenset(name for record in same for name in record.concepts)
        groups.append(_Group(context, answers, concepts))
    return groups


def _choices(
    group: _Group, groups: Sequence[_Group], captions: Mapping[str, str], dice: random.Random
) -> list[ChoiceQuestion]:
    right = [text for text, _ in group.answers.values()]
    dice.shuffle(right)
    wrong = _wrong(group, groups, captions, dice)
    questions = []
    for task, (options, correct) in TASKS.items():
        if len(right) < correct or len(wrong) < options - correct:
            continue
        offered = [(text, "answer") for text in right[:correct]] + wrong[: options - correct]
        dice.shuffle(offered)
        texts, origins = zip(*offered, strict=True)
        questions.append(ChoiceQuestion(task, *group.context, texts, origins))
    return questions


def _wrong(
    group: _Group, groups: Sequence[_Group], captions: Mapping[str, str], dice: random.Random
) -> list[tuple[str, str]]:
    images = group.context[0]
    caption = captions.get(images[0], "").strip() if images else ""
    taken = set(group.answers)
    wrong: list[tuple[str, str]] = []
    if caption and normalised(caption) not in taken:
        wrong.append((caption, "caption"))
        taken.add(normalised(caption))
    order = dice.sample(range(len(groups)), min(len(groups), _TRIES))
    for other in (groups[index] for index in order):
        if len(wrong) == _WRONG:
            break
        if other is group or group.is_like(other) or not group.concepts.isdisjoint(other.concepts):
            continue
        key = dice.choice(sorted(other.answers))
        if key not in taken:
            wrong.append((other.answers[key][0], "other picture"))
            taken.add(key)
    return wrong


def _ranking(group: _Group, dice: random.Random) -> ChoiceQuestion | None:
    liked = [(text, stars) for text, stars in group.answers.values() if stars is not None]
    if len(liked) < _RANKED or len({stars for _, stars in liked}) < 2:
        return None
    dice.shuffle(liked)
    drawn, rest = liked[:_RANKED], liked[_RANKED:]
    if len({stars for _, stars in drawn}) == 1:
        # Five that are liked equally have no order: one of them makes room for one that is not.
        drawn[0] = next(one for one in rest if one[1] != drawn[0][1])
        dice.shuffle(drawn)
    texts, stars = zip(*drawn, strict=True)
    return ChoiceQuestion(RANKING, *group.context, texts, ("answer",) * _RANKED, stars)


def _skipped(questions: Sequence[ChoiceQuestion], groups: Sequence[_Group]) -> dict[str, str]:
    asked = {question.task for question in questions}
    skipped = {}
    for task, (options, correct) in TASKS.items():
        if task not in asked:
            several = any(len(group.answers) >= correct for group in groups)
            skipped[task] = (
                f"there are not {options - correct} answers to other pictures to offer beside"
                if several
                else f"no picture has {correct} answers"
            )
    if RANKING not in asked:
        stars = any(s is not None for group in groups for _, s in group.answers.values())
        skipped[RANKING] = (
            f"no picture has {_RANKED} answers whose stars are known and differ"
            if stars
            else "the records have no stars"
        )
    return skipped


def results(
    questions: Sequence[ChoiceQuestion], scores: Mapping[Context, Mapping[str, float]]
) -> list[Items]:
    """Judge a teller's likelihoods.

    An option is scored by its summed log-probability, and by that over its characters, which does not favour short
    ones (the two accuracies of EleutherAI's lm-evaluation-harness, acc and acc_norm).

    Args:
        questions: Of one file.
        scores: For each context, log p of each option, in nats.

    Returns:
        For each task that has questions, its measures by either score; an item a question.
    """
    found = []
    for per_character in (False, True):
        suffix = ", per character" if per_character else ""
        for task, (options, correct) in TASKS.items():
            asked = [question for question in questions if question.task == task]
            if asked:
                right = [
                    float(all(question.origins[place] == "answer" for place in order[:correct]))
                    for question, order in _ordered(asked, scores, per_character)
                ]
                chance = 1 / comb(options, correct)
                found.append(
                    Items(f"{task} accuracy{suffix}", right, _names(asked), None, chance, "share")
                )
        ranked = [question for question in questions if question.task == RANKING]
        if ranked:
            orders = list(_ordered(ranked, scores, per_character))
            gains = [ndcg([question.stars[place] for place in order]) for question, order in orders]
            guess = sum(chance_ndcg(q.stars) for q in ranked) / len(ranked)
            found.append(Items(f"ranking NDCG{suffix}", gains, _names(ranked), None, guess))
            top = [float(q.stars[order[0]] == max(q.stars)) for q, order in orders]
            guess = sum(q.stars.count(max(q.stars)) / len(q.stars) for q in ranked) / len(ranked)
            found.append(Items(f"ranking top-1{suffix}", top, _names(ranked), None, guess, "share"))
    return found


def _ordered(
    questions: Sequence[ChoiceQuestion],
    scores: Mapping[Context, Mapping[str, float]],
    per_character: bool,
) -> list[tuple[ChoiceQuestion, list[int]]]:
    """Each question with the places of its options, likeliest first; they were shuffled, so ties fall by chance."""
    ordered = []
    for question in questions:
        known = scores[question.context]
        values = [known[text] / (len(text) if per_character else 1) for text in question.options]
        ordered.append((question, sorted(range(len(values)), key=values.__getitem__, reverse=True)))
    return ordered


def _names(questions: Sequence[ChoiceQuestion]) -> list[str]:
    return [picture_name(question.images, question.turns) for question in questions]


def picture_name(images: Sequence[object], turns: Sequence[Turn]) -> str:
    """What items about the same pictures have in common; without pictures, the question."""
    return " ".join(map(str, images)) or turns[-1].text
