import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder

from deadpan.serve.page import cards
from deadpan.serve.page.guard import check_files
from deadpan.serve.page.runs import find_runs, probe_jokes, render
from deadpan.serve.page.words import CHINESE, ENGLISH, LANGUAGES, preferred
from deadpan.serve.ranking import rank
from deadpan.serve.votes import Outcome, Votes
from page import Comedian, Visitor, events, make_runs, page_app, result, served

LEFT, RIGHT = "一只猫坐在桌子上。", "它是全家唯一读过用户协议的。"
TELLERS = {"base-teller": LEFT, "tuned-teller": RIGHT}


asked: set[str] = set()
"""Hosts that this process, the server included, has looked up or connected to."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        asked.add(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        asked.add(str(arguments[1][0]))


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Votes]:
    with Votes(tmp_path_factory.mktemp("votes") / "votes.db") as votes:
        yield votes


@pytest.fixture(scope="module")
def address(votes: Votes) -> Iterator[str]:
    engines = {name: Comedian(joke) for name, joke in TELLERS.items()}
    with served(page_app(engines, votes)) as address:
        yield address


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    visitor = Visitor(address)
    yield visitor
    visitor.close()


def get(address: str, path: str, **arguments: Any) -> httpx.Response:
    return httpx.get(f"{address}{path}", trust_env=False, **arguments)


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-GB,en;q=0.9,zh;q=0.8", "en"),
        ("fr, zh-TW;q=0.5", "zh"),
        ("en;q=0.1, zh;q=0.7", "zh"),
        ("fr", "en"),
        ("zh;q=nonsense", "en"),
        ("", "en"),
    ],
)
def test_the_browsers_language_is_chosen(address: str, header: str, language: str) -> None:
    assert preferred(header).code == language
    answer = get(address, "/", headers={"accept-language": header})
    assert (answer.status_code, answer.headers["location"]) == (307, f"/{language}/")


def test_both_languages_say_everything() -> None:
    for field in dataclasses.fields(ENGLISH):
        said = [getattr(words, field.name) for words in LANGUAGES]
        assert all(said)
        if isinstance(said[0], dict):
            assert said[0].keys() == said[1].keys()
        if isinstance(said[0], tuple):
            assert len(said[0]) == len(said[1])
    assert set(ENGLISH.outcomes) == set(Outcome)
    assert re.search("[\u4e00-\u9fff]", CHINESE.nothing_told)


def test_the_page_loads_nothing_from_elsewhere(visitor: Visitor, address: str) -> None:
    loads = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"([^\"]+)\"", visitor.html)
    assert len(loads) == 3
    assert [url for url in loads if re.match("(https?:)?//", url)] == []
    assert "googleapis" not in visitor.html
    policy = get(address, "/en/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert '"analytics_enabled":false' in visitor.html


def test_the_server_asks_nobody(visitor: Visitor, pictures: list[Path]) -> None:
    visitor.fire("tell", [visitor.upload(pictures[0]), list(TELLERS), "?", None])
    assert asked == {"127.0.0.1"}


def test_tellers_tell_side_by_side_and_another_one(visitor: Visitor, pictures: list[Path]) -> None:
    picture = visitor.upload(pictures[0])
    inputs = [picture, list(TELLERS), "讲一个梗", None]
    text = visitor.fire("tell", inputs)
    streamed = [event for event in events(text) if event["msg"] == "process_generating"]
    assert len(streamed) > 5, "the jokes come piece by piece"
    jokes, told, button = result(text)
    assert told is None, "what has been told stays on the server"
    assert button["value"] == ENGLISH.another
    # Their order is that of the tellers, and each stands under its name.
    found = re.findall(r"<h3>(.*?)</h3><p class=\"newest\">(.*?)</p>", jokes)
    assert found == list(TELLERS.items())
    jokes, *_ = result(visitor.fire("tell", inputs))
    assert jokes.count("<li>") == 2
    jokes, *_ = result(visitor.fire("tell", [visitor.upload(pictures[1]), *inputs[1:]]))
    assert jokes.count("<li>") == 0, "another picture begins anew"


def test_who_is_who_stays_on_the_server_until_the_vote(
    visitor: Visitor, votes: Votes, pictures: list[Path]
) -> None:
    before = len(votes.all())
    sent = visitor.fire("start", [visitor.upload(pictures[0]), "讲一个梗"])
    answers, match, *_ = result(sent)
    assert LEFT in answers
    assert RIGHT in answers
    assert match is None
    (number, left) = votes._database.execute(
        "SELECT id, left_teller FROM matches ORDER BY told_at DESC LIMIT 1"
    ).fetchone()
    for secret in (*TELLERS, number):
        assert secret not in sent
    shown, _, _, said, ranking = result(visitor.fire("vote-left", [None]))
    assert re.findall("<h3>(.*?)</h3>", shown)[0] == f"Left · {left}"
    assert "Left is better. Noted." in said
    assert left in ranking
    assert [vote.outcome for vote in votes.all()][before:] == [Outcome.LEFT]
    # A match has one vote, whatever the browser sends.
    visitor.fire("vote-right", [number])
    visitor.fire("vote-right", [None])
    assert len(votes.all()) == before + 1


def test_a_vote_that_came_first_elsewhere_counts(
    visitor: Visitor, votes: Votes, pictures: list[Path]
) -> None:
    visitor.fire("start", [visitor.upload(pictures[0]), "讲一个梗"])
    (number,) = votes._database.execute(
        "SELECT id FROM matches ORDER BY told_at DESC LIMIT 1"
    ).fetchone()
    votes.vote(number, Outcome.BOTH_DRY)
    *_, said, _ = result(visitor.fire("vote-left", [None]))
    assert ENGLISH.voted_before in said
    assert votes.all()[-1].outcome is Outcome.BOTH_DRY


def test_mistakes_are_a_quiet_line(visitor: Visitor, pictures: list[Path], tmp_path: Path) -> None:
    names = list(TELLERS)
    assert ENGLISH.no_picture in result(visitor.fire("tell", [None, names, "?", None]))[0]
    good = visitor.upload(pictures[0])
    assert ENGLISH.no_teller in result(visitor.fire("tell", [good, [], "?", None]))[0]
    assert ENGLISH.no_picture in result(visitor.fire("start", [None, "?"]))[0]
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(pictures[3].read_bytes()[:200])
    for element, rest in (("tell", [names, "?", None]), ("start", ["?"])):
        shown = result(visitor.fire(element, [visitor.upload(truncated), *rest]))[0]
        assert "damaged" in shown
        assert get_upload_folder() not in shown


def test_only_uploaded_files_are_read(
    visitor: Visitor, votes: Votes, pictures: list[Path], address: str
) -> None:
    uploaded = visitor.upload(pictures[0])
    check_files([uploaded, ["text", None, 3], {"value": uploaded}])
    matches = "SELECT count(*) FROM matches"
    (before,) = votes._database.execute(matches).fetchone()
    # A picture of this server by its path, by its address, and out of the folder of uploads.
    out = f"{get_upload_folder()}/../../{pictures[0]}"
    for path in (str(pictures[0]), f"{address}/favicon.ico", out, "https://example.com/a.png"):
        with pytest.raises(gr.Error, match="not uploaded"):
            check_files([{**uploaded, "path": path}])
        sent = visitor.fire("start", [{**uploaded, "path": path}, "?"])
        (completed,) = (e for e in events(sent) if e["msg"] == "process_completed")
        assert not completed["success"]
    assert votes._database.execute(matches).fetchone() == (before,)
    for file in (pictures[0], Path("/etc/passwd")):
        assert get(address, f"/en/gradio_api/file={file}").status_code in (403, 404)


def test_doors_that_the_page_does_not_use_are_shut(address: str) -> None:
    for path in ("proxy=http://example.com/", "info", "openapi.json", "run/tell", "vibe-code"):
        assert get(address, f"/en/gradio_api/{path}").status_code == 404
    assert get(address, "/en/monitoring").status_code == 404
    url = f"{address}/en/gradio_api/queue/join"
    chunks = iter([b"{", b"}"])
    assert httpx.post(url, content=chunks, trust_env=False).status_code == 411
    assert httpx.post(url, content=b" " * 11 * 2**20, trust_env=False).status_code == 413
    # The rest of the server is as it was.
    assert get(address, "/v1/models").json()["data"][0]["id"] == "base-teller"


def test_an_api_key_locks_the_page(tmp_path: Path) -> None:
    app = page_app({"only": Comedian("1")}, api_key="sesame")
    with served(app) as address:
        locked = get(address, "/en/")
        assert "only" not in locked.text
        upload = {"files": b"x"}
        url = f"{address}/en/gradio_api/upload"
        assert httpx.post(url, files=upload, trust_env=False).status_code == 401
        login = f"{address}/en/login"
        with httpx.Client(trust_env=False) as client:
            wrong = client.post(login, data={"username": "me", "password": "guess"})
            assert wrong.status_code == 400
            client.post(login, data={"username": "me", "password": "sesame"}).raise_for_status()
            assert "only" in client.get(f"{address}/en/").text


def test_an_open_page_does_not_keep_the_server_from_ending() -> None:
    app = page_app({"only": Comedian("1")})
    with ExitStack() as browser, served(app) as address:
        page = browser.enter_context(
            httpx.stream("GET", f"{address}/en/gradio_api/heartbeat/x", trust_env=False)
        )
        lines = page.iter_lines()
        assert next(lines) == "data: ALIVE"
        # It is open while the server is told to end.


def test_a_single_teller_has_no_arena(tmp_path: Path) -> None:
    with Votes(tmp_path / "votes.db") as votes:
        app = page_app({"only": Comedian("1")}, votes, tmp_path)
        with served(app) as address:
            html = get(address, "/zh/").text
    assert f'"label":"{CHINESE.tell}"' in html
    assert f'"label":"{CHINESE.runs}"' in html
    assert f'"label":"{CHINESE.arena}"' not in html


def test_what_tellers_say_is_text(votes: Votes) -> None:
    bad = "<script>alert(1)</script>\"'&"
    for html in (
        cards.jokes({bad: [bad, bad]}, {bad: bad}),
        cards.match(("a", "b"), [bad, bad], [bad, bad]),
        cards.quiet(bad),
        cards.probes(ENGLISH, bad, [(bad, None, [(1, bad)])]),
        cards.ranking(ENGLISH, [dataclasses.replace(s, teller=bad) for s in rank(votes.all())]),
    ):
        assert "<script" not in html
        assert "&lt;script&gt;" in html


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return make_runs(tmp_path / "runs")


def test_runs_are_found_and_drawn(runs: Path) -> None:
    found = find_runs(runs)
    assert set(found) == {"first", "sweep/second"}
    assert find_runs(runs / "first") == {"first": runs / "first"}
    (cat, gone) = probe_jokes(found["first"])
    assert cat[0] == "cat.png"
    assert cat[1] is not None
    assert cat[1].startswith("data:image/webp")
    assert cat[2] == [(4, "一只猫。"), (8, "<b>它在等年终奖。")], "what is said again is left out"
    assert gone[:2] == ("gone.png", None)
    page = render(ENGLISH, runs, list(found), "step")
    assert page.count("<svg") == 1
    assert page.count('class="probe"') == 4
    assert "&lt;b&gt;" in page


def test_names_of_runs_are_not_paths(runs: Path) -> None:
    assert render(ENGLISH, runs / "sweep", ["../first", "/", str(runs / "first")], "step") == (
        cards.quiet(ENGLISH.no_runs)
    )


def test_a_run_that_cannot_be_drawn_says_why(runs: Path) -> None:
    assert "does not say how many samples" in render(ENGLISH, runs, ["first"], "sample")
    (runs / "first" / "metrics.jsonl").write_text("")
    assert "no losses yet" in render(ENGLISH, runs, ["first"], "step")
