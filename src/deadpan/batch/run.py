"""Ask an engine about many pictures, in one process or several.

The questions are cut into batches by their place in the input, whatever has been told already, and a
batch draws from a seed of its own. So a batch that was killed halfway is asked again as a whole, its
missing answers are what they would have been, and the file does not depend on kills or, on equal
machines, on the number of processes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deadpan.batch.jokes import Broken, Jokes, Writer
from deadpan.batch.pictures import Item
from deadpan.engines.base import Engine, GenerationSettings, Request
from deadpan.errors import DeadpanError
from deadpan.train.processes import Processes

_SEED_STRIDE = 1_000_003
"""Keeps the batches' seeds apart from those of runs with neighbouring seeds."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """How a batch ended.

    Attributes:
        told: Pictures that the file has answers to.
        new: Those of them that this run has added.
        broken: Pictures that could not be opened.
        listed: The file that names these.
    """

    told: int
    new: int
    broken: Sequence[Broken]
    listed: Path


def tell_all(
    items: Sequence[Item],
    engine_of: Callable[[], Engine],
    out: Path,
    settings: GenerationSettings,
    decisive: dict[str, Any],
    processes: Processes,
    n: int = 1,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Summary:
    """Tell jokes about pictures into a file, going on where an earlier run was stopped.

    Args:
        items: What to ask.
        engine_of: Loads the engine; not called if nothing is left to ask.
        out: The file, JSON lines.
        settings: How answers are drawn.
        decisive: What else decides the answers, such as the model's weights; a file keeps to one kind.
        processes: This process among those that share the work.
        n: Answers a picture.
        batch_size: Pictures given to the engine at once.
        progress: Called with the number of this process's pictures that are done and their total.

    Raises:
        DeadpanError: If the file was made with other settings, cannot be written, or every picture
            is broken.
    """

    def begin() -> tuple[Jokes, GenerationSettings, set[str]]:
        drawn = settings
        if settings.temperature == 0:
            drawn = replace(settings, seed=None)
        elif settings.seed is None:
            # A run that goes on draws on.
            before = Jokes(out, {}).chosen("seed")
            drawn = replace(settings, seed=random.SystemRandom().getrandbits(32))
            drawn = drawn if before is None else replace(drawn, seed=before)
        jokes = Jokes(out, {**decisive, "n": n, **vars(drawn)})
        return jokes, drawn, jokes.open()

    jokes, settings, done = processes.lead(begin)
    batches = [
        (number, items[start : start + batch_size])
        for number, start in enumerate(range(0, len(items), batch_size))
        if any(item.id not in done for item in items[start : start + batch_size])
    ]
    share = batches[processes.rank :: processes.world]

    def work() -> tuple[int, list[Broken]]:
        broken: list[Broken] = []
        with jokes.writer(processes.rank, processes.world) as writer:
            new = _tell(share, engine_of, settings, n, done, writer, broken, progress)
        return new, broken

    results = processes.gather(processes.together(work))
    broken = [each for _, of_rank in results for each in of_rank]
    told = processes.lead(lambda: jokes.close(items, broken))
    if len(broken) == len(items):
        raise DeadpanError(
            "None of the pictures can be opened.",
            where=jokes.broken,
            found=broken[0].error,
        )
    return Summary(told, sum(new for new, _ in results), broken, jokes.broken)


def _tell(
    batches: Sequence[tuple[int, Sequence[Item]]],
    engine_of: Callable[[], Engine],
    settings: GenerationSettings,
    n: int,
    done: set[str],
    writer: Writer,
    broken: list[Broken],
    progress: Progress | None,
) -> int:
    """Ask one process's batches; returns the pictures told."""
    new, seen, total = 0, 0, sum(len(batch) for _, batch in batches)
    engine: Engine | None = None

    def prepared(request: Request) -> Request:
        return request if engine is None else engine.prepare(request)

    for number, asked, opened in _opened(batches, prepared):
        broken += [Broken(item, why) for item, why in opened if isinstance(why, str)]
        whole = [(item, request) for item, request in opened if isinstance(request, Request)]
        # A batch of which only broken pictures are left untold needs no answers.
        if any(item.id not in done for item, _ in whole):
            engine = engine or engine_of()
            requests = [request for _, request in whole for _ in range(n)]
            answers = engine.generate(requests, _seeded(settings, number))
            for place, (item, _) in enumerate(whole):
                if item.id not in done:
                    told = answers[place * n : (place + 1) * n]
                    writer.write(
                        item, [joke.text for joke in told], [joke.finish_reason for joke in told]
                    )
                    new += 1
        seen += len(asked)
        if progress is not None:
            progress(seen, total)
    return new


def _opened(
    batches: Sequence[tuple[int, Sequence[Item]]], prepared: Callable[[Request], Request]
) -> Iterator[tuple[int, Sequence[Item], list[tuple[Item, Request | str]]]]:
    """The batches with their questions, or why there is none; the next one's are made while this one is asked."""

    def opened(item: Item) -> Request | str:
        try:
            images = item.open()
        except DeadpanError as error:
            return f"{error.what} ({error.where})"
        return prepared(item.request(images))

    with ThreadPoolExecutor() as pool:
        ahead = [[pool.submit(opened, item) for item in batch] for _, batch in batches[:1]]
        for place, (number, batch) in enumerate(batches):
            futures = ahead.pop()
            if place + 1 < len(batches):
                ahead.append([pool.submit(opened, item) for item in batches[place + 1][1]])
            found = [future.result() for future in futures]
            yield number, batch, list(zip(batch, found, strict=True))


def _seeded(settings: GenerationSettings, batch: int) -> GenerationSettings:
    if settings.seed is None:
        return settings
    return replace(settings, seed=(settings.seed * _SEED_STRIDE + batch) % 2**63)
