import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deadpan.data import pictures
from deadpan.data.checks import check


def sample(image: str | list[str] | None, answer: str, **keys: Any) -> dict[str, Any]:
    question = "<image>" * len([image] if isinstance(image, str) else image or []) + "说"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **keys}


def write(folder: Path, *samples: object, lines: bool = False) -> Path:
    texts = [json.dumps(value, ensure_ascii=False) for value in samples]
    path = folder / ("train.jsonl" if lines else "train.json")
    path.write_text("\n".join(texts) if lines else f"[{','.join(texts)}]", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the sound pictures a.png and b.png, and copy.png equal to a.png."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "b.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


def found(path: Path, **options: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    problems = check(path, **options).problems
    return [(problem.code, problem.severity, problem.records) for problem in problems]


def test_sound_records_have_no_problems(folder: Path) -> None:
    path = write(
        folder,
        sample("a.png", "一", id=1),
        sample("b.png", "一", id="b"),
        sample(None, "一"),
        sample(None, "二"),
        sample(["b2.png", "b2.png", "b3.png"], "同一张"),
    )
    (folder / "b2.png").write_bytes((folder / "b.png").read_bytes() + b"\n")
    (folder / "b3.png").write_bytes((folder / "b.png").read_bytes() + b"\n")
    report = check(path)
    assert report.problems == ()
    assert (report.records, report.pictures) == (5, 4)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, "missing-picture", "the picture is missing"),
        (b"<html>404</html>", "unreadable-picture", "not a picture that Pillow can read"),
        ("cut", "damaged-picture", "truncated"),
    ],
)
def test_a_broken_picture_names_every_record_that_uses_it(
    folder: Path, content: bytes | str | None, code: str, message: str
) -> None:
    broken = folder / "broken.jpg"
    if content == "cut":
        Image.effect_noise((90, 90), 90).save(broken)
        broken.write_bytes(broken.read_bytes()[:-500])
    elif isinstance(content, bytes):
        broken.write_bytes(content)
    samples = [sample("broken.jpg", str(n)) for n in range(2)]
    report = check(write(folder, *samples, sample(["a.png", "broken.jpg"], "三")))
    [problem] = report.errors
    assert (problem.code, problem.records) == (code, (0, 1, 2))
    assert problem.where == "train.json records 0, 1 and 2"
    assert problem.message.startswith(str(broken))
    assert message in problem.message
    assert [warning.code for warning in report.warnings] == ["shared-picture"]


def test_a_bomb_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 47)
    [problem] = check(write(folder, sample("a.png", "一", id="x"))).problems
    assert (problem.code, problem.severity) == ("unreadable-picture", "error")
    assert problem.where == "train.json record 0 (id 'x')"
    assert "expected at most 47 pixels; found 8x6 = 48 pixels" in problem.message


def test_one_picture_in_two_records_is_a_warning(folder: Path) -> None:
    path = write(folder, sample("a.png", "一"), sample("b.png", "二"), sample("./a.png", "三"))
    assert found(path) == [("shared-picture", "warning", (0, 2))]


def test_equal_files_are_one_picture(folder: Path) -> None:
    path = write(folder, sample("a.png", "一"), sample("copy.png", "二"), sample("a.png", "三"))
    [problem] = check(path).problems
    assert (problem.code, problem.severity) == ("equal-pictures", "warning")
    assert problem.records == (0, 1, 2)
    assert f"{folder / 'a.png'}, {folder / 'copy.png'}" in problem.message


@pytest.mark.parametrize(
    ("first", "second", "duplicate"),
    [
        (sample("a.png", "一"), sample("a.png", " 一\n"), True),
        (sample("a.png", "一"), sample("copy.png", "一"), True),
        (sample(["a.png", "b.png"], "一"), sample(["copy.png", "b.png"], "一"), True),
        (sample(None, "一"), sample(None, "一"), True),
        (sample("gone.png", "一"), sample("gone.png", "一"), True),
        (sample("a.png", "一"), sample("a.png", "二"), False),
        (sample("a.png", "一"), sample("b.png", "一"), False),
        (sample("a.png", "一"), sample(None, "一"), False),
        (sample(["a.png", "b.png"], "一"), sample(["b.png", "a.png"], "一"), False),
    ],
)
def test_duplicate_samples(
    folder: Path, first: dict[str, Any], second: dict[str, Any], duplicate: bool
) -> None:
    problems = found(write(folder, first, second))
    expected = ("duplicate-sample", "warning", (0, 1))
    assert (expected in problems) is duplicate


def test_duplicate_ids_are_a_warning_since_nothing_goes_by_them(folder: Path) -> None:
    path = write(
        folder,
        sample(None, "一", id=7),
        sample(None, "二", id="7"),
        sample(None, "三"),
        sample(None, "四"),
        lines=True,
    )
    [problem] = check(path).problems
    assert (problem.code, problem.severity, problem.records) == ("duplicate-id", "warning", (0, 1))
    assert problem.where == "train.jsonl lines 1 and 2"
    assert "'7'" in problem.message


def test_many_records_are_counted_not_listed(folder: Path) -> None:
    [problem] = check(write(folder, *[sample("gone.png", str(n)) for n in range(10)])).errors
    assert problem.where == "train.json records 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert problem.records == tuple(range(10))


def test_errors_come_first_and_unreadable_records_count(folder: Path) -> None:
    path = write(
        folder,
        sample("a.png", "一"),
        sample("a.png", "二"),
        "no record",
        sample("gone.png", "</s>"),
    )
    report = check(path)
    assert [problem.code for problem in report.problems] == [
        "not-an-object",
        "control-token",
        "missing-picture",
        "shared-picture",
    ]
    assert (report.records, report.pictures) == (4, 2)
    assert (len(report.errors), len(report.warnings)) == (3, 1)


def test_the_report_as_json(folder: Path) -> None:
    path = write(folder, sample("gone.png", "冷"))
    assert json.loads(json.dumps(check(path).to_json())) == {
        "file": str(path),
        "records": 1,
        "pictures": 1,
        "errors": 1,
        "warnings": 0,
        "problems": [
            {
                "code": "missing-picture",
                "severity": "error",
                "where": "train.json record 0",
                "message": f"{folder / 'gone.png'}: the picture is missing",
                "records": [0],
            }
        ],
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_each_picture_is_decoded_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    opened: list[Path] = []
    decode = pictures.open_picture

    def counted(path: Path) -> Image.Image:
        opened.append(path)
        return decode(path)

    monkeypatch.setattr("deadpan.data.checks.open_picture", counted)
    seen: list[tuple[int, int]] = []
    samples = [sample(["a.png", "b.png"], str(number)) for number in range(3)]
    check(write(folder, *samples), workers=workers, progress=lambda *counts: seen.append(counts))
    assert sorted(opened) == [folder / "a.png", folder / "b.png"]
    assert seen == [(1, 2), (2, 2)]


def test_pictures_are_looked_for_in_the_folder_given(folder: Path) -> None:
    elsewhere = folder / "records"
    elsewhere.mkdir()
    path = write(elsewhere, sample("a.png", "一"))
    assert found(path) == [("missing-picture", "error", (0,))]
    assert found(path, images=folder) == []
