"""Kill processes that vote, again and again, and look whether every acknowledged vote is there.

    python tests/voting.py --rounds 50 --voters 4

Each round starts processes that make matches and vote on them as fast as they can, each vote reported through a pipe
once it is acknowledged; kills all of them at once with SIGKILL at a random moment; opens the database again, has
SQLite check it, and looks every reported vote up. A kill takes the process and not the machine: that a vote outlives a
power cut is SQLite's promise for `synchronous=FULL`, and is not measured here.
"""

import argparse
import os
import random
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

from PIL import Image

from deadpan.serve.votes import Outcome, Votes


def vote_for_ever(database: Path, picture: Path, told: int, seed: int) -> None:
    """Make matches and vote on them, and report each vote that is acknowledged."""
    choice = random.Random(seed)
    with Votes(database) as votes:
        while True:
            match = votes.add_match(picture, "?", ("a", "1"), ("b", "2"))
            outcome = choice.choice(list(Outcome))
            votes.vote(match, outcome)
            # One write of few bytes to a pipe arrives whole or not at all.
            os.write(told, f"{match} {outcome}\n".encode())


def kill_voters(
    database: Path, picture: Path, voters: int, seconds: float, seed: int
) -> dict[str, str]:
    """Let processes vote for a while and kill them all: the acknowledged votes by match."""
    reading, told = os.pipe()
    children = []
    for number in range(voters):
        child = os.fork()
        if not child:
            try:
                os.close(reading)
                vote_for_ever(database, picture, told, seed * voters + number)
            finally:
                os._exit(1)
        children.append(child)
    os.close(told)
    # Read meanwhile, or the pipe would fill up and the voters wait.
    end, received = time.monotonic() + seconds, b""
    os.set_blocking(reading, False)
    while time.monotonic() < end:
        try:
            received += os.read(reading, 2**16)
        except BlockingIOError:
            time.sleep(0.001)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a voter ended by itself"
    while chunk := os.read(reading, 2**16):
        received += chunk
    os.close(reading)
    lines = received.decode().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def stored(database: Path) -> dict[str, str]:
    """The votes in the database by match, which SQLite has checked."""
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        return dict(connection.execute("SELECT match, outcome FROM votes").fetchall())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--voters", type=int, default=4)
    arguments = parser.parse_args()
    moments = random.Random(0)
    acknowledged: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        database, picture = Path(folder, "votes.db"), Path(folder, "picture.png")
        Image.new("RGB", (64, 64), "teal").save(picture)
        for number in range(arguments.rounds):
            seconds = moments.uniform(0.05, 1.0)
            acknowledged |= kill_voters(database, picture, arguments.voters, seconds, number)
        found = stored(database)
    lost = [match for match, outcome in acknowledged.items() if found.get(match) != outcome]
    print(
        f"{arguments.rounds} rounds of {arguments.voters} voters, each killed: {len(acknowledged):,} votes "
        f"acknowledged, {len(lost)} of them lost; {len(found) - len(acknowledged):,} stored whose "
        "acknowledgement had not arrived"
    )
    if lost or not acknowledged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
