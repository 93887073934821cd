from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import Turn
from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.errors import DeadpanError
from deadpan.models.answer_loss import AnswerLoss
from deadpan.processing.collate import collate

GREEDY = GenerationSettings(max_new_tokens=12)
DRAWN = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=7)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(tiny)


@pytest.fixture(scope="module")
def engine(loaded: Loaded) -> BuiltinEngine:
    return BuiltinEngine(loaded)


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """Prompts of very different lengths: no picture, one tile, many tiles, two pictures, a history."""
    images = [Image.open(path).convert("RGB") for path in pictures]
    history = [
        Turn("human", "<image>\n一只猫。"),
        Turn("gpt", "冷得像周一。"),
        Turn("human", "Why?"),
    ]
    pair = [Turn("human", "<image> and <image>: which is funnier?")]
    return [
        Request([], [Turn("human", "Tell me a joke.")]),
        Request([images[0]], [Turn("human", "<image>\n讲一个脑洞大开的梗")]),
        Request([images[3]], [Turn("human", "<image>\nWhat is this picture about?")]),
        Request(images[1:3], pair),
        Request([images[2]], history),
    ]


def ask(loaded: Loaded, request: Request, **arguments: Any) -> list[int]:
    """The new tokens, by transformers' own generation."""
    inputs = loaded.processor(request.images, request.turns)
    arguments = {"max_new_tokens": 12, "do_sample": False, **arguments}
    output = loaded.model.generate(**inputs, **arguments)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected(loaded: Loaded, requests: list[Request]) -> list[Joke]:
    """Greedy answers, each request for itself."""
    answers = [ask(loaded, request) for request in requests]
    lengths = [len(loaded.processor(r.images, r.turns)["input_ids"][0]) for r in requests]
    assert len(set(lengths)) == len(requests)
    return [
        Joke(loaded.processor.decode(ids), length, len(ids), "length")
        for ids, length in zip(answers, lengths, strict=True)
    ]


def test_transformers_generation_is_the_likeliest_token_again_and_again(
    loaded: Loaded, requests: list[Request]
) -> None:
    """Without a cache: a wrong position or a stale cache would show here."""
    inputs = loaded.processor(requests[2].images, requests[2].turns)
    start = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        for _ in range(8):
            likeliest = loaded.model(**inputs).logits[:, -1:].argmax(dim=-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], likeliest], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert ask(loaded, requests[2])[:8] == inputs["input_ids"][0, start:].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_answers_are_transformers_own_alone_and_in_a_batch(
    loaded: Loaded, requests: list[Request], expected: list[Joke], batch_size: int
) -> None:
    assert len({joke.text for joke in expected}) == len(expected)
    assert BuiltinEngine(loaded, batch_size).generate(requests, GREEDY) == expected


def test_varlen_attention_gives_the_same_answers(
    tiny: Path, requests: list[Request], expected: list[Joke]
) -> None:
    varlen = load(tiny, device="cpu", dtype="fp32", attention="varlen")
    assert BuiltinEngine(varlen).generate(requests, GREEDY) == expected


def test_no_requests_no_answers(engine: BuiltinEngine) -> None:
    assert engine.generate([], GREEDY) == []


