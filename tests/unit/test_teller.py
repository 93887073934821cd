from pathlib import Path

import pytest
from PIL import Image

import deadpan
from deadpan.data.records import PROMPT, Turn
from deadpan.engines.base import GenerationSettings, Request
from deadpan.errors import DeadpanError
from deadpan.teller import Teller, request

TOKENS = 8


@pytest.fixture(scope="module")
def teller(tiny: Path) -> Teller:
    return deadpan.load(tiny, max_tiles=4)


@pytest.fixture(scope="module")
def greedy(teller: Teller, pictures: list[Path]) -> list[str]:
    """What is said about each of the pictures."""
    settings = GenerationSettings(max_new_tokens=TOKENS)
    requests = [request(picture, PROMPT) for picture in pictures]
    jokes = [joke.text for joke in teller.engine.generate(requests, settings)]
    assert len(set(jokes)) == len(pictures)
    return jokes


def test_a_picture_one_joke(teller: Teller, pictures: list[Path], greedy: list[str]) -> None:
    assert teller.tell(pictures[1], max_new_tokens=TOKENS) == greedy[1]
    assert teller.tell(str(pictures[1]), max_new_tokens=TOKENS) == greedy[1]
    with Image.open(pictures[1]) as image:
        assert teller.tell(image, max_new_tokens=TOKENS) == greedy[1]


def test_several_pictures_a_joke_each(
    teller: Teller, pictures: list[Path], greedy: list[str]
) -> None:
    assert teller.tell(pictures, max_new_tokens=TOKENS) == greedy
    assert teller.tell(tuple(pictures[:1]), max_new_tokens=TOKENS) == greedy[:1]
    assert teller.tell([], max_new_tokens=TOKENS) == []


def test_a_picture_several_jokes(teller: Teller, pictures: list[Path]) -> None:
    jokes = teller.tell(pictures[0], n=3, temperature=1.5, seed=0, max_new_tokens=TOKENS)
    assert isinstance(jokes, list)
    assert len(set(map(str, jokes))) == 3
    again = teller.tell(pictures[0], n=3, temperature=1.5, seed=0, max_new_tokens=TOKENS)
    assert again == jokes


def test_several_pictures_several_jokes_each(teller: Teller, pictures: list[Path]) -> None:
    settings = GenerationSettings(TOKENS, temperature=1.5, seed=0)
    groups = teller.tell(pictures[:2], n=2, temperature=1.5, seed=0, max_new_tokens=TOKENS)
    assert isinstance(groups, list)
    assert [len(group) for group in groups] == [2, 2]
    # By picture, not by draw.
    requests = [request(pictures[i], PROMPT) for i in (0, 0, 1, 1)]
    flat = [joke.text for joke in teller.engine.generate(requests, settings)]
    assert groups == [flat[:2], flat[2:]]
    assert len(set(flat)) == 4


def test_no_picture(teller: Teller) -> None:
    joke = teller.tell(None, "Tell me a joke.", max_new_tokens=TOKENS)
    question = Request([], [Turn("human", "Tell me a joke.")])
    settings = GenerationSettings(max_new_tokens=TOKENS)
    assert joke == teller.engine.generate([question], settings)[0].text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_a_pil_image_of_any_mode_is_taken_as_its_file_is(
    teller: Teller, tmp_path: Path, mode: str
) -> None:
    image = Image.radial_gradient("L").convert(mode)
    path = tmp_path / "picture.png"
    image.save(path)
    assert teller.tell(image, max_new_tokens=TOKENS) == teller.tell(path, max_new_tokens=TOKENS)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("为什么？", "<image>\n为什么？"),
        ("Before <image> after", "Before <image> after"),
    ],
)
def test_the_picture_stands_before_the_question_unless_it_says_where(
    prompt: str, text: str
) -> None:
    image = Image.new("RGB", (8, 8))
    assert request(image, prompt).turns == [Turn("human", text)]
    assert request(None, "no picture").turns == [Turn("human", "no picture")]


def test_a_broken_picture_is_an_error_that_names_it(
    teller: Teller, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:100])
    for picture in (broken, tmp_path / "missing.png"):
        with pytest.raises(DeadpanError) as raised:
            teller.tell([pictures[0], picture])
        assert raised.value.where == str(picture)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 2}, "2 jokes were asked for, but without drawing they would all be the same"),
        ({"n": 0, "temperature": 1.0}, "The number of jokes is out of range"),
        ({"temperature": -1.0}, "temperature is out of range"),
        ({"top_p": 2.0}, "top_p is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens is out of range"),
    ],
)
def test_settings_that_make_no_sense(
    teller: Teller, pictures: list[Path], options: dict[str, float], text: str
) -> None:
    with pytest.raises(DeadpanError, match=text):
        teller.tell(pictures[0], **options)  # type: ignore[arg-type]


def test_jokes_tell_how_they_came_about(teller: Teller, pictures: list[Path]) -> None:
    settings = GenerationSettings(max_new_tokens=3)
    ((joke,),) = teller.jokes([pictures[3]], settings=settings)
    assert (joke.tokens, joke.finish_reason) == (3, "length")
    prompt = teller.processor([Image.open(pictures[3])], f"<image>\n{PROMPT}")["input_ids"]
    assert joke.prompt_tokens == prompt.shape[1]


def test_scores_come_in_the_order_of_the_choices(teller: Teller, pictures: list[Path]) -> None:
    choices = ["一只猫。", "冷得像周一。"]
    scores = teller.score(pictures[0], choices)
    assert teller.score(pictures[0], choices[::-1]) == scores[::-1]
    assert scores == teller.engine.score(request(pictures[0], PROMPT), choices)
    assert teller.score(None, choices) != scores
    with pytest.raises(DeadpanError, match="one text"):
        teller.score(pictures[0], choices[0])
    assert all(score < 0 for score in scores)


def test_load_hands_its_options_on(teller: Teller, tiny: Path) -> None:
    assert teller.processor.tile_policy.max_tiles == 4
    assert deadpan.load(tiny).processor.tile_policy.max_tiles == 12
    assert {str(p.dtype) for p in deadpan.load(tiny, dtype="bf16").model.parameters()} == {
        "torch.bfloat16"
    }
    quantised = deadpan.load(str(tiny), quantization="nf4", attention="eager").model
    assert quantised.config._attn_implementation == "eager"
    assert quantised.is_loaded_in_4bit
