"""Small versions of the scripts that strain the server: load, and abuse."""

import asyncio

import pytest

import serve_abuse
import serve_load

pytestmark = pytest.mark.slow


def test_strangers_get_refusals_and_others_their_answers() -> None:
    with serve_load.serving() as (url, server):
        result = serve_abuse.abuse(url, server, requests=150, seed=1)
    assert result["wrong"] == []
    assert result["answers 5xx"] == 0
    kinds = {name.split(":")[0] for name in result["met"]}
    assert kinds >= {"no JSON", "breaks the schema", "damaged picture", "bomb", "too large"}


def test_a_crowd_is_answered_or_told_to_come_again() -> None:
    with serve_load.serving("--queue", "8") as (url, server):
        result = asyncio.run(serve_load.run(url, server, clients=24, seconds=5, tokens=8))
    assert result["errors"] == result["lost"] == 0
    assert result["met"]["answered"] > 0
    assert result["met"]["429"] > 0, "or the queue was never full, and nothing is tested"
