"""`deadpan serve` with its page, voted on over HTTP by several visitors at once, and killed in the middle of it."""

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from command import DEADPAN, ENVIRONMENT
from deadpan.serve.votes import Outcome, Votes
from page import Visitor, events, result

VISITORS = 3
ENOUGH = 12
"""Votes that are acknowledged before the server is killed."""


@contextmanager
def deadpan_serve(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in a process of its own, with two tellers, and its address."""
    command = [str(DEADPAN), "serve", "one=nano", "other=nano", "--port", "0", "--device", "cpu"]
    log = (folder / "server.log").open("a")
    with subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True
    ) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            line = server.stdout.readline()
            found = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+)/\n", line)
            assert found, (line, (folder / "server.log").read_text())
            httpx.Client(
                transport=httpx.HTTPTransport(retries=20, trust_env=False), trust_env=False
            ).get(f"{found[1]}/healthz").raise_for_status()
            yield server, found[1]
        finally:
            server.kill()


def vote_until_the_end(address: str, picture: Path, name: int, noted: list[str]) -> None:
    """Vote until the server is gone; what is asked tells the matches apart."""
    try:
        visitor = Visitor(address)
        uploaded = visitor.upload(picture)
        for number in range(1000):
            question = f"讲一个梗 {name}-{number}"
            asked = visitor.fire("start", [uploaded, question])
            assert result(asked)
            voted = visitor.fire("vote-both-dry", [None])
            if any(event["msg"] == "process_completed" for event in events(voted)):
                assert "Noted." in result(voted)[3]
                noted.append(question)
    except httpx.TransportError:
        pass  # it was killed


@pytest.mark.slow
def test_killed_while_people_vote_the_server_has_every_noted_vote(
    tmp_path: Path, pictures: list[Path]
) -> None:
    noted: list[str] = []
    with deadpan_serve(tmp_path) as (server, address):
        visitors = [
            threading.Thread(target=vote_until_the_end, args=(address, pictures[0], name, noted))
            for name in range(VISITORS)
        ]
        for visitor in visitors:
            visitor.start()
        while len(noted) < ENOUGH:
            assert server.poll() is None
            assert any(visitor.is_alive() for visitor in visitors)
            visitors[0].join(0.02)
        server.send_signal(signal.SIGKILL)
        for visitor in visitors:
            visitor.join(60)
    with Votes(tmp_path / "votes.db") as votes:
        stored = {vote.match.prompt: vote.outcome for vote in votes.all()}
    assert len(noted) >= ENOUGH
    assert [question for question in noted if question not in stored] == []
    assert set(stored.values()) == {Outcome.BOTH_DRY}
    assert len(stored) <= len(noted) + VISITORS

    # Started again it goes on where it was, and ends when it is told to.
    with deadpan_serve(tmp_path) as (server, address):
        returned = Visitor(address, "zh")
        ranking = result(returned.fire("arena", [], kind="select"))[0]
        counted = [int(n) for n in re.findall(r"<td>(\d+)</td><td>0</td><td>\d+</td>", ranking)]
        assert counted == [len(stored)] * 2
        server.terminate()
        assert server.wait(30) == 0
