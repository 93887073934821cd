import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deadpan.data.records import CONTROL_TOKENS, Record, Turn, load, read
from deadpan.errors import DeadpanError

Turns = list[tuple[str, Any]]
SOUND: Turns = [("human", "<image>\n看图说一个冷笑话。"), ("gpt", "冷得像周一。")]


def sample(turns: Turns = SOUND, **keys: Any) -> dict[str, Any]:
    """A record about one picture, changed by the keys; a key set to ... is left out."""
    conversations = [{"from": role, "value": text} for role, text in turns]
    whole = {"image": "cat.png", "conversations": conversations} | keys
    return {key: value for key, value in whole.items() if value is not ...}


def write(folder: Path, *samples: object, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_record_says_what_its_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, sample(id="abc", source="metadata is left alone"))
    records, problems = read(path)
    turns = (Turn("human", "<image>\n看图说一个冷笑话。"), Turn("gpt", "冷得像周一。"))
    assert problems == []
    assert records == [Record("abc", ("cat.png",), turns, path, 0, None, tmp_path)]
    assert records[0].name == "train.json record 0 (id 'abc')"
    assert records[0].answers == ("冷得像周一。",)
    assert records[0].image_paths == (tmp_path / "cat.png",)


def test_pictures_start_from_the_folder_given(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    elsewhere = str(tmp_path / "elsewhere.png")
    path = write(tmp_path, sample(), sample(image=elsewhere))
    relative, absolute = load(path, pictures)
    assert relative.image_paths == (pictures / "cat.png",)
    assert absolute.image_paths == (Path(elsewhere),)
    with pytest.raises(DeadpanError, match="folder of pictures does not exist"):
        read(path, tmp_path / "nowhere")


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_go_on_after_a_bad_line(tmp_path: Path, bom: str, end: str) -> None:
    good = json.dumps(sample(id=7), ensure_ascii=False)
    path = tmp_path / "train.json"
    path.write_bytes((bom + end.join([good, "", '{"image": }', good]) + end).encode())
    records, problems = read(path)
    assert [(r.index, r.line, r.name) for r in records] == [
        (0, 1, "train.json line 1 (id '7')"),
        (2, 4, "train.json line 4 (id '7')"),
    ]
    [problem] = problems
    assert (problem.code, problem.severity, problem.records) == ("json-syntax", "error", (1,))
    assert problem.where == "train.json line 3 column 11"


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_json_lines_end_at_newlines_only(tmp_path: Path, separator: str) -> None:
    text = f"一{separator}二"
    line = json.dumps(sample([*SOUND[:1], ("gpt", text)]), ensure_ascii=False)
    path = tmp_path / "train.jsonl"
    path.write_text(line, encoding="utf-8")
    assert load(path)[0].answers == (text,)


def test_an_array_with_a_byte_order_mark_and_a_syntax_error(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("\ufeff[\n  {},\n  {,}\n]", encoding="utf-8")
    records, [problem] = read(path)
    assert records == []
    assert (problem.code, problem.where) == ("json-syntax", "train.json line 3 column 4")


@pytest.mark.parametrize("text", ["[" * 200_000, "[" + "1" * 5000 + "]"], ids=["deep", "long"])
def test_json_that_python_declines_is_a_problem(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    assert [problem.code for problem in read(path)[1]] == ["json-syntax"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"[]", "holds no records"),
        ('{"image":\n "冷.png"}'.encode(), "neither a JSON array nor JSON lines"),
        (b"id,image\n1,a.png\n", "neither a JSON array nor JSON lines"),
        ('[\n"冷"]'.encode("gb18030"), "not UTF-8"),
    ],
    ids=["missing", "empty", "bom", "no-records", "one-object", "csv", "gb18030"],
)
def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DeadpanError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value.where)


def test_a_folder_is_no_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="cannot be read"):
        read(tmp_path)


def test_bytes_that_are_not_utf8_are_found_by_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"[\n1,\n\xff]")
    with pytest.raises(DeadpanError) as caught:
        read(path)
    assert (caught.value.where, caught.value.found) == (f"{path} line 3", "byte 0xff at offset 5")


