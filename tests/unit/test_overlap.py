"""Batches of the builtin engine that are read while the ones before are answered: the same answers, in turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import Turn
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.errors import DeadpanError

GREEDY = GenerationSettings(max_new_tokens=10)
DRAWN = GenerationSettings(max_new_tokens=10, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(tiny, device="cpu")


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """Seven questions; the same one in several batches, and twice in one."""
    images = [Image.open(path).convert("RGB") for path in pictures]
    first = Request([images[0]], [Turn("human", "<image>\n讲一个脑洞大开的梗")])
    many = Request([images[3]], [Turn("human", "<image>\nWhy?")])
    return [
        first,
        Request([], [Turn("human", "Tell me a joke.")]),
        many,
        first,
        many,
        many,
        Request(images[1:3], [Turn("human", "<image> and <image>?")]),
    ]


def order(engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which decoder reads and steps, from now on."""
    calls: list[str] = []
    for name, decoder in (("a", engine._decoder), ("b", engine._beside)):
        for does in ("begin", "step"):

            def call(*arguments: Any, does: str = does, name: str = name, of: Any = decoder) -> Any:
                calls.append(f"{does} {name}")
                found = getattr(type(of), does)(of, *arguments)
                calls.append(f"{does} {name} ended")
                return found

            monkeypatch.setattr(decoder, does, call)
    return calls


@pytest.mark.parametrize("settings", [GREEDY, DRAWN])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_answers_are_those_of_one_batch(
    loaded: Loaded, requests: list[Request], settings: GenerationSettings, size: int
) -> None:
    together = BuiltinEngine(loaded).generate(requests, settings)
    engine = BuiltinEngine(loaded, size, overlap=True)
    assert engine.generate(requests, settings) == together
    # And again, over caches that have been used.
    assert engine.generate(requests[::-1], GREEDY) == engine.generate(requests, GREEDY)[::-1]


def test_a_batch_is_read_before_the_one_before_has_ended(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded, 3, overlap=True)
    calls = order(engine, monkeypatch)
    engine.generate(requests, GREEDY)
    begun = [call for call in calls if call.startswith("begin") and not call.endswith("ended")]
    assert begun == ["begin a", "begin b", "begin a"]
    assert calls.count("step a") == 2 * calls.count("step b") == 2 * (GREEDY.max_new_tokens - 1)
    # Some steps while the next batch is read, the others before the one after that.
    first, second = calls.index("begin b"), calls.index("begin b ended")
    assert first < calls.index("step a") < second
    third, end = calls.index("begin a", second), calls.index("begin a ended", second)
    assert calls[:third].count("step a") == GREEDY.max_new_tokens - 1
    assert third < calls.index("step b") < end


def test_one_batch_alone_and_an_engine_that_is_told_so_take_one_cache(
    loaded: Loaded, requests: list[Request]
) -> None:
    for engine, asked in (
        (BuiltinEngine(loaded, overlap=True), requests),
        (BuiltinEngine(loaded, 2, overlap=False), requests),
        (BuiltinEngine(loaded, 2), requests),  # a CPU gains nothing
    ):
        engine.generate(asked, GREEDY)
        assert engine._decoder is not None
        assert engine._beside is not None
        assert engine._decoder._cache
        assert not engine._beside._cache


