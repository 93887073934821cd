"""Many askers, one engine: what is batched, refused, dropped and finished."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, cast

import pytest
from PIL import Image

from deadpan.data.records import Turn
from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.serve.tellers import (
    AnswerTimeout,
    QueueFull,
    ShuttingDown,
    Tellers,
    UnknownTeller,
)
from echo import Echo

GREEDY = GenerationSettings()
SEEDED = GenerationSettings(temperature=1.0, seed=1)
DOT = Image.new("RGB", (1, 1))


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


async def begun(engine: Echo) -> None:
    assert await asyncio.to_thread(engine.begun.wait, 30)


async def asked(tellers: Tellers, engine: Echo, *prompts: str) -> list[asyncio.Task[list[str]]]:
    """The first question is in the engine, the others wait."""
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(tellers.tell("echo", [], prompt, GREEDY)))
        await begun(engine)
    await asyncio.sleep(0)
    return tasks


def test_what_waits_together_is_one_batch_in_one_thread() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine}, batch_size=2)
        tasks = await asked(tellers, engine, "a", "b", "c", "d")
        engine.let.set()
        assert await asyncio.gather(*tasks) == [["a/0"], ["b/0"], ["c/0"], ["d/0"]]
        assert engine.batches == [["a"], ["b", "c"], ["d"]]
        await tellers.close()
        assert len(engine.threads) == 1
        assert engine.closed

    run(story())


def test_a_seeded_answer_has_no_neighbours() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        first = await asked(tellers, engine, "a")
        drawn = [asyncio.create_task(tellers.tell("echo", [], p, SEEDED)) for p in "bc"]
        await asyncio.sleep(0)
        engine.let.set()
        await asyncio.gather(*first, *drawn)
        assert engine.batches == [["a"], ["b"], ["c"]]

    run(story())


def test_a_joke_for_each_picture() -> None:
    async def story() -> None:
        engine = Echo()
        engine.let.set()
        tellers = Tellers({"echo": engine})
        assert tellers.names() == ["echo"]
        assert await tellers.tell("echo", [DOT, DOT], "q", GREEDY) == ["q/1", "q/1"]

    run(story())


def test_a_mistake_costs_its_asker_alone_an_answer() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        tasks = await asked(tellers, engine, "a", "b", "bad", "c")
        engine.let.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answers[0], answers[1], answers[3]] == [["a/0"], ["b/0"], ["c/0"]]
        assert str(answers[2]) == "bad question"

    run(story())


def test_what_goes_wrong_in_an_engine_is_its_askers_to_see() -> None:
    class Gone(Echo):
        def generate(self, *_: Any) -> Any:
            raise RuntimeError("the device is lost")

    async def story() -> None:
        tellers = Tellers({"echo": Gone()})
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the device is lost"):
                await tellers.tell("echo", [], "a", GREEDY)
        await tellers.close()

    run(story())


def test_refusals_have_types() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine}, queue_limit=1, timeout=0.2)
        with pytest.raises(UnknownTeller, match="no teller 'ecko'"):
            await tellers.tell("ecko", [], "a", GREEDY)
        running, waiting = await asked(tellers, engine, "a", "b")
        with pytest.raises(QueueFull):
            await tellers.tell("echo", [], "c", GREEDY)
        for task in (running, waiting):
            with pytest.raises(AnswerTimeout):
                await task
        engine.let.set()
        await tellers.close()
        assert engine.batches == [["a"]]  # nobody waited for b any more
        with pytest.raises(ShuttingDown):
            await tellers.tell("echo", [], "d", GREEDY)

    run(story())


def test_closing_answers_what_has_been_asked() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        tasks = await asked(tellers, engine, "a", "b")
        closing = asyncio.create_task(tellers.close())
        await asyncio.sleep(0.05)
        assert not engine.closed
        engine.let.set()
        assert await asyncio.gather(*tasks) == [["a/0"], ["b/0"]]
        await closing
        assert engine.closed

    run(story())


def test_a_stream_comes_in_pieces_and_ends_when_its_reader_leaves() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        pieces = cast("AsyncGenerator[str]", tellers.stream("echo", [], "abc", GREEDY))
        assert await anext(pieces) == "a"  # while the engine is still held up
        await pieces.aclose()
        engine.let.set()
        assert [piece async for piece in tellers.stream("echo", [], "xy", GREEDY)] == ["x", "y"]
        # It may have begun with the next piece before it heard that nobody listens.
        assert [batch for batch in engine.batches if batch != ["b"]] == [["a"], ["x"], ["y"]]
        whole = [
            piece
            async for piece in tellers.pieces("echo", Request([], [Turn("human", "z")]), GREEDY)
        ]
        assert whole == ["z", Joke("z", 1, 1, "stop")]

    run(story())


def test_an_engine_begins_with_what_waits_and_equal_requests_stay_one() -> None:
    async def scenario() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        first = await asked(tellers, engine, "first")
        question = Request([DOT], [Turn("human", "several")])
        several = asyncio.create_task(tellers.ask("echo", [question] * 3, GREEDY))
        await asyncio.sleep(0)
        assert (engine.prepared, len(engine.requests)) == (2, 1)
        engine.let.set()
        await asyncio.gather(*first, several)
        assert [request.prepared for request in engine.requests] == [1, 2, 2, 2]
        await tellers.close()

    run(scenario())
