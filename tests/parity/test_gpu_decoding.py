"""Recorded steps and the cache's flash kernel on a GPU, against float32 and against steps that are not recorded."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import Turn
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.engines.features import PictureFeatures
from deadpan.models.decoding import Decoder
from deadpan.models.vision import Recorded
from deadpan.processing import resampling, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = GenerationSettings(max_new_tokens=16)
DRAWN = GenerationSettings(max_new_tokens=16, temperature=1.2, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(tiny, device="cuda", dtype="bf16")


@pytest.fixture(scope="module")
def exact(tiny: Path) -> Loaded:
    return load(tiny, device="cuda", dtype="fp32", attention="eager")


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    texts = ["Tell me a joke.", "<image>\n讲一个脑洞大开的梗", "<image>\nWhy?"]
    images = [[], *[[Image.open(pictures[i]).convert("RGB")] for i in (0, 3)]]
    return [Request(i, [Turn("human", t)]) for i, t in zip(images, texts, strict=True)]


def answers(engine: BuiltinEngine, requests: list[Request]) -> list[list[int]]:
    prompts = engine._prompts(requests)
    for prompt in prompts:
        engine._cut(prompt)
    steps = engine._tokens(prompts, SETTINGS, torch.empty(len(prompts), 0))
    return [list(answer) for answer in zip(*steps, strict=True)]


def shortfall(exact: Loaded, request: Request, ids: list[int]) -> float:
    """By how much the worst token of an answer is less likely than the likeliest, in float32 logits."""
    inputs = exact.processor(request.images, request.turns)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        on_device = {name: tensor.to("cuda") for name, tensor in inputs.items()}
        logits = exact.model(**on_device, logits_to_keep=len(ids) + 1).logits[0, :-1].cpu()
    taken = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (logits.max(dim=1).values - logits.median(dim=1).values).min() > 1
    return (logits.max(dim=1).values - taken).max().item()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_greedy_answers_are_the_likeliest_within_rounding(
    loaded: Loaded, exact: Loaded, requests: list[Request], count: int
) -> None:
    """Also with rows to fill up the recorded number; prints how many answers are float32's own."""
    engine = BuiltinEngine(loaded)
    several = (requests * 2)[-count:]
    own = answers(BuiltinEngine(exact), several)
    equal = 0
    for request, ids, truth in zip(several, answers(engine, several), own, strict=True):
        assert len(ids) == SETTINGS.max_new_tokens
        # bfloat16 moves these logits by up to 0.1.
        assert shortfall(exact, request, ids) < 0.5
        equal += ids == truth
    print(f"{equal} of {count} answers are float32's own")


@pytest.mark.parametrize("flash", [True, False])
def test_a_recorded_step_is_the_step(loaded: Loaded, requests: list[Request], flash: bool) -> None:
    found = []
    for record in (True, False):
        engine = BuiltinEngine(loaded)
        engine._decoder = Decoder(loaded.model, record, flash)
        # Longer, shorter, and again: a plan that is used again must begin anew.
        found.append([answers(engine, part) for part in (requests, requests[:1], requests)])
        assert found[-1][0] == found[-1][2]
    assert found[0] == found[1]


def test_a_larger_batch_and_back(loaded: Loaded, requests: list[Request]) -> None:
    """The cache grows, and what pointed into the old one is recorded anew."""
    engine = BuiltinEngine(loaded, 16)
    alone = answers(engine, requests[:2])
    answers(engine, requests * 5)
    assert answers(engine, requests[:2]) == alone


def test_streams_and_seeds(loaded: Loaded, requests: list[Request]) -> None:
    engine = BuiltinEngine(loaded)
    (alone,) = engine.generate(requests[1:2], DRAWN)
    assert "".join(engine.stream(requests[1], DRAWN)) == alone.text
    several = [requests[1]] * 4
    jokes = engine.generate(several, DRAWN)
    assert engine.generate(several, DRAWN) == jokes
    assert len({joke.text for joke in jokes}) > 1


def test_an_early_stop_on_a_gpu(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded)
    (ids,) = answers(engine, requests[1:2])
    place = next(i for i in range(2, 15) if ids[i] not in ids[:i])
    monkeypatch.setattr(loaded.processor, "stop_id", ids[place])
    (joke,) = engine.generate(requests[1:2], SETTINGS)
    assert (joke.tokens, joke.finish_reason) == (place + 1, "stop")


def test_nf4_answers(tiny: Path, requests: list[Request]) -> None:
    quantised = load(tiny, device="cuda", dtype="bf16", quantization="nf4")
    jokes = BuiltinEngine(quantised).generate(requests, SETTINGS)
    assert [joke.tokens for joke in jokes] == [16] * len(requests)


def test_a_recorded_tower_sees_what_the_tower_sees(loaded: Loaded) -> None:
    features = PictureFeatures(loaded.model, loaded.processor.tile_policy, 0)
    assert isinstance(features._seen, Recorded)
    edge = loaded.processor.tile_policy.tile_size
    with torch.inference_mode():
        for count in (2, 5, 2, 1):
            values = torch.randn(count, 3, edge, edge, device="cuda", dtype=torch.bfloat16)
            expected = features._see(values)
            assert torch.equal(features._seen(values), expected)
        assert set(features._seen._known) == {1, 2, 5}


def test_a_gpu_sees_the_pictures_that_pillow_cuts(loaded: Loaded, requests: list[Request]) -> None:
    found = []
    for device_cuts in (True, False):
        features = PictureFeatures(loaded.model, loaded.processor.tile_policy, 0)
        assert features._device_cuts == resampling.is_pillows()
        features._device_cuts &= device_cuts
        cuts = [cut.result() for each in requests for cut in features.cut(each.images)]
        with torch.inference_mode():
            found.append([features.of(cuts[:1]), features.of(cuts)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_gpu_normalises_bit_for_bit() -> None:
    pixels = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    assert torch.equal(tiles.normalise(pixels.cuda()).cpu(), tiles.normalise(pixels))