@pytest.mark.parametrize("encoding", ["GB18030", "UTF-16"])
def test_the_conversion_that_is_offered_makes_a_file_that_is_read(
    tmp_path: Path, encoding: str
) -> None:
    folder = tmp_path / "我的 数据"
    folder.mkdir()
    path = folder / "训练 集.json"
    path.write_text(json.dumps([sample()], ensure_ascii=False), encoding=encoding)
    with pytest.raises(DeadpanError) as caught:
        read(path)
    assert caught.value.fix is not None
    subprocess.run(caught.value.fix.partition(" (")[0], shell=True, check=True)
    # In the same folder, since the paths of its pictures start there.
    records, problems = read(folder / "训练 集.utf8.json")
    assert (records[0].turns[1].text, problems) == (sample()["conversations"][1]["value"], [])


def test_an_object_around_the_records_is_named_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [sample()]}, indent=1))
    with pytest.raises(DeadpanError) as caught:
        read(path)
    assert caught.value.found == "one JSON object with the keys ['data']"


QUESTION, ANSWER = SOUND
AGAIN = ("human", "再来一句")


@pytest.mark.parametrize(
    ("value", "code", "severity", "message"),
    [
        ("text", "not-an-object", "error", "found 'text'"),
        (sample(id=1.5), "bad-id", "error", "found 1.5"),
        (sample(id=True), "bad-id", "error", "found True"),
        (sample(image=3), "bad-image", "error", "found 3"),
        (sample(image=["a.png", " "]), "bad-image", "error", "found ['a.png', ' ']"),
        (sample(image="https://x.org/a.png"), "picture-url", "error", "https://x.org"),
        (sample(image="data:image/png;base64,AA"), "picture-url", "error", "data:image"),
        (
            sample([AGAIN, ANSWER], image=..., images=["a.png"]),
            "unread-pictures",
            "warning",
            "images",
        ),
        (sample(conversations=...), "bad-conversations", "error", "the keys ['image']"),
        (sample(conversations=None), "bad-conversations", "error", "found None"),
        (sample([]), "bad-conversations", "error", "found []"),
        (sample(conversations=["hello"]), "bad-turn", "error", "conversations[0]"),
        (sample(conversations=[{"from": "human"}]), "bad-turn", "error", "conversations[0]"),
        (sample([QUESTION, ("gpt", None)]), "bad-turn", "error", "conversations[1].value"),
        (sample([("user", "<image>"), ANSWER]), "unknown-speaker", "error", "found 'user'"),
        (sample([QUESTION, ("assistant", "好")]), "unknown-speaker", "error", "'assistant'"),
        (sample([ANSWER, QUESTION, ANSWER]), "first-turn", "error", "conversations[0]"),
        (sample([QUESTION, AGAIN, ANSWER]), "turn-order", "error", "[0] and [1] are both"),
        (sample([QUESTION, ANSWER, ANSWER]), "turn-order", "error", "[1] and [2] are both"),
        (sample([QUESTION, ANSWER, AGAIN]), "last-turn", "error", "conversations[2]"),
        (sample([QUESTION, ("gpt", " \n")]), "empty-answer", "error", "conversations[1]"),
        (sample([("human", ""), ANSWER], image=...), "empty-question", "error", "[0].value"),
        (sample([*SOUND, ("human", " "), ANSWER]), "empty-question", "error", "[2].value"),
        (sample([AGAIN, ("gpt", "<image>")]), "image-in-answer", "error", "[1].value"),
        (sample(image=...), "image-count", "error", "0 given, but 1 <image>"),
        (sample(image=[]), "image-count", "error", "0 given, but 1 <image>"),
        (sample([("human", "<image><image>"), ANSWER]), "image-count", "error", "1 given, but 2"),
        (sample(image=["a.png", "b.png"]), "image-count", "error", "2 given, but 1"),
        (sample([AGAIN, ANSWER], image=["a.png", "b.png"]), "image-count", "error", "but 0"),
        (sample([QUESTION, ("gpt", "半个\ud83d")]), "broken-text", "error", "'\\ud83d'"),
        (sample(id="\udc00"), "broken-text", "error", "id holds half"),
        (sample(image="\ud83d.png"), "broken-text", "error", "image holds half"),
    ],
)
def test_each_fault_is_named(
    tmp_path: Path, value: object, code: str, severity: str, message: str
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([sample(id="sound"), value]))
    records, problems = read(path)
    [problem] = problems
    assert (problem.code, problem.severity, problem.records) == (code, severity, (1,))
    assert problem.where.startswith("train.json record 1")
    assert message in problem.message
    assert records[0].id == "sound"
    problem.message.encode()


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens(tmp_path: Path, token: str) -> None:
    taught = sample([QUESTION, ("gpt", f"结束标记是{token}对吗")], id="taught")
    asked = sample([("human", f"<image>{token}是什么？"), ANSWER], id="asked")
    problems = read(write(tmp_path, taught, asked))[1]
    assert [(p.code, p.severity, p.where) for p in problems] == [
        ("control-token", "error", "train.json record 0 (id 'taught')"),
        ("control-token", "warning", "train.json record 1 (id 'asked')"),
    ]
    assert all(f" holds {token}," in problem.message for problem in problems)


