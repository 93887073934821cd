"""The HTTP app, with engines that only echo: what it takes, what it refuses and how it says so."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.errors import DeadpanError
from deadpan.serve.app import create_app
from deadpan.serve.server import listen
from deadpan.serve.tellers import Tellers
from echo import Echo

CHAT = "/v1/chat/completions"


def uri(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> str:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(*content: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"model": "echo", "messages": [{"role": "user", "content": parts}], **more}


@pytest.fixture
def engine() -> Echo:
    engine = Echo()
    engine.let.set()
    return engine


@pytest.fixture
def client(engine: Echo) -> Iterator[TestClient]:
    app = create_app(Tellers({"echo": engine, "other": Echo()}), max_pixels=10_000)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def refused(client: TestClient, body: Any, status: int = 400) -> dict[str, Any]:
    answer = client.post(CHAT, json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_an_answer_has_openais_shape_and_counts(client: TestClient) -> None:
    answer = client.post(CHAT, json=question("q ", picture(uri()), "r")).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "echo"
    (choice,) = answer["choices"]
    # The order of the parts is the order of the prompt, as an export's chat template has it.
    assert choice["message"] == {"role": "assistant", "content": "q <image>\nr/1"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def test_several_answers_count_their_prompt_once(client: TestClient, engine: Echo) -> None:
    body = question("q", n=3, temperature=0.8)
    answer = client.post(CHAT, json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert engine.batches == [["q", "q", "q"]]


def test_settings_reach_the_engine(client: TestClient, engine: Echo) -> None:
    client.post(CHAT, json=question("q"))
    client.post(CHAT, json=question("q", temperature=1, top_p=0.5, seed=3, max_tokens=7))
    client.post(CHAT, json=question("q", max_completion_tokens=9, user=None, stream=None))
    assert engine.settings == [
        GenerationSettings(),
        GenerationSettings(7, 1.0, 0.5, 3),
        GenerationSettings(9),
    ]


def test_a_history_is_told_turn_by_turn(client: TestClient, engine: Echo) -> None:
    body = question(picture(uri()), "one")
    body["messages"] += [
        {"role": "assistant", "content": "two <image>"},
        {"role": "user", "content": "three"},
    ]
    assert client.post(CHAT, json=body).status_code == 200
    assert [(turn.role, turn.text) for turn in engine.requests[0].turns] == [
        ("human", "<image>\none"),
        ("gpt", "two <image>"),
        ("human", "three"),
    ]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("counted", [False, True])
def test_a_stream(client: TestClient, counted: bool) -> None:
    body = question("冷笑话", stream=True, stream_options={"include_usage": counted})
    answer = client.post(CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    if counted:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["delta"].get("content") for choice in choices[1:]] == ["冷", "笑", "话", None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]


def test_several_answers_stream_by_index(client: TestClient) -> None:
    chunks = events(client.post(CHAT, json=question("q", stream=True, n=2, temperature=1)).text)
    told = {c["choices"][0]["index"]: c["choices"][0]["delta"].get("content") for c in chunks[::2]}
    assert told == {0: "q/0", 1: "q/0"}


def test_a_mistake_before_the_first_piece_has_a_status(client: TestClient) -> None:
    assert refused(client, question(picture("data:image/png;base64,AAAA"), stream=True))


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"stop": "x"}, "stop", "not supported"),
        ({"temprature": 1}, "temprature", "not supported"),
        ({"tools": []}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "less than or equal to 0"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"n": True}, "n", "integer"),
        ({"n": 2}, "n", "set a temperature"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**6}, "max_tokens", "less than or equal to 1024"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "one of them"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"model": 3}, "model", "string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "checkpoint"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].role", "user begins"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]", "'text', 'image_url'"),
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "messages[0].content", "image_url part"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"messages": [{"role": "user", "content": "x" * 70_000}]}, "messages", "at most 65,536"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused(
    client: TestClient, engine: Echo, change: dict[str, Any], param: str, says: str
) -> None:
    # Escaped, since a lone surrogate cannot be sent otherwise.
    body = json.dumps({**question("q"), **change}, ensure_ascii=True)
    answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]
    assert engine.batches == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "neither a data URI nor a web address"),
        ("/etc/passwd", "neither a data URI nor a web address"),
        ("http://127.0.0.1/a.png", "fetches no pictures"),
        ("HTTPS://example.org/a.png", "fetches no pictures"),
        ("data:image/png,abc", "in base64"),
        ("data:text/html;base64,AAAA", "in base64"),
        ("data:image/png;base64,A%3D=", "not valid base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        (uri()[:-40], "damaged"),
        (uri((101, 100)), "at most 10,000 pixels"),
        (uri(kind="TIFF"), "not a picture"),
    ],
)
def test_a_picture_that_cannot_be_had_is_the_clients_mistake(
    client: TestClient, engine: Echo, url: str, says: str
) -> None:
    error = refused(client, question(picture(url)))
    assert error["param"] == "messages[0].content[0]"
    assert says in error["message"]
    assert engine.batches == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Field required"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "parsing the body"),
        (b'{"n":' + b"9" * 5000 + b"}", "parsing the body"),
        (b"[]", "valid dictionary"),
    ],
)
def test_a_body_that_is_no_question(client: TestClient, body: bytes, says: str) -> None:
    answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_other_addresses_and_methods_have_error_bodies(client: TestClient) -> None:
    for status, answer in [
        (404, client.get("/v1/completions")),
        (405, client.get(CHAT)),
        (404, client.get("/docs")),
        (404, client.get("/v1/models/ech")),
    ]:
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    error = refused(client, question("q", model="ecko"), 404)
    assert error["code"] == "model_not_found"
    assert "did you mean 'echo'?" in error["message"]


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["echo", "other"]
    assert client.get("/v1/models/echo").json() == listed["data"][0]


def test_the_schema_says_what_is_taken_and_refused(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    request = schema["components"]["schemas"]["ChatRequest"]
    assert request["additionalProperties"] is False
    assert request["required"] == ["model", "messages"]
    assert set(schema["paths"][CHAT]["post"]["responses"]) == {"200", "4XX"}


class Broken(Echo):
    def generate(self, requests: Any, settings: GenerationSettings) -> list[Joke]:
        raise RuntimeError("secret in /home/me")


def test_no_traceback_leaves_the_process() -> None:
    with TestClient(
        create_app(Tellers({"echo": Broken()})), raise_server_exceptions=False
    ) as client:
        answer = client.post(CHAT, json=question("q"))
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_the_key_is_asked_for_before_the_body_is_read(engine: Echo) -> None:
    with TestClient(create_app(Tellers({"echo": engine}), api_key="k\u00e9y")) as client:
        for headers in ({}, {"Authorization": "Bearer key"}, {"Authorization": "Basic k\u00e9y"}):
            answer = client.post(CHAT, content=b"{", headers=_latin(headers))
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=_latin(headers)).status_code == 401
        right = {b"Authorization": "Bearer k\u00e9y".encode()}
        assert client.post(CHAT, json=question("q"), headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert client.get("/healthz").json() == {"status": "ok"}


def _latin(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode("latin-1") for name, value in headers.items()}


def test_a_body_has_a_limit_declared_or_not(engine: Echo) -> None:
    app = create_app(Tellers({"echo": engine}), max_picture_bytes=5_000)
    json_type = {"Content-Type": "application/json"}
    with TestClient(app) as client:
        fits = question("x" * 9_000)
        assert client.post(CHAT, json=fits).status_code == 200
        declared = client.post(CHAT, content=b"x" * 10_001, headers=json_type)
        chunked = client.post(CHAT, content=(b"x" * 100 for _ in range(101)), headers=json_type)
    assert [declared.status_code, chunked.status_code] == [413, 413]
    assert "at most 10,000 bytes" in declared.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, {"content-length": "3000"}, {"authorization": "Bearer x"}])
def test_a_refused_body_is_read_to_its_end_before_the_refusal(headers: dict[str, str]) -> None:
    """Or the connection would be reset under a client that still sends, and the refusal lost."""
    told: list[str] = []

    async def receive() -> dict[str, Any]:
        told.append("read")
        return {"type": "http.request", "body": b"x" * 1000, "more_body": len(told) < 3}

    async def send(message: Any) -> None:
        told.append(str(message.get("status", "body")))

    app = create_app(Tellers({"echo": Echo()}), max_picture_bytes=750, api_key="right")
    given = {"authorization": "Bearer right", **headers}
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    asyncio.run(app(scope, receive, send))
    status = "401" if "authorization" in headers else "413"
    assert told == ["read"] * 3 + [status, "body"]
    told.clear()
    # Who asks first is told at once.
    scope["headers"] += [(b"content-length", b"3000"), (b"expect", b"100-continue")]
    asyncio.run(app(scope, receive, send))
    assert told == [status, "body"]


def test_metrics_count(client: TestClient) -> None:
    client.post(CHAT, json=question("q"))
    client.post(CHAT, json=question("q", model="none"))
    text = client.get("/metrics").text
    for line in [
        'deadpan_requests_total{status="200"} 1.0',
        'deadpan_requests_total{status="404"} 1.0',
        'deadpan_answers_total{finish_reason="stop",model="echo"} 1.0',
        'deadpan_generated_tokens_total{model="echo"} 1.0',
        'deadpan_questions_waiting{model="other"} 0.0',
        "deadpan_requests_in_progress 0.0",
        "deadpan_request_seconds_count 2.0",
    ]:
        assert line in text.splitlines()


class Line:
    """One request to an ASGI app, whose client can hang up."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(app(scope, self.incoming.get, self.sent.put))

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        return int((await asyncio.wait_for(self.sent.get(), 30))["status"])


