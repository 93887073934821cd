"""The page on which tellers stand side by side."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deadpan.errors import DeadpanError
from deadpan.report.comparison import (
    Cell,
    Comparison,
    Figure,
    Language,
    Row,
    Said,
    Teller,
    render,
    write,
)
from deadpan.report.curves import Curve
from deadpan.report.words import Bilingual

CURVE = Curve("tuned", Path("runs/tuned"), (1, 2, 3), (3.0, 2.0, 1.0), (3,), (1.5,), None, None)
POISON = "\"'><script>alert(1)</script><img src=http://x/y onerror=alert(1)>"


class Page(HTMLParser):
    """What a browser would make of it: tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(pictures: list[Path], *answers: tuple[tuple[Said, ...], ...]) -> Comparison:
    """A base and a tuned teller; answers by picture, then by teller."""
    return Comparison(
        title="Two tellers",
        summary=Bilingual("What they say.", "各说了什么。"),
        question="讲一个笑话",
        tellers=(
            Teller("base", {"model": "nano"}),
            Teller("tuned", {"model": "runs/t"}, tuned=True, learned=True, curve=0),
        ),
        rows=tuple(Row((path,), said) for path, said in zip(pictures, answers, strict=True)),
        figures=(
            Figure("joke form", (None, Cell("99.0%", "90.0%–100.0%", (0.99, 0.9, 1.0)))),
            Figure("2T1 accuracy", (Cell("50.0%"), Cell("83.3%")), "50.0%"),
        ),
        skipped=(("ranking", "the records have no stars"),),
        settings={"decoding": "greedy", "seed": "7"},
        version="1.2.3",
        notes=(Bilingual("Something is missing.", "少了东西。"),),
        curves=(CURVE,),
    )


def say(*texts: str) -> tuple[Said, ...]:
    return tuple(map(Said, texts))


def cells(html: str) -> list[str]:
    """The answers' HTML, picture by picture and teller by teller."""
    return html.split('<section class="cell')[1:]


def test_every_picture_stands_with_what_every_teller_said(pictures: list[Path]) -> None:
    html = render(
        page(pictures[:2], (say("一只猫。"), say("冷。", "更冷。")), (say("热。"), say("冷。")))
    )
    assert html.count('src="data:image/webp;base64,') == 2
    first, second, third, fourth = cells(html)
    assert "一只猫。" in first
    assert "冷。" not in first
    assert second.index("冷。") < second.index("更冷。")
    assert "冷。" not in third
    assert "冷。" in fourth
    text = Page(html).text
    for words in (
        "99.0%",
        "90.0%–100.0%",
        "chance",
        "not measured:",
        "the records have no stars",
        "数据没有点赞数",
        "What they say.",
        "各说了什么。",
        "讲一个笑话",
        "Something is missing.",
        "少了东西。",
        "deadpan 1.2.3",
        "greedy",
    ):
        assert words in text


def test_answers_learned_by_heart_are_marked_and_what_differs_is_underlined(
    pictures: list[Path],
) -> None:
    known = "雨伞分手时只说四个字：好聚好伞。"
    near = known.replace("四", "两")
    answers = (Said(known, True, known, True), Said(near, False, known), Said("新的。"))
    html = render(page(pictures[:1], (say("图里有一把雨伞。"), answers)))
    whole, almost, new = cells(html)[1].split('<div class="one')[1:]
    assert "a training answer, word for word" in whole
    assert "<mark>" not in whole
    assert re.findall("<mark>(.*?)</mark>", almost) == ["两"]
    assert "nearly a training answer</span>" in almost
    assert known in almost
    assert "cut off" in almost
    assert " repeats" not in new
    assert "cut off" not in new
    assert re.search(r"training answers repeated:</span>.*?</span> 2 / 3", html)


def test_equal_answers_are_shown_once_and_one_that_another_gave_says_so(
    pictures: list[Path],
) -> None:
    html = render(page(pictures[:1], (say("冷。"), say("冷。", "冷。", "热。"))))
    base, tuned = cells(html)
    assert "same as" not in base
    assert tuned.count("冷。") == 1
    assert "×2" in tuned
    assert re.findall(r"same as</span>.*?</span> (\w+)", tuned) == ["base"]