@pytest.mark.parametrize("stops", [0, 2, 6])
def test_a_batch_that_ends_early_ends_alone(
    loaded: Loaded, requests: list[Request], stops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BuiltinEngine(loaded, 1, overlap=False)
    (prompt,) = whole._prompts([requests[stops]])
    whole._cut(prompt)
    ids = [token for (token,) in whole._tokens([prompt], GREEDY, torch.empty(1, 0))]
    place = next(i for i in range(2, 10) if ids[i] not in ids[:i])
    monkeypatch.setattr(loaded.processor, "stop_id", ids[place])
    engine = BuiltinEngine(loaded, 1, overlap=True)
    calls = order(engine, monkeypatch)
    jokes = engine.generate(requests, GREEDY)
    assert (jokes[stops].tokens, jokes[stops].finish_reason) == (place + 1, "stop")
    assert jokes == whole.generate(requests, GREEDY)
    # No more is computed than was on its way.
    assert calls.count("step a") + calls.count("step b") <= 4 * len(jokes) + sum(
        joke.tokens - 1 for joke in jokes
    )


def test_several_calls_at_once_are_each_what_it_is_alone(
    loaded: Loaded, requests: list[Request]
) -> None:
    other = GenerationSettings(max_new_tokens=4, temperature=1.5, seed=9)
    asked: list[tuple[Sequence[Request], GenerationSettings]] = [
        (requests[:3], DRAWN),
        ([], DRAWN),
        (requests[3:], other),
        (requests[:1], GREEDY),
    ]
    alone = [BuiltinEngine(loaded).generate(*each) for each in asked]
    for overlap in (True, False):
        engine = BuiltinEngine(loaded, 2, overlap=overlap)
        assert list(engine.generate_each(iter(asked))) == alone
        # A reader that has had enough leaves the engine as good as new.
        each = engine.generate_each(asked)
        assert next(each) == alone[0]
        each.close()
        assert engine.generate(*asked[2]) == alone[2]


@pytest.mark.parametrize(("overlap", "reads"), [(True, "abaa"), (False, "aaaa")])
def test_a_call_may_come_while_the_last_is_answered(
    loaded: Loaded,
    requests: list[Request],
    overlap: bool,
    reads: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = [requests[i : i + 2] for i in (0, 2, 4, 0)]
    alone = [BuiltinEngine(loaded).generate(part, GREEDY) for part in parts]
    engine = BuiltinEngine(loaded, overlap=overlap)
    calls = order(engine, monkeypatch)
    told: list[Any] = []

    def asked() -> Iterator[tuple[list[Request], GenerationSettings] | None]:
        for part, steps in zip(parts[:3], (0, 3, 1), strict=True):
            yield from [None] * steps
            yield part, GREEDY
        while len(told) < 3:
            yield None  # nothing more comes until all is told
        yield parts[3], GREEDY

    for jokes in engine.generate_each(asked()):
        told.append(jokes)
    assert told == alone
    assert "".join(call[-1] for call in calls if call in ("begin a", "begin b")) == reads


def test_a_picture_that_fails_fails_alone(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded, 2, kept_bytes=0, overlap=True)
    expected = engine.generate(requests, GREEDY)
    cut = engine._features._cut

    def failing(image: Image.Image, pictures: int) -> Any:
        if image is requests[2].images[0]:
            raise DeadpanError("no picture")
        return cut(image, pictures)

    monkeypatch.setattr(engine._features, "_cut", failing)
    with pytest.raises(DeadpanError, match="no picture"):
        engine.generate(requests, GREEDY)
    monkeypatch.undo()
    assert engine.generate(requests, GREEDY) == expected


@pytest.mark.parametrize(("room", "sizes", "begun"), [(4, [2], "ab"), (3, [2], "a"), (1, [1], "a")])
def test_two_caches_only_where_both_have_room(
    loaded: Loaded,
    requests: list[Request],
    room: int,
    sizes: list[int],
    begun: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = BuiltinEngine(loaded, 2, overlap=True)
    expected = engine.generate(requests, GREEDY)
    for decoder in (engine._decoder, engine._beside):
        monkeypatch.setattr(decoder, "room", lambda *_: room)
    calls = order(engine, monkeypatch)
    batches = engine._batches([(requests, GREEDY)])
    assert {len(batch.prompts) for batch in list(batches)[:-1] if batch} == set(sizes)
    assert engine.generate(requests, GREEDY) == expected
    assert {call.split()[1] for call in calls} == set(begun)


def test_a_batch_that_wants_all_the_memory_gets_it(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded, 2, overlap=True)
    expected = engine.generate(requests, GREEDY)
    assert engine._decoder is not None
    assert engine._beside is not None
    assert engine._beside._cache
    # Three rows in all, of which the second cache holds two.
    beside = engine._beside
    monkeypatch.setattr(
        engine._decoder, "room", lambda _, other=None: 3 if other or not beside._cache else 1
    )
    monkeypatch.setattr(beside, "room", lambda *_: 2)
    assert engine.generate(requests, GREEDY) == expected
    assert not beside._cache
