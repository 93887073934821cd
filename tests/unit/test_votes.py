import json
import multiprocessing
import sqlite3
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deadpan.cli.main import app
from deadpan.data.pictures import PictureError
from deadpan.errors import DeadpanError
from deadpan.serve.votes import AlreadyVoted, Outcome, UnknownMatch, Votes, export

LEFT, RIGHT = ("nano", "一只猫。"), ("tuned", "它在等年终奖。")


def test_a_vote_reveals_its_match(tmp_path: Path, pictures: list[Path]) -> None:
    with Votes(tmp_path / "votes.db") as votes:
        match = votes.add_match(pictures[0], "讲一个梗", LEFT, RIGHT)
        other = votes.add_match(pictures[0], "讲一个梗", RIGHT, LEFT)
        assert votes.all() == []
        told = votes.vote(match, Outcome.RIGHT)
        assert (told.left, told.left_answer, told.right, told.right_answer) == (*LEFT, *RIGHT)
        assert told.prompt == "讲一个梗"
        assert told.picture.read_bytes() == pictures[0].read_bytes()
        assert [vote.outcome for vote in votes.all()] == [Outcome.RIGHT]
    assert match != other
    assert len(match) == 22, "128 bits"
    assert len(list((tmp_path / "votes-pictures").iterdir())) == 1, "one picture, kept once"


def test_a_match_has_one_vote(tmp_path: Path, pictures: list[Path]) -> None:
    with Votes(tmp_path / "votes.db") as votes:
        match = votes.add_match(pictures[0], "?", LEFT, RIGHT)
        votes.vote(match, Outcome.BOTH_DRY)
        with pytest.raises(AlreadyVoted, match="the first one counts"):
            votes.vote(match, Outcome.LEFT)
        with pytest.raises(UnknownMatch):
            votes.vote("guessed", Outcome.LEFT)
        assert [vote.outcome for vote in votes.all()] == [Outcome.BOTH_DRY]


def test_of_threads_that_vote_on_one_match_one_wins(tmp_path: Path, pictures: list[Path]) -> None:
    start = threading.Barrier(8)
    refused, accepted = [], []
    with Votes(tmp_path / "votes.db") as votes, Votes(tmp_path / "votes.db") as again:
        match = votes.add_match(pictures[0], "?", LEFT, RIGHT)

        def work(number: int) -> None:
            outcome = list(Outcome)[number % 4]
            start.wait()
            try:
                (votes, again)[number % 2].vote(match, outcome)
            except AlreadyVoted:
                refused.append(outcome)
            else:
                accepted.append(outcome)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(accepted), len(refused)) == (1, 7)
        assert [vote.outcome for vote in votes.all()] == accepted


def _vote_on_all(path: Path, start: object, results: object) -> None:
    with Votes(path) as votes:
        with sqlite3.connect(path) as database:
            matches = [row[0] for row in database.execute("SELECT id FROM matches ORDER BY id")]
        start.wait()  # type: ignore[attr-defined]
        won = 0
        for match in matches:
            try:
                votes.vote(match, Outcome.LEFT)
                won += 1
            except AlreadyVoted:
                pass
    results.put(won)  # type: ignore[attr-defined]