@pytest.fixture
def stopping(loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes a token of the second request's answer the stop token; returns the answer up to it.

    The first request's answer does without that token, and so goes on to the limit.
    """
    other, answer = ask(loaded, requests[0]), ask(loaded, requests[1])
    place = next(i for i in range(2, 11) if answer[i] not in [*other, *answer[:i]])
    monkeypatch.setattr(loaded.processor, "stop_id", answer[place])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", answer[place])
    return answer[: place + 1]


def test_an_answer_ends_at_the_stop_token_and_says_so(
    loaded: Loaded, requests: list[Request], expected: list[Joke], stopping: list[int]
) -> None:
    engine = BuiltinEngine(loaded)
    text = loaded.processor.tokenizer.decode(stopping[:-1], skip_special_tokens=True).strip()
    # The stop token is counted, and not said; the neighbour in the batch goes on to the limit.
    stopped = Joke(text, expected[1].prompt_tokens, len(stopping), "stop")
    assert engine.generate(requests[:2], GREEDY) == [expected[0], stopped]
    # When the limit falls on the stop token, it is the model that stopped.
    exact, short = (GenerationSettings(max_new_tokens=len(stopping) - less) for less in (0, 1))
    assert engine.generate([requests[1]], exact) == [stopped]
    (cut,) = engine.generate([requests[1]], short)
    assert (cut.text, cut.tokens, cut.finish_reason) == (text, len(stopping) - 1, "length")


def test_the_same_seed_draws_the_same_and_another_draws_otherwise(
    engine: BuiltinEngine, requests: list[Request]
) -> None:
    several = [requests[1]] * 4
    first = engine.generate(several, DRAWN)
    assert len({joke.text for joke in first}) == 4
    assert engine.generate(several, DRAWN) == first
    other = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=8)
    assert {j.text for j in engine.generate(several, other)}.isdisjoint({j.text for j in first})


def test_a_seed_leaves_the_callers_random_numbers_alone(
    engine: BuiltinEngine, requests: list[Request]
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    engine.generate(requests[:1], DRAWN)
    list(engine.stream(requests[0], DRAWN))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_callers_random_numbers_are_drawn_from(
    engine: BuiltinEngine, requests: list[Request]
) -> None:
    unseeded = GenerationSettings(max_new_tokens=12, temperature=1.5)
    torch.manual_seed(7)
    first, second = (engine.generate(requests[:1], unseeded) for _ in range(2))
    assert first != second
    assert first == engine.generate(requests[:1], DRAWN)


def test_top_p_draws_among_the_likeliest_alone(
    engine: BuiltinEngine, requests: list[Request], expected: list[Joke]
) -> None:
    # So few of them that only the likeliest is left.
    settings = GenerationSettings(max_new_tokens=12, temperature=1.5, top_p=1e-6, seed=7)
    assert engine.generate(requests, settings) == expected


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_of_a_stream_are_the_answer(
    engine: BuiltinEngine, requests: list[Request], seed: int
) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=3.0, seed=seed)
    (joke,) = engine.generate([requests[seed]], settings)
    pieces: list[str] = []
    assert exhausted(engine.stream(requests[seed], settings), pieces) == joke
    assert len(pieces) > 1
    assert "".join(pieces) == joke.text


def exhausted(stream: Generator[str, None, Joke], pieces: list[str]) -> Joke:
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return cast(Joke, end.value)


def says(ids: list[int], error: Exception | None = None) -> Callable[..., Iterator[list[int]]]:
    """Stands in for an engine's steps: gives these tokens, and then may fail."""

    def tokens(*_: object) -> Iterator[list[int]]:
        for token in ids:
            yield [token]
        if error is not None:
            raise error

    return tokens


def test_whatever_is_streamed_is_what_the_whole_decodes_to(
    loaded: Loaded,
    engine: BuiltinEngine,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens at random: bytes that are no text, spaces, new lines, special tokens, Chinese, Latin."""
    tokenizer, generator = loaded.processor.tokenizer, torch.Generator().manual_seed(0)
    odd = tokenizer(" \n\n 上\n  a ……", add_special_tokens=False)["input_ids"]
    heard: set[str] = set()
    for _ in range(300):
        anything = torch.randint(len(tokenizer), (12,), generator=generator).tolist()
        pool = [*anything, *(odd * 12)[:12]]
        ids = [pool[i] for i in torch.randint(24, (24,), generator=generator).tolist()]
        ids = [token for token in ids if token != loaded.processor.stop_id]
        monkeypatch.setattr(engine, "_tokens", says([*ids, loaded.processor.stop_id]))
        pieces = list(engine.stream(requests[0], GREEDY))
        assert "".join(pieces) == loaded.processor.decode(ids), ids
        heard.update("".join(pieces))
    assert heard >= set("上a … \n\ufffd")


def test_a_stream_that_nobody_reads_on_computes_no_more(
    engine: BuiltinEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    decoder = engine._decoder
    assert decoder is not None
    step = decoder.step

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return step(tokens)

    monkeypatch.setattr(decoder, "step", counted)
    stream = engine.stream(requests[1], GREEDY)
    next(stream)
    heard = steps
    stream.close()
    assert steps == heard < GREEDY.max_new_tokens - 1
    assert list(engine.stream(requests[1], GREEDY))
    assert steps == heard + GREEDY.max_new_tokens - 1


@pytest.mark.parametrize("said", ["", "冷得像"])
def test_an_error_while_streaming_reaches_the_reader(
    loaded: Loaded,
    engine: BuiltinEngine,
    requests: list[Request],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = loaded.processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(engine, "_tokens", says(ids, RuntimeError("out of memory")))
    heard: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        exhausted(engine.stream(requests[0], GREEDY), heard)
    # What may still change with the next token is held back.
    assert said.startswith("".join(heard))
    assert bool(heard) == bool(said)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_score_is_the_training_loss_of_the_same_record_negated(
    engine: BuiltinEngine, loaded: Loaded, requests: list[Request], index: int
) -> None:
    request = requests[index]
    choices = ["上班第一天，我就想退休。", "  Why is it funny? ", "冷"]
    scores = engine.score(request, choices)
    for choice, score in zip(choices, scores, strict=True):
        turns = [*request.turns, Turn("gpt", choice)]
        batch = collate([loaded.processor.sample(request.images, turns, "r")], pad_id=0)
        loss = AnswerLoss(loaded.model)(
            batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values
        )
        assert batch.supervised > 1  # the stop token counts too
        # Some dozen float32 log-probabilities, summed.
        assert score == pytest.approx(-loss.item(), abs=1e-3)
    assert len(set(scores)) == len(choices)


def test_scores_do_not_depend_on_the_choices_beside_them_nor_on_the_kernel(
    tiny: Path, engine: BuiltinEngine, requests: list[Request]
) -> None:
    choices = ["冷", "上班第一天，我就想退休。", "冷得像周一。", "Why is it funny?"]
    together = engine.score(requests[0], choices)
    alone = [engine.score(requests[0], [choice])[0] for choice in choices]
    assert together == pytest.approx(alone, abs=1e-3)
    for other in (
        BuiltinEngine(load(tiny, device="cpu", attention="varlen")),
        BuiltinEngine(load(tiny, device="cpu"), batch_size=3),
    ):
        assert other.score(requests[0], choices) == pytest.approx(together, abs=1e-3)
    assert engine.score(requests[0], []) == []


def test_a_score_counts_the_answers_of_a_history_as_given(
    engine: BuiltinEngine, loaded: Loaded, requests: list[Request]
) -> None:
    history = requests[4]
    ids = loaded.processor(history.images, history.turns)["input_ids"]
    choice = loaded.processor.choice("因为冷。")
    inputs = loaded.processor(history.images, history.turns)
    inputs["input_ids"] = torch.cat([ids, torch.tensor([choice])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        log_p = loaded.model(**inputs).logits[0].log_softmax(-1)
    expected = sum(log_p[ids.shape[1] - 1 + i, token].item() for i, token in enumerate(choice))
    assert choice[-1] == loaded.processor.stop_id
    assert engine.score(history, ["因为冷。"]) == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_says_the_range(
    settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(DeadpanError, match=f"The setting {name} is out of range") as raised:
        GenerationSettings(**settings)
    assert raised.value.found == str(settings[name])
    assert raised.value.expected


def test_the_pictures_must_match_their_places(
    engine: BuiltinEngine, requests: list[Request]
) -> None:
    mismatched = Request(requests[3].images, [Turn("human", "<image>\nonly one")], "the riddle")
    with pytest.raises(DeadpanError) as raised:
        engine.generate([mismatched], GREEDY)
    assert raised.value.where == "the riddle"


def test_a_closed_engine_lets_go_of_its_model(tiny: Path) -> None:
    import weakref

    engine = BuiltinEngine(load(tiny))
    model = weakref.ref(engine._model)
    engine.close()
    assert model() is None
