"""The decoder that answers, against transformers' own generation, and what it shares and keeps."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from adapters import give_voice
from deadpan.checkpoints.load import Loaded, load
from deadpan.data.records import Turn
from deadpan.engines import features as engine_features
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.engines.features import PictureFeatures
from deadpan.models import decoding, lora
from deadpan.models.decoding import Decoder
from deadpan.models.vision import VisionTower
from deadpan.processing import tiles
from make_tiny_model import make_official

GREEDY = GenerationSettings(max_new_tokens=10)
DRAWN = GenerationSettings(max_new_tokens=10, temperature=1.5, seed=3)

Ids = list[list[int]]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Loaded:
    return load(tiny, device="cpu")


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    """No picture, few tiles, many tiles."""
    images = [[], *[[Image.open(pictures[i]).convert("RGB")] for i in (0, 3)]]
    texts = ["Tell me a joke.", "<image>\n讲一个脑洞大开的梗", "<image>\nWhy?"]
    return [Request(i, [Turn("human", t)]) for i, t in zip(images, texts, strict=True)]


def plain(loaded: Loaded, requests: Sequence[Request]) -> Ids:
    """Each request's new tokens, by transformers' generation."""
    found = []
    for request in requests:
        inputs = loaded.processor(request.images, request.turns)
        with torch.inference_mode():
            out = loaded.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def ours(engine: BuiltinEngine, requests: Sequence[Request]) -> Ids:
    prompts = engine._prompts(requests)
    for prompt in prompts:
        engine._cut(prompt)
    steps = engine._tokens(prompts, GREEDY, torch.empty(len(prompts), 0))
    return [list(answer) for answer in zip(*steps, strict=True)]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a method from now on."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return method(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(
    ("family", "decoder"), [("Qwen2ForCausalLM", "Decoder"), ("Phi3ForCausalLM", "ModuleDecoder")]
)
def test_other_families_answer_as_transformers_does(
    tmp_path: Path, requests: list[Request], family: str, decoder: str
) -> None:
    loaded = load(make_official(tmp_path / "model", family), device="cpu")
    engine = BuiltinEngine(loaded)
    assert type(engine._decoder or engine._modules).__name__ == decoder
    assert ours(engine, requests) == plain(loaded, requests)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_answers_unmerged(
    tiny: Path, requests: list[Request], quantization: str
) -> None:
    loaded = load(tiny, device="cpu", quantization=quantization)
    before = ours(BuiltinEngine(loaded), requests)
    torch.manual_seed(0)
    model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, ["q_proj", "down_proj"], True)
    give_voice(model, std=0.2)
    model.requires_grad_(False)
    loaded.model = model
    engine = BuiltinEngine(loaded)
    assert isinstance(engine._decoder, Decoder)
    assert ours(engine, requests) == plain(loaded, requests) != before


def test_a_model_in_training_is_left_as_it_is(tiny: Path, requests: list[Request]) -> None:
    loaded = load(tiny, device="cpu")
    loaded.model = lora.attach(loaded.model, str(tiny), 4, 8, 0.0, "all-linear", True)
    weights = [parameter.data_ptr() for parameter in loaded.model.parameters()]
    engine = BuiltinEngine(loaded)
    assert ours(engine, requests) == plain(loaded, requests)
    assert engine._decoder is None
    assert [parameter.data_ptr() for parameter in loaded.model.parameters()] == weights


def test_eager_attention_is_what_it_says(tiny: Path, requests: list[Request]) -> None:
    loaded = load(tiny, device="cpu", attention="eager")
    engine = BuiltinEngine(loaded)
    assert engine._decoder is None
    assert ours(engine, requests) == plain(loaded, requests)


def test_prompts_read_in_parts_are_read_alike(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded)
    several = [*requests, requests[1]]
    together = ours(engine, several)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 60)
    assert engine._decoder is not None
    parts = counted(monkeypatch, engine._decoder, "_read")
    assert ours(engine, several) == together
    assert len(parts) > 1


def test_beyond_the_positions_that_are_known_transformers_answers(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded)
    expected = ours(engine, requests)
    assert engine._decoder is not None
    monkeypatch.setattr(engine._decoder, "longest", 30)
    read = counted(monkeypatch, engine._modules, "begin")
    assert ours(engine, requests) == expected
    assert len(read) == 1


def test_decoders_over_one_model_share_its_weights(loaded: Loaded) -> None:
    first, second = Decoder(loaded.model), Decoder(loaded.model)
    layer = loaded.model.model.language_model.layers[0]
    stacks = [decoder._layers[0].qkv.frozen._weight for decoder in (first, second)]
    assert stacks[0] is not None
    assert stacks[1] is not None
    places = {t.data_ptr() for t in (*stacks, layer.self_attn.q_proj.weight)}
    assert len(places) == 1
    parts = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
    assert torch.equal(stacks[1], torch.cat(parts))


def test_the_head_is_padded_and_held_once(tmp_path: Path, requests: list[Request]) -> None:
    loaded = load(make_official(tmp_path / "model"), device="cpu")
    head = loaded.model.lm_head
    before, expected = head.weight.detach().clone(), plain(loaded, requests)
    assert len(before) % 64
    first, second = Decoder(loaded.model), Decoder(loaded.model)
    assert len(first._head) % 64 == 0
    assert not first._head[len(before) :].any()
    assert head.weight.data_ptr() == first._head.data_ptr() == second._head.data_ptr()
    assert torch.equal(head.weight, before)
    assert head.weight.is_contiguous()
    assert ours(BuiltinEngine(loaded), requests) == expected
    logits = first.begin([[1, 2, 3]], [0], lambda _: None, 2)
    assert logits.shape == (1, len(before))
    assert first.step(logits.argmax(dim=-1)).shape == (1, len(before))


def test_answers_to_one_question_share_its_reading(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded)
    assert engine._decoder is not None
    read = counted(monkeypatch, engine._decoder, "begin")
    several = [requests[1]] * 3 + [requests[0]]
    jokes = engine.generate(several, DRAWN)
    ((prompts, rows, *_),) = read
    assert (len(prompts), rows) == (2, [0, 0, 0, 1])
    assert len({joke.text for joke in jokes}) == 4
    # A copied prefix is as good as one's own.
    apart = [Request(list(r.images), r.turns, str(i)) for i, r in enumerate(several)]
    monkeypatch.setattr(engine, "_prompts", lambda rs: [engine_prompt(loaded, r) for r in rs])
    assert engine.generate(apart, DRAWN) == jokes
    assert len(read[-1][0]) == 4


def engine_prompt(loaded: Loaded, request: Request) -> Any:
    (prompt,) = BuiltinEngine(loaded)._prompts([request])
    return prompt


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_seed_draws_the_same_in_batches_of_any_size(
    loaded: Loaded, requests: list[Request], size: int
) -> None:
    several = requests * 2
    assert BuiltinEngine(loaded, size).generate(several, DRAWN) == BuiltinEngine(loaded).generate(
        several, DRAWN
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many tiles the vision tower has seen."""
    calls = counted(monkeypatch, VisionTower, "__call__")
    return lambda: sum(len(pixels) for _, pixels in calls)