def test_of_processes_that_vote_on_one_match_one_wins(tmp_path: Path, pictures: list[Path]) -> None:
    path = tmp_path / "votes.db"
    with Votes(path) as votes:
        for _ in range(40):
            votes.add_match(pictures[0], "?", LEFT, RIGHT)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.SimpleQueue()
    workers = [context.Process(target=_vote_on_all, args=(path, start, results)) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert results.get() + results.get() == 40
    with Votes(path) as votes:
        assert len(votes.all()) == 40


def test_acknowledged_means_flushed(tmp_path: Path) -> None:
    with Votes(tmp_path / "votes.db") as votes:
        settings = [
            votes._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]


def test_a_broken_picture_makes_no_match(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with Votes(tmp_path / "votes.db") as votes:
        with pytest.raises(PictureError):
            votes.add_match(broken, "?", LEFT, RIGHT)
        assert votes._database.execute("SELECT count(*) FROM matches").fetchone() == (0,)
    assert not (tmp_path / "votes-pictures").exists()


def test_what_is_no_database_of_votes_is_left_alone(tmp_path: Path) -> None:
    text, foreign, newer = (tmp_path / name for name in ("notes.txt", "foreign.db", "newer.db"))
    text.write_text("no database " * 100)
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE theirs (x)")
    Votes(newer).close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 9")
    before = [path.read_bytes() for path in (text, foreign, newer)]
    for path, found in ((text, "not a database"), (foreign, "another program"), (newer, "9")):
        with pytest.raises(DeadpanError, match=found):
            Votes(path)
    assert [path.read_bytes() for path in (text, foreign, newer)] == before
    with pytest.raises(DeadpanError, match="no such database"):
        Votes(tmp_path / "absent.db", create=False)
    assert not (tmp_path / "absent.db").exists()


def test_a_full_disk_is_one_message_and_no_vote(tmp_path: Path, pictures: list[Path]) -> None:
    with Votes(tmp_path / "votes.db") as votes:
        match = votes.add_match(pictures[0], "?", LEFT, RIGHT)
        (pages,) = votes._database.execute("PRAGMA page_count").fetchone()
        votes._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DeadpanError, match="full"):
            votes.add_match(pictures[0], "?" * 1_000_000, LEFT, RIGHT)
        votes.vote(match, Outcome.LEFT)
        assert len(votes.all()) == 1


def test_pairs_are_the_votes_that_prefer_one(tmp_path: Path, pictures: list[Path]) -> None:
    path = tmp_path / "votes.db"
    with Votes(path) as votes:
        for outcome in Outcome:
            votes.vote(votes.add_match(pictures[0], "讲一个梗", LEFT, RIGHT), outcome)
        same = ("other", LEFT[1])
        votes.vote(votes.add_match(pictures[0], "讲一个梗", LEFT, same), Outcome.LEFT)
        votes.add_match(pictures[1], "nobody votes on this one", LEFT, RIGHT)
        beside, elsewhere = tmp_path / "pairs.jsonl", tmp_path / "far" / "pairs.jsonl"
        exported = export(votes, beside)
        export(votes, elsewhere)
    assert (exported.pairs, exported.ties, exported.equal) == (2, 2, 1)
    pairs = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (LEFT[1], RIGHT[1]),
        (RIGHT[1], LEFT[1]),
    ]
    assert {pair["prompt"] for pair in pairs} == {"讲一个梗"}
    assert set(pairs[0]) == {"image", "prompt", "chosen", "rejected"}
    assert (tmp_path / pairs[0]["image"]).read_bytes() == pictures[0].read_bytes()
    assert not Path(pairs[0]["image"]).is_absolute()
    far = json.loads(elsewhere.read_text(encoding="utf-8").splitlines()[0])["image"]
    assert Path(far).read_bytes() == pictures[0].read_bytes()


def test_the_verbs(tmp_path: Path, pictures: list[Path]) -> None:
    path = tmp_path / "votes.db"
    with Votes(path) as votes:
        assert CliRunner().invoke(app, ["votes", "ranking", str(path)]).output == "no votes yet\n"
        for _ in range(9):
            votes.vote(votes.add_match(pictures[0], "?", LEFT, RIGHT), Outcome.RIGHT)
        votes.vote(votes.add_match(pictures[0], "?", ("a", "1"), ("b", "2")), Outcome.BOTH_BAD)
    result = CliRunner().invoke(app, ["votes", "export", str(path), str(tmp_path / "p.jsonl")])
    assert "9 pairs; left out: 1 ties, 0 between equal answers" in result.output
    lines = CliRunner().invoke(app, ["votes", "ranking", str(path)]).output.splitlines()
    assert lines[2].split("│")[1].strip() == "tuned"
    assert lines[-1].endswith("cannot be compared: tuned and nano; a and b")
    rows = CliRunner().invoke(app, ["votes", "ranking", str(path), "--json"]).output.splitlines()
    best = json.loads(rows[0])
    assert (best["teller"], best["rank"], best["votes"], best["won"]) == ("tuned", 1, 9, 9)
