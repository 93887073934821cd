"""The page, served by this process to a browser or to a client that speaks as gradio's browser code does."""

import json
import re
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image

from deadpan.engines.base import GenerationSettings, Joke, Request
from deadpan.serve.app import create_app
from deadpan.serve.page import mount_page
from deadpan.serve.pictures import Pictures
from deadpan.serve.server import Server, listen
from deadpan.serve.tellers import Tellers
from deadpan.serve.votes import Votes


class Comedian:
    """An engine without a model: it knows its jokes by heart, and tells them character by character."""

    def __init__(self, *jokes: str, pause: float = 0.0) -> None:
        self._jokes, self._told, self._pause = jokes, 0, pause

    def _next(self) -> str:
        self._told += 1
        return self._jokes[(self._told - 1) % len(self._jokes)]

    def prepare(self, request: Request) -> Request:
        return request

    def generate(self, requests: Sequence[Request], settings: GenerationSettings) -> list[Joke]:
        return [Joke(self._next(), 1, 1, "stop") for _ in requests]

    def stream(self, request: Request, settings: GenerationSettings) -> Generator[str, None, Joke]:
        joke = self._next()
        for character in joke:
            time.sleep(self._pause)
            yield character
        return Joke(joke, 1, 1, "stop")

    def score(self, request: Request, choices: Sequence[str]) -> list[float]:
        return [0.0 for _ in choices]

    def close(self) -> None:
        pass


def page_app(
    engines: dict[str, Any],
    votes: Votes | None = None,
    runs: Path | None = None,
    api_key: str | None = None,
) -> FastAPI:
    tellers = Tellers(engines)
    app = create_app(tellers, api_key=api_key)
    mount_page(app, tellers, Pictures(), votes=votes, runs=runs, api_key=api_key)
    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread, at the address that is yielded."""
    listener = listen("127.0.0.1", 0)
    server = Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


class Visitor:
    """Does what the page in a browser does, for one session."""

    def __init__(self, address: str, language: str = "en") -> None:
        self._http = httpx.Client(base_url=f"{address}/{language}/", timeout=60, trust_env=False)
        self.html = self._http.get("").raise_for_status().text
        found = re.search(r"window\.gradio_config = (\{.*?\});</script>", self.html)
        assert found is not None
        self._config = json.loads(found[1])
        self._session = f"session{id(self)}"

    def upload(self, picture: Path) -> dict[str, Any]:
        """A dropped picture, as its component has it."""
        answer = self._http.post("gradio_api/upload", files={"files": picture.open("rb")})
        (path,) = answer.raise_for_status().json()
        return {"path": path, "orig_name": picture.name, "meta": {"_type": "gradio.FileData"}}

    def _event(self, element: str, kind: str) -> dict[str, Any]:
        (target,) = (
            part["id"]
            for part in self._config["components"]
            if part["props"].get("elem_id") == element
        )
        (event,) = (
            event for event in self._config["dependencies"] if [target, kind] in event["targets"]
        )
        return dict(event)

    def fire(self, element: str, inputs: Sequence[Any], kind: str = "click") -> str:
        """An event of an element: all that the server sends, to its end."""
        event = self._event(element, kind)
        body = {
            "data": list(inputs),
            "fn_index": event["id"],
            "trigger_id": event["targets"][0][0],
            "session_hash": self._session,
        }
        self._http.post("gradio_api/queue/join", json=body).raise_for_status()
        answer = self._http.get("gradio_api/queue/data", params={"session_hash": self._session})
        return answer.raise_for_status().text

    def close(self) -> None:
        self._http.close()


def events(text: str) -> list[dict[str, Any]]:
    """The messages in what `Visitor.fire` returns."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def result(text: str) -> list[Any]:
    """What an event gave its outputs, in the end."""
    (completed,) = (event for event in events(text) if event["msg"] == "process_completed")
    assert completed["success"], completed
    data: list[Any] = completed["output"]["data"]
    return data


def make_runs(folder: Path) -> Path:
    """Two runs, one of them within another folder, and what is none."""
    Image.new("RGB", (40, 30), "teal").save(folder.parent / "cat.png")
    for name in ("first", "sweep/second"):
        run = folder / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(f"data: {{train: {folder.parent / 'train.json'}}}\n")
        steps = [{"step": step, "loss": 4 / step} for step in range(1, 9)]
        lines = [*steps, {"step": 8, "eval_loss": 1.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = [(4, "一只猫。"), (6, "一只猫。"), (8, "<b>它在等年终奖。")]
        jokes = [
            {"step": step, "picture": picture, "prompt": "?", "answer": answer}
            for step, answer in told
            for picture in ("cat.png", "gone.png")
        ]
        text = "".join(json.dumps(joke, ensure_ascii=False) + "\n" for joke in jokes)
        (run / "jokes.jsonl").write_text(text + '{"step": 9, "pic', encoding="utf-8")
    (folder / "notes").mkdir()
    return folder
