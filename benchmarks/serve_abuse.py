"""Thousands of malformed requests against `deadpan serve nano`: are all refused (4xx), and does the server live on?

    python benchmarks/serve_abuse.py --requests 2000

Six kinds in turn: bodies that are no JSON, requests that break the schema in one place, damaged pictures (bits
flipped, cut off, random), pictures that lie (bombs, polyglots, other formats), addresses that reach elsewhere, and
bodies that are too large. A damaged picture may still be one, and then it is answered; every other request must get a
4xx with an error body. After each hundred a good question must be answered. Seeded, so a failure comes back.
"""

import argparse
import base64
import collections
import contextlib
import http.client
import json
import random
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil

from serve_load import data_uri, picture, question, serving

MIB = 2**20
Case = tuple[str, bytes, frozenset[int]]
"""What it is, a request's body, and the statuses that it may be answered with."""

REFUSED = frozenset({400})
EITHER = frozenset({200, 400})


def good() -> dict[str, Any]:
    return {"model": "nano", "messages": question(_GOOD), "max_tokens": 4}


_GOOD = data_uri(picture((40, 30)))


def showing(url: str) -> bytes:
    return json.dumps({**good(), "messages": question(url)}).encode()


def no_json(rng: random.Random) -> Case:
    whole = json.dumps(good()).encode()
    bodies = [
        b"",
        rng.randbytes(rng.randrange(1, 200)),
        whole[: rng.randrange(len(whole))],
        b"[" * rng.randrange(1000, 100_000),
        b'{"a":' * rng.randrange(1000, 50_000),
        b'{"model":"nano","n":' + b"9" * rng.randrange(4400, 20_000) + b"}",
        json.dumps(rng.choice([None, 1, "x", [], {}, [[]], True])).encode(),
    ]
    return "no JSON", rng.choice(bodies), REFUSED


_JUNK: list[Any] = [
    None, True, -1, 0.5, 2**70, 1e308, float("nan"), float("inf"), "", "\ud800", "\x00", "x" * 5000,
    [], [None], [[]], {}, {"a": {}}, {"type": "text"}, {"type": "image_url"},
]  # fmt: skip


def wrong(rng: random.Random) -> Case:
    """A request that breaks the schema in one place."""
    request = good()
    change = rng.randrange(4)
    if change == 0:
        name = rng.choice(
            ["stop", "tools", "functions", "logit_bias", "response_format", "é\ud800"]
        )
        request[name] = rng.choice([value for value in _JUNK if value is not None])
    elif change == 1:
        # Null is a parameter that was not set, so here it would be a good request.
        name = rng.choice(["n", "temperature", "top_p", "max_tokens", "seed", "stream"])
        request[name] = rng.choice(["1", "", [], {}, -(2**70), float("nan"), float("inf")])
    elif change == 2:
        request[rng.choice(["model", "messages"])] = rng.choice([x for x in _JUNK if x != "nano"])
    else:
        message = rng.choice(["role", "content"])
        junk = [x for x in _JUNK if not (message == "content" and x in ("", "\x00", "x" * 5000))]
        request["messages"][0][message] = rng.choice(junk)
    body = json.dumps(request).encode()
    # A model of another name is not found.
    return "breaks the schema", body, frozenset({400, 404})


