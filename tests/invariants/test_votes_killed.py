"""Processes are killed while they vote: every vote that was acknowledged is there, once, and nothing is damaged."""

import random
from pathlib import Path

import pytest

from deadpan.serve.votes import Outcome, Votes
from voting import kill_voters, stored

ROUNDS = 10


@pytest.mark.slow
def test_killed_while_they_vote_no_acknowledged_vote_is_lost(
    tmp_path: Path, pictures: list[Path]
) -> None:
    database, moments = tmp_path / "votes.db", random.Random(0)
    acknowledged: dict[str, str] = {}
    for number in range(ROUNDS):
        seconds = moments.uniform(0.2, 0.5)
        told = kill_voters(database, pictures[0], voters=3, seconds=seconds, seed=number)
        acknowledged |= told
    found = stored(database)
    assert len(acknowledged) > 3 * ROUNDS, "they were at it when they were killed"
    assert {match: found.get(match) for match in acknowledged} == acknowledged
    # A voter has at most one vote on its way when it is killed.
    assert len(found) - len(acknowledged) <= 3 * ROUNDS
    # And the database goes on.
    with Votes(database) as votes:
        match = votes.add_match(pictures[0], "?", ("a", "1"), ("b", "2"))
        votes.vote(match, Outcome.BOTH_BAD)
        assert len(votes.all()) == len(found) + 1
    kept = list((tmp_path / "votes-pictures").glob("[!.]*"))
    assert [path.read_bytes() for path in kept] == [pictures[0].read_bytes()]