@pytest.mark.parametrize(
    "value",
    [
        sample(id=None),
        sample(id=0),
        sample([AGAIN, ANSWER]),
        sample([("human", ""), ANSWER]),
        sample([("human", "<image>"), ANSWER]),
        sample([("human", "这张图<image>里有什么？"), ANSWER]),
        sample([AGAIN, ANSWER, QUESTION, ANSWER]),
        sample([AGAIN, ANSWER], image=None),
        sample([AGAIN, ANSWER], image=[]),
        sample(image=["cat.png"]),
        sample([("human", "<image> <image>"), ANSWER], image=["a.png", "b.png"]),
        sample([QUESTION, ANSWER, QUESTION, ANSWER], image=["a.png", "a.png"]),
        sample([QUESTION, ("gpt", "<ref>猫</ref><box>[[1, 2]]</box><quad></quad> <p>😂</p>")]),
        sample([QUESTION, ("gpt", "[UNUSED_TOKEN_1] <S> <|im_")]),
    ],
)
def test_the_unusual_but_fine_is_no_problem(tmp_path: Path, value: object) -> None:
    records, problems = read(write(tmp_path, value))
    assert problems == []
    assert len(records) == 1


def test_a_record_that_breaks_a_rule_is_still_returned(tmp_path: Path) -> None:
    records, _ = read(write(tmp_path, sample([QUESTION]), sample(image=3), sample()))
    assert [record.index for record in records] == [0, 2]


def test_load_names_the_first_errors(tmp_path: Path) -> None:
    path = write(tmp_path, *[sample([QUESTION], id=number) for number in range(7)])
    with pytest.raises(DeadpanError, match="The records have 7 errors") as caught:
        load(path, tmp_path)
    found = (caught.value.found or "").splitlines()
    assert found[0].startswith("train.json record 0 (id '0'): conversations[0], the last")
    assert len(found) == 6
    assert found[-1].strip() == "and 2 more"
    assert caught.value.fix == f"deadpan data check {path} --images {tmp_path}"


def test_load_lets_warnings_pass(tmp_path: Path) -> None:
    path = write(tmp_path, sample([("human", "<image></s>"), ANSWER]))
    assert len(load(path)) == 1


def test_the_official_samples() -> None:
    path = Path(__file__).parents[3] / "shared" / "golden" / "labels" / "samples.json"
    if not path.exists():
        pytest.skip("the golden folder is not here")
    records, problems = read(path)
    assert len(records) == 21
    assert [(records[p.records[0]].id, p.code, p.severity) for p in problems] == [
        ("first_turn_from_gpt", "first-turn", "error"),
        ("text_only_with_image_tag", "image-count", "error"),
        ("empty_answer", "empty-answer", "error"),
        ("ends_with_human", "last-turn", "error"),
        ("two_humans_in_a_row", "turn-order", "error"),
        ("eos_text_in_answer", "control-token", "error"),
    ]


@pytest.mark.parametrize(("stars", "sound"), [(None, True), (0, True), (7, True), (-1, False)])
def test_likes_are_a_number_or_unknown(tmp_path: Path, stars: int | None, sound: bool) -> None:
    turns = [{"from": "human", "value": "说"}, {"from": "gpt", "value": "冷。"}]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"conversations": turns, "stars": stars}]))
    records, problems = read(path)
    assert [problem.code for problem in problems] == ([] if sound else ["bad-stars"])
    if sound:
        assert records[0].stars == stars