def test_too_many_questions_are_refused_and_those_of_the_gone_are_dropped() -> None:
    async def story() -> None:
        engine = Echo()
        app = create_app(Tellers({"echo": engine}, queue_limit=1))
        running = Line(app, question("a"))
        assert await asyncio.to_thread(engine.begun.wait, 30)
        waiting = Line(app, question("b"))
        await asyncio.sleep(0.1)
        surplus = Line(app, question("c"))
        start = await asyncio.wait_for(surplus.sent.get(), 30)
        assert start["status"] == 429
        assert (b"retry-after", b"1") in start["headers"]
        waiting.hang_up()
        await asyncio.wait_for(waiting.task, 30)
        after = Line(app, question("d"))
        await asyncio.sleep(0.1)
        engine.let.set()
        assert [await running.status(), await after.status()] == [200, 200]
        assert engine.batches == [["a"], ["d"]]

    asyncio.run(story())


def test_a_stream_ends_when_its_client_leaves() -> None:
    async def story() -> None:
        engine = Echo()
        tellers = Tellers({"echo": engine})
        line = Line(create_app(tellers), question("abc", stream=True))
        assert await line.status() == 200
        line.hang_up()
        await asyncio.wait_for(line.task, 30)
        engine.let.set()
        await tellers.close()
        assert engine.batches in ([["a"]], [["a"], ["b"]])  # b may have been on its way already

    asyncio.run(story())


