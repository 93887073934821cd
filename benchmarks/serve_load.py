"""Many clients at once against `deadpan serve nano`: is every request answered or refused, and does memory stay flat?

    python benchmarks/serve_load.py --clients 64 --seconds 60

Each client asks about a picture, one request after another (each third as a stream), waits as told after a 429, and
prints nothing. Anything but a whole answer or a 429 counts as an error. The server is a process of its own on
127.0.0.1; its resident memory is read each second.
"""

import argparse
import asyncio
import base64
import collections
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
from PIL import Image

DEADPAN = Path(sys.executable).with_name("deadpan")


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """`deadpan serve nano` on a free port: its address and its process."""
    process = subprocess.Popen(
        [str(DEADPAN), "serve", "nano", "--port", "0", "--device", "cpu", *arguments],
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
        if url is None:
            sys.exit("the server did not start")
        yield url[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=180)


def picture(size: tuple[int, int], kind: str = "PNG") -> bytes:
    """The file of a drawn picture."""
    data = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(data, kind)
    return data.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def question(url: str) -> list[Any]:
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "讲个笑话"},
    ]
    return [{"role": "user", "content": content}]


class Load:
    """What the clients met."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self._client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=200)
        self._max_tokens = max_tokens
        self.asked = 0
        self.met: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []

    async def client(self, number: int, until: float) -> None:
        messages = question(data_uri(picture((100 + number, 100))))
        while time.monotonic() < until:
            self.asked += 1
            begun = time.monotonic()
            try:
                await self._ask(messages, stream=self.asked % 3 == 0)
            except openai.RateLimitError as error:
                self.met["429"] += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
            except openai.APIError as error:
                self.met[f"{type(error).__name__}: {error}"] += 1
            else:
                self.met["answered"] += 1
                self.seconds.append(time.monotonic() - begun)

    async def _ask(self, messages: list[Any], stream: bool) -> None:
        options: dict[str, Any] = {
            "model": "nano",
            "messages": messages,
            "max_tokens": self._max_tokens,
        }
        if not stream:
            answer = await self._client.chat.completions.create(**options)
            assert answer.choices[0].finish_reason in ("stop", "length")
            return
        last = None
        async for chunk in await self._client.chat.completions.create(**options, stream=True):
            last = chunk.choices[0].finish_reason
        assert last in ("stop", "length")


async def watch(server: psutil.Process, until: float) -> list[float]:
    """The server's resident memory in MiB, each second."""
    memory = []
    while time.monotonic() < until:
        memory.append(server.memory_info().rss / 2**20)
        await asyncio.sleep(1)
    return memory


async def run(url: str, server: psutil.Process, clients: int, seconds: float, tokens: int) -> dict:
    load = Load(url, tokens)
    until = time.monotonic() + seconds
    watching = asyncio.create_task(watch(server, until))
    await asyncio.gather(*(load.client(number, until) for number in range(clients)))
    memory = await watching
    quarter = max(1, len(memory) // 4)
    centiles = statistics.quantiles(load.seconds, n=100)
    answered = load.met["answered"]
    return {
        "clients": clients,
        "seconds": seconds,
        "asked": load.asked,
        "met": dict(load.met),
        "lost": load.asked - load.met.total(),
        "errors": load.met.total() - answered - load.met["429"],
        "p50_s": round(centiles[49], 2),
        "p99_s": round(centiles[98], 2),
        # The first quarter fills caches and pools; then memory is to stay where it is.
        "memory_mib_second_quarter": round(statistics.median(memory[quarter : 2 * quarter])),
        "memory_mib_last_quarter": round(statistics.median(memory[-quarter:])),
        "memory_mib_most": round(max(memory)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--queue", type=int, default=64)
    options = parser.parse_args()
    with serving("--queue", str(options.queue)) as (url, server):
        result = asyncio.run(run(url, server, options.clients, options.seconds, options.max_tokens))
    print(json.dumps(result, indent=2))
    sys.exit(bool(result["errors"] or result["lost"]))


if __name__ == "__main__":
    main()
