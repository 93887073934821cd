from pathlib import Path

import pytest

from deadpan.errors import DeadpanError
from deadpan.report.comparison import Comparison, Said, Teller, render, write


def page(pictures: list[Path], *tellers: Teller, curves: str | None = None) -> Comparison:
    return Comparison(
        title="Two <tellers>",
        summary="What they say.",
        question="讲一个笑话",
        pictures=pictures,
        tellers=tellers,
        figures=[("joke form", ["0.0%", "99.0%"])],
        facts=[("seed", "7")],
        version="1.2.3",
        curves=curves,
    )


def test_every_picture_stands_with_what_every_teller_said(pictures: list[Path]) -> None:
    one = Teller("base", "as it comes", {path: [Said("一只猫。")] for path in pictures})
    other = Teller(
        "tuned",
        "after",
        {pictures[0]: [Said("冷。", ("verbatim",)), Said("更冷。")], pictures[1]: []},
    )
    html = render(page(pictures, one, other))
    assert html.count("data:image/") == len(pictures)
    assert html.count("一只猫。") == len(pictures)
    cards = html.split("<article>")[1:]
    assert [("冷。" in card, "verbatim" in card) for card in cards] == [
        (True, True), (False, False), (False, False), (False, False),
    ]  # fmt: skip
    # A teller that was not asked about a picture has a dash there, never another picture's answer.
    assert [card.count(">–<") for card in cards] == [0, 1, 1, 1]
    for text in ("99.0%", "seed <b>7</b>", "deadpan 1.2.3", "讲一个笑话"):
        assert text in html


def test_what_a_model_says_is_text_and_never_markup(pictures: list[Path]) -> None:
    said = {pictures[0]: [Said("<script>alert(1)</script>")]}
    html = render(page(pictures[:1], Teller("<b>", "", said)))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "Two &lt;tellers&gt;" in html


def test_curves_are_drawn_where_there_are_some(pictures: list[Path]) -> None:
    teller = Teller("base", "", {})
    assert "<svg>drawn</svg>" in render(page(pictures, teller, curves="<svg>drawn</svg>"))
    assert "Loss" not in render(page(pictures, teller))


def test_a_page_that_cannot_be_written_or_has_no_picture_is_a_clear_error(
    pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeadpanError, match="cannot be written"):
        write(page(pictures, Teller("base", "", {})), tmp_path / "file" / "report.html")
    with pytest.raises(DeadpanError):
        render(page([tmp_path / "nothing.png"], Teller("base", "", {})))