def test_no_name_and_no_answer_becomes_markup(pictures: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "a'\"<img src=x onerror=alert(1)>&.png"
    picture.write_bytes(pictures[0].read_bytes())
    said = (Said(POISON, True, POISON + "!"),)
    comparison = Comparison(
        title=POISON,
        summary=POISON,
        question=None,
        tellers=(Teller(POISON, {POISON: POISON, "model": POISON}, True, True, 0),),
        rows=(Row((picture,), (said,), POISON),),
        figures=(Figure(POISON, (Cell(POISON, POISON),), POISON),),
        skipped=((POISON, POISON),),
        settings={POISON: POISON},
        version=POISON,
        notes=(POISON,),
        curves=(replace(CURVE, name=POISON),),
    )
    found = Page(render(comparison))
    names = [name for name, _ in found.tags]
    assert "script" not in names
    assert [tag["alt"] for name, tag in found.tags if name == "img"] == [picture.name]
    assert not [key for _, tag in found.tags for key in tag if key.startswith("on")]
    # As often as it was put in: as text, it is there.
    assert found.text.count("<script>alert(1)</script>") >= 12


def test_the_page_asks_for_nothing_from_elsewhere(pictures: list[Path]) -> None:
    html = render(page(pictures[:1], (say("see http://example.org/"), say("冷。"))))
    found = Page(html)
    for _, tag in found.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (tag.get(key) or "#").startswith(("#", "data:image/webp"))
    assert not {"script", "link", "iframe", "object", "form"} & {name for name, _ in found.tags}
    assert not re.search(r"url\((?!#)|@import", html)
    policies = [tag["content"] for name, tag in found.tags if "http-equiv" in tag]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_picture_can_be_enlarged_by_a_key(pictures: list[Path]) -> None:
    found = Page(render(page(pictures[:1], (say("冷。"), say("冷。")))))
    figure = next(tag for name, tag in found.tags if name == "figure")
    button = next(tag for name, tag in found.tags if name == "button")
    assert "popover" in figure
    assert button["popovertarget"] == figure["id"]
    assert "enlarge" in (button["aria-label"] or "")


def test_curves_are_drawn_in_colours_that_a_dark_page_can_change(pictures: list[Path]) -> None:
    comparison = page(pictures[:1], (say("冷。"), say("冷。")))
    html = render(comparison)
    assert html.count("<svg") == 1
    assert "stroke: var(--curve-0072b2, #0072b2)" in html
    # The teller has its curve's colour, and one without a run none.
    assert html.count("--colour: var(--curve-0072b2, #0072b2)") > 0
    assert "--colour: var(--soft)" in html
    bare = replace(comparison, curves=(), tellers=(Teller("base"), Teller("tuned")))
    assert "<svg" not in render(bare)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_has_both_languages_and_opens_in_one(
    pictures: list[Path], language: Language
) -> None:
    comparison = page(pictures[:1], (say("冷。"), say("冷。")))
    html = render(replace(comparison, language=language))
    assert "Answers" in html
    assert "回答" in html
    chosen = [tag["id"] for name, tag in Page(html).tags if name == "input" and "checked" in tag]
    assert chosen == [language]


def test_many_pictures_are_smaller(pictures: list[Path]) -> None:
    said = (say("冷。"), say("冷。"))
    few, many = (render(page(pictures[:1] * count, *[said] * count)) for count in (2, 30))
    assert "many" not in re.findall('<main class="(.*?)"', few)[0]
    assert "many" in re.findall('<main class="(.*?)"', many)[0]


def test_a_page_that_cannot_be_written_or_lacks_a_picture_is_a_clear_error(
    pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    comparison = page(pictures[:1], (say("冷。"), say("冷。")))
    with pytest.raises(DeadpanError, match="cannot be written"):
        write(comparison, tmp_path / "file" / "report.html")
    with pytest.raises(DeadpanError, match="The picture is missing"):
        render(page([tmp_path / "gone.png"], (say("冷。"), say("冷。"))))