def test_a_picture_is_seen_once(
    loaded: Loaded, requests: list[Request], seen: Callable[[], int]
) -> None:
    engine = BuiltinEngine(loaded)
    first = engine.generate(requests, GREEDY)
    tiles_seen = seen()
    assert tiles_seen > 1
    copied = [Request([image.copy() for image in r.images], r.turns, r.name) for r in requests]
    assert engine.generate(copied, GREEDY) == first
    assert seen() == tiles_seen
    # Among two pictures the tile limit is another, so it is not the same picture.
    pair = Request([requests[1].images[0]] * 2, [Turn("human", "<image> <image>")])
    engine.generate([pair], GREEDY)
    assert seen() > tiles_seen


def test_a_prepared_request_is_not_cut_again(
    loaded: Loaded, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BuiltinEngine(loaded)
    expected = engine.generate(requests, GREEDY)
    cut = counted(monkeypatch, engine._features, "cut")
    prepared = [engine.prepare(request) for request in requests]
    assert len(cut) == len(requests)
    assert engine.generate(prepared, GREEDY) == expected
    assert len(cut) == len(requests)


def test_what_is_kept_of_pictures_is_bounded(
    loaded: Loaded, requests: list[Request], seen: Callable[[], int]
) -> None:
    engine = BuiltinEngine(loaded)
    engine.generate(requests, GREEDY)
    kept = engine._features._kept
    sizes = [value.nbytes for value in kept.values()]
    assert [value.untyped_storage().nbytes() for value in kept.values()] == sizes
    # Room for the larger only: the one used last stays.
    small = BuiltinEngine(loaded, kept_bytes=max(sizes))
    small.generate(requests, GREEDY)
    assert len(small._features._kept) == 1
    none = BuiltinEngine(loaded, kept_bytes=0)
    none.generate(requests, GREEDY)
    before = seen()
    none.generate(requests, GREEDY)
    assert seen() > before
    assert not none._features._kept


def test_a_device_that_cuts_gets_whole_pictures_and_their_grids(
    loaded: Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cutting(pixels: torch.Tensor, grid: tuple[int, int], out: torch.Tensor) -> None:
        columns, rows = grid
        picture = Image.fromarray(pixels.numpy())
        size, count = out.shape[-1], columns * rows
        cut = tiles.pixel_values(picture, count, size, len(out) > count, count)
        out.copy_(cut)

    monkeypatch.setitem(
        sys.modules, "deadpan.processing.gpu_tiles", SimpleNamespace(put_pixel_values=cutting)
    )
    several = [Image.open(pictures[i]).convert("RGB") for i in (0, 3, 2)]
    found = []
    for device_cuts in (False, True):
        features = PictureFeatures(loaded.model, loaded.processor.tile_policy, 0)
        features._device_cuts = device_cuts
        cuts = [cut.result() for images in (several, several[:1]) for cut in features.cut(images)]
        assert all((cut.pixels.ndim == 3) == device_cuts for cut in cuts if cut.pixels is not None)
        with torch.inference_mode():
            found.append(features.of(cuts))
    assert torch.equal(*found)


def test_pictures_are_seen_a_few_tiles_at_a_time(
    loaded: Loaded, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the borders of pictures, in their order, and a picture that comes again only once."""
    several = [Image.open(pictures[i]).convert("RGB") for i in (0, 3, 2, 3, 1)]
    features = PictureFeatures(loaded.model, loaded.processor.tile_policy, 0)
    cuts = [cut.result() for image in several for cut in features.cut([image])]
    with torch.inference_mode():
        alone = torch.cat([features.of([cut]) for cut in cuts])
    monkeypatch.setattr(engine_features, "TILES", 3)
    sizes = counted(monkeypatch, features, "_seen")
    waited = iter(cuts)
    with torch.inference_mode():
        together = features.of(waited)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert {len(values) for (values,) in sizes[:-1]} == {3}
    different = {cut.key: cut.pixels for cut in cuts if cut.pixels is not None}
    assert sum(len(values) for (values,) in sizes) == sum(map(len, different.values()))
    # The device has begun before the last picture is there.
    sizes.clear()

    def one_by_one() -> Any:
        yield from cuts[:-1]
        assert sizes
        yield cuts[-1]

    with torch.inference_mode():
        features.of(one_by_one())


@pytest.mark.parametrize("edge", [56, 84])
def test_the_tower_written_out_is_the_tower(loaded: Loaded, edge: int) -> None:
    """Also for tiles of another size, whose positions are interpolated."""
    tower, theirs = VisionTower(loaded.model), loaded.model.model.vision_tower
    values = torch.randn(3, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedded = theirs.embeddings(values)
        torch.testing.assert_close(tower._patches(values), embedded, rtol=1e-5, atol=5e-5)
        hidden = theirs(values).last_hidden_state
        torch.testing.assert_close(tower(values), hidden, rtol=1e-4, atol=1e-4)
    assert embedded.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_normalised_to_the_pixel_values(dtype: torch.dtype) -> None:
    """Every value of every channel, against the formula in the order that upstream computes it."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    values = tiles.normalise(pixels, dtype)
    assert values.shape == (1, 3, 16, 16)
    for channel, (mean, std) in enumerate(
        zip(tiles.IMAGENET_MEAN, tiles.IMAGENET_STD, strict=True)
    ):
        exact = (torch.arange(256).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
        assert torch.equal(values[0, channel].flatten(), exact.to(dtype))
