import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from deadpan.data.preview import preview
from deadpan.data.records import Record, Turn
from deadpan.errors import DeadpanError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGBA", (800, 400), (255, 0, 0, 128)).save(tmp_path / "wide.png")
    Image.new("L", (20, 30)).save(tmp_path / "small.png")
    (tmp_path / "words.png").write_text("no picture")
    return tmp_path


def record(
    folder: Path,
    *images: str,
    answer: str = "冷得像周一。",
    question: str = "<image>说",
    name: str | None = None,
    index: int = 0,
) -> Record:
    turns = (Turn("human", question), Turn("gpt", answer))
    return Record(name, images, turns, folder / "train.json", index, None, folder)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_thumbnails_are_embedded(folder: Path) -> None:
    out = folder / "new" / "preview.html"
    assert preview([record(folder, "wide.png"), record(folder, "small.png")], out) == out
    sizes = []
    for image in Page(out).every("img"):
        kind, encoded = (image["src"] or "").split(",")
        assert kind == "data:image/webp;base64"
        thumbnail = Image.open(io.BytesIO(base64.b64decode(encoded)))
        sizes.append((thumbnail.format, thumbnail.mode, thumbnail.size))
    assert sizes == [("WEBP", "RGB", (320, 160)), ("WEBP", "RGB", (20, 30))]


def test_the_page_asks_for_nothing_from_elsewhere(folder: Path) -> None:
    out = preview([record(folder, "wide.png")], folder / "preview.html")
    page = Page(out)
    policy = next(m["content"] for m in page.every("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert page.every("link") == page.every("script") == []
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_words_are_escaped(folder: Path) -> None:
    hostile = '<script>alert("冷")</script>&amp;'
    name = "wide.png"
    records = [
        record(folder, name, answer=hostile, question=hostile, name=hostile),
        record(folder, "<img src=x>.png", answer="二", question="另一个问题"),
    ]
    page = Page(preview(records, folder / "preview.html"))
    assert page.every("script") == []
    assert len(page.every("img")) == 1
    assert page.text.count(hostile) == 3
    assert "<img src=x>.png" in page.text


def test_broken_pictures_are_boxes_with_the_reason(folder: Path) -> None:
    records = [record(folder, "small.png", "gone.png"), record(folder, "words.png")]
    page = Page(preview(records, folder / "preview.html"))
    faults = [box for box in page.every("div") if box.get("class") == "fault"]
    assert (len(faults), len(page.every("img"))) == (2, 1)
    for words in ("The picture is missing.", "not a picture that Pillow can read"):
        assert words in page.text
    for name in ("gone.png", "words.png"):
        assert str(folder / name) in page.text
    assert "2 broken pictures" in page.text


def test_the_header_counts(folder: Path) -> None:
    records = [
        record(folder, "wide.png"),
        record(folder, "wide.png", "small.png"),
        record(folder, question="讲一个笑话"),
    ]
    page = Page(preview(records, folder / "preview.html"))
    for fact in ("train.json", "3 records", "2 pictures", "1 without a picture"):
        assert fact in page.text
    assert not re.search(r"broken pictures?\n", page.text)


def test_a_question_that_all_share_is_shown_once(folder: Path) -> None:
    def classes(*questions: str) -> list[str | None]:
        records = [record(folder, question=question) for question in questions]
        return [p.get("class") for p in Page(preview(records, folder / "p.html")).every("p")]

    assert classes("甲", "甲") == ["asked", "gpt", "gpt"]
    assert classes("甲", "乙") == ["human", "gpt", "human", "gpt"]


def test_a_sample_is_chosen_by_the_seed_and_kept_in_order(folder: Path) -> None:
    records = [record(folder, answer=f"答案{n:03d}", index=n) for n in range(100)]

    def shown(seed: int) -> list[str]:
        text = Page(preview(records, folder / "preview.html", limit=10, seed=seed)).text
        assert f"10 of 100 records, a random sample (seed {seed})" in text
        return re.findall(r"答案\d{3}", text)

    first = shown(0)
    assert len(first) == 10
    assert first == sorted(first) == shown(0)
    assert first != shown(1)


def test_only_a_web_page_is_written(folder: Path) -> None:
    data = folder / "train.json"
    data.write_text("[]")
    with pytest.raises(DeadpanError, match="web page"):
        preview([record(folder)], data)
    assert data.read_text() == "[]"
    (folder / "taken.html").mkdir()
    with pytest.raises(DeadpanError, match="cannot be written"):
        preview([record(folder)], folder / "taken.html")