_FILES = {kind: picture((90, 70), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}


def damaged(rng: random.Random) -> Case:
    data = bytearray(_FILES[rng.choice(list(_FILES))])
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randrange(12)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        data = bytearray(rng.randbytes(rng.randrange(3000)))
    return "damaged picture", showing(data_uri(bytes(data))), EITHER


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, of one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = [(b"IHDR", header), *extra, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _webp(width: int, height: int) -> bytes:
    """A WebP canvas that claims a size and holds nothing."""
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


_BOMB = zlib.compress(bytes(64 * MIB), 9)
"""64 MiB in 64 KiB."""


def lying(rng: random.Random) -> Case:
    size = rng.choice([(30_000, 30_000), (2**31 - 1, 2**31 - 1), (65_535, 400), (0, 5)])
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(6) + b","
    jpeg = _FILES["JPEG"]
    start = jpeg.index(b"\xff\xc0")
    huge = jpeg[: start + 5] + struct.pack(">HH", 65_535, 65_535) + jpeg[start + 9 :]
    files = {
        "bomb": [
            (png(*size), REFUSED),
            (png(10, 10, (b"zTXt", b"a\0\0" + _BOMB)), EITHER),
            (png(10, 10, (b"iCCP", b"a\0\0" + _BOMB)), EITHER),
            (huge, REFUSED),
            (gif + struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0", REFUSED),
            (_webp(16_383, 16_383), REFUSED),
        ],
        "polyglot": [
            (b"%PDF-1.4\n" + jpeg, REFUSED),
            (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", REFUSED),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", REFUSED),
            (b"<html><script>alert(1)</script>" + _FILES["PNG"], REFUSED),
            (b"#!/bin/sh\nexit\n" + _FILES["GIF"], REFUSED),
            # A picture with something behind it is a picture; viewers show it, and so is it told about.
            (_FILES["PNG"] + b"PK\x05\x06" + bytes(18), EITHER),
            (picture((9, 9), "TIFF"), REFUSED),
            (picture((9, 9), "ICO"), REFUSED),
            (picture((9, 9), "PPM"), REFUSED),
        ],
    }  # fmt: skip
    kind = rng.choice(list(files))
    data, statuses = rng.choice(files[kind])
    return kind, showing(data_uri(data)), statuses


def elsewhere(rng: random.Random) -> Case:
    encoded = base64.b64encode(_FILES["PNG"]).decode()
    urls = [
        "file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "C:\\boot.ini", "\\\\host\\share", "",
        "http://127.0.0.1:22/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "ftp://a/b",
        "gopher://127.0.0.1/", "data:", "data:,", "data:image/png;base64", "data:image/png," + encoded,
        "data:text/html;base64," + encoded, "data:image/png;base64," + encoded[:-3] + "*",
        "data:image/png;base64,\u00e9", "data:image/png;base64,\ud800", "javascript:alert(1)", "\x00",
    ]  # fmt: skip
    return "address elsewhere", showing(rng.choice(urls)), REFUSED


def large(rng: random.Random) -> Case:
    def asking(messages: list[Any]) -> bytes:
        return json.dumps({"model": "nano", "messages": messages}).encode()

    content = question(data_uri(_FILES["PNG"]))[0]["content"]
    bodies = [
        (asking(question("x" * 21 * MIB)), {413}),
        (asking(question(data_uri(bytes(11 * MIB)))), {400}),
        (asking([{"role": "user", "content": "笑" * 70_000}]), {400}),
        (asking([{"role": "user", "content": content * 17}]), {400}),
        (asking(good()["messages"] * 65), {400}),
    ]
    body, statuses = rng.choice(bodies)
    return "too large", body, frozenset(statuses)


KINDS: list[Callable[[random.Random], Case]] = [
    *(no_json, wrong, wrong, wrong, damaged, damaged, damaged, damaged, lying, lying, elsewhere)
]
LARGE_EACH = 50
"""Large bodies take the client longest; one in so many requests is one of them."""


def send(address: str, body: bytes) -> tuple[int, Any]:
    """Post a body; status, and the answer's JSON."""
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        # A body may be refused before it was read whole; the answer is there all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def abuse(url: str, server: psutil.Process, requests: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    address = urlsplit(url).netloc
    met: collections.Counter[str] = collections.Counter()
    wrong_answers: list[str] = []
    memory = []

    def note(what: str) -> None:
        print(what, file=sys.stderr)
        wrong_answers.append(what)

    for number in range(requests):
        make = large if number % LARGE_EACH == LARGE_EACH - 1 else rng.choice(KINDS)
        kind, body, statuses = make(rng)
        status, answer = send(address, body)
        met[f"{kind}: {status}"] += 1
        if status not in statuses or (status != 200 and "error" not in answer):
            note(f"request {number}, {kind}: {status} {answer} {body[:200]!r}")
        if number % 100 == 99 or number == requests - 1:
            status, answer = send(address, json.dumps(good()).encode())
            if status != 200:
                note(f"the good question after request {number}: {status} {answer}")
            memory.append(round(server.memory_info().rss / MIB))
    return {
        "requests": requests,
        "met": dict(sorted(met.items())),
        "answers 5xx": sum(count for name, count in met.items() if name[-3] == "5"),
        "wrong": wrong_answers,
        "memory_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving() as (url, server):
        result = abuse(url, server, options.requests, options.seed)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