def test_a_late_answer_is_a_504_and_a_body_that_never_comes_a_408() -> None:
    async def story() -> None:
        engine = Echo()
        app = create_app(Tellers({"echo": engine}, timeout=0.1), body_timeout=0.1)
        late = Line(app, question("a"))
        silent = Line(app, question("b"))
        silent.incoming.get_nowait()
        assert [await late.status(), await silent.status()] == [504, 408]
        engine.let.set()

    asyncio.run(story())


def test_pictures_that_wait_are_counted_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        engine = Echo()
        app = create_app(Tellers({"echo": engine}), max_pixels=100)
        lines = [Line(app, question(picture(uri((10, 10))))) for _ in range(17)]
        statuses = asyncio.gather(*(line.status() for line in lines))
        await asyncio.sleep(0.5)
        engine.let.set()
        assert sorted(await statuses) == [200] * 16 + [429]
        for line in lines:
            await line.task
        del lines, line
        engine.requests.clear()
        assert await Line(app, question(picture(uri((10, 10))))).status() == 200

    asyncio.run(story())


def test_a_request_is_built_of_pictures_in_their_order(client: TestClient, engine: Echo) -> None:
    client.post(CHAT, json=question(picture(uri((3, 1))), "q", picture(uri((2, 1)))))
    request: Request = engine.requests[0]
    assert [image.size for image in request.images] == [(3, 1), (2, 1)]
    assert request.turns[0].text == "<image>\nq<image>\n"


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(DeadpanError, match="cannot be listened on") as caught:
        listen("203.0.113.1", 0)
    assert "--host" in str(caught.value.fix)
