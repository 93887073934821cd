"""Tellers found and named, pictures found, and what was heard kept."""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deadpan import nano
from deadpan.checkpoints.load import load as load_checkpoint
from deadpan.compare.comparing import Plan, compare, find_pictures
from deadpan.compare.page import Column, page_of
from deadpan.compare.tellers import Teller, about, tellers
from deadpan.data.records import load as load_records
from deadpan.engines.base import GenerationSettings
from deadpan.errors import DeadpanError
from deadpan.evaluate import hearing
from deadpan.evaluate.answers import Answer
from deadpan.evaluate.answers import ask as put
from deadpan.evaluate.evaluation import VERBATIM, Evaluation
from deadpan.evaluate.kept import Kept
from deadpan.report.curves import Curve
from deadpan.report.words import Bilingual
from deadpan.train.run_folder import run_of
from deadpan.train.split import learned


@contextmanager
def _stage(name: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def bars(label: str) -> Any:
    return _stage


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The questions that reach an engine, which answers each by a number of its own."""
    heard: list[Any] = []

    def ask(engine: object, questions: Any, settings: GenerationSettings) -> Iterator[Answer]:
        for question in questions:
            heard.append((question.pictures[0].name, settings))
            yield Answer(question.pictures[0].name, "?", f"answer {len(heard)}", True)

    monkeypatch.setattr(hearing, "ask", ask)
    return heard


def plan(tiny: Path, pictures: list[Path], **changes: Any) -> Plan:
    values = {
        "tellers": tellers([f"one={tiny}"]),
        "pictures": find_pictures(pictures, changes.pop("prompt", "讲一个笑话")),
        "settings": GenerationSettings(4),
        "device": "cpu",
    }
    return Plan(**{**values, **changes})


def test_a_teller_is_called_by_its_folder_or_as_one_says(tiny: Path) -> None:
    named = tellers(["nano", str(tiny), f"我的={tiny}"])
    assert [teller.label for teller in named] == ["nano", "official", "我的"]
    assert [teller.folder for teller in named] == [nano.BASE, tiny, tiny]
    assert named[0].facts == {"model": "nano"}


def test_a_checkpoint_is_called_by_its_run_too(tiny: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000010"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(tiny)
    (tmp_path / "first" / "best").symlink_to(checkpoint)
    named = tellers([str(checkpoint), str(tmp_path / "first" / "best"), str(tmp_path / "first")])
    assert [teller.label for teller in named] == ["first/step-000010", "first/best", "first"]


def test_two_tellers_of_one_name_are_refused_with_what_to_type(tiny: Path) -> None:
    with pytest.raises(DeadpanError, match="Two tellers are called 'nano'") as caught:
        tellers(["nano", "official=nano", f"nano={tiny}"])
    assert caught.value.fix == f"give one another name: NAME={tiny}"
    for bad in ("=nano", "name="):
        with pytest.raises(DeadpanError, match="no name or no model"):
            tellers([bad])


def test_pictures_of_a_folder_are_found_and_a_broken_one_is_named(
    pictures: list[Path], tmp_path: Path
) -> None:
    for name in ("b.PNG", "a.jpg", "odd"):
        (tmp_path / name).write_bytes(pictures[0].read_bytes())
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.png").write_bytes(pictures[0].read_bytes())
    (tmp_path / "broken.webp").write_bytes(pictures[0].read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    found = find_pictures([tmp_path / "odd", tmp_path, tmp_path / "a.jpg"], "问<image>题")
    assert [q.pictures[0].name for q in found.questions] == ["odd", "a.jpg", "b.PNG", "c.png"]
    assert found.questions[0].turns[0].text == "问<image>题"
    assert [Path(str(error.where)).name for error in found.broken] == ["broken.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeadpanError, match="The folder has no pictures"):
        find_pictures([tmp_path / "empty"], "问题")
    with pytest.raises(DeadpanError, match="no such picture"):
        find_pictures([tmp_path / "absent"], "问题")
    for name in ("nano:held-out", "records.jsonl"):
        with pytest.raises(DeadpanError, match="These are records") as caught:
            find_pictures([Path(name)], "问题")
        assert str(caught.value.fix).startswith(f"--data {name} instead")


def test_a_run_is_known_by_its_checkpoints_and_exports(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    assert run_of(checkpoint) is None
    (tmp_path / "run" / "recipe.yaml").write_text("model: nano")
    assert run_of(checkpoint) == tmp_path / "run"
    export = tmp_path / "export"
    export.mkdir()
    assert run_of(export) is None
    (export / "export.json").write_text(json.dumps({"source": str(checkpoint)}))
    assert run_of(export) == tmp_path / "run"
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert run_of(export) is None


def test_a_run_that_went_on_from_another_has_learned_its_answers_too(
    records: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "first" / "latest").symlink_to(checkpoint)
    first = {"model": "nano", "data": {"train": str(records)}}
    (tmp_path / "first" / "recipe.yaml").write_text(json.dumps(first))
    pair = {"image": None, "prompt": "讲", "chosen": "好聚好伞。", "rejected": "一把伞。"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair, ensure_ascii=False), encoding="utf-8")
    liked = {"model": "nano", "adapter": str(tmp_path / "first"), "objective": "dpo",
             "data": {"train": str(tmp_path / "pairs.jsonl")}}  # fmt: skip
    (tmp_path / "liked").mkdir()
    (tmp_path / "liked" / "recipe.yaml").write_text(json.dumps(liked))
    jokes = [sample["conversations"][1]["value"] for sample in json.loads(records.read_text())]
    assert learned(tmp_path / "first") == jokes
    assert learned(tmp_path / "liked") == ["好聚好伞。", *jokes]


def test_a_run_that_lost_its_recipe_and_log_is_still_a_teller(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: nano\nunknown_key: 1\n")
    teller = about("one", tiny, tmp_path)
    assert teller.tuned
    assert teller.learned is teller.curve is None
    recipe, curve = teller.notes
    assert recipe.en.startswith("one: its recipe cannot be read: ")
    assert recipe.zh.startswith("one：读不出它的配方：")
    for text in (recipe.en, recipe.zh):
        assert "unknown_key" in text
    assert "no log" in curve.en
    (tmp_path / "recipe.yaml").write_text("model: nano\ndata: {train: gone.json}\n")
    learned, _ = about("one", tiny, tmp_path).notes
    assert "training answers are not marked" in learned.en
    assert "gone.json" in learned.en


def test_tellers_of_one_run_share_its_curve_and_what_is_missing_of_runs_is_said() -> None:
    def column(label: str, run: str, skipped: dict[str, str]) -> Column:
        curve = Curve(run, Path(run), (1,), (2.0,), (), (), None, None)
        lacking = Bilingual(f"{label} lacks its records", f"{label}没有数据")
        teller = Teller(label, Path(), {}, True, None, curve, [lacking])
        return Column(teller, [], Evaluation(1, (), skipped))

    no_stars = "the records have no stars"
    columns = [
        column("early", "a", {"ranking": no_stars, "verbatim": "not known"}),
        column("other", "b", {"ranking": no_stars}),
        column("late", "a", {"ranking": no_stars, "verbatim": "not known"}),
    ]
    torn = Bilingual("torn.png is torn", "torn.png 坏了")
    page = page_of(title="", asked=[], columns=columns, settings={}, notes=[torn])
    assert [curve.name for curve in page.curves] == ["early, late", "other"]
    assert [teller.curve for teller in page.tellers] == [0, 1, 0]
    assert page.notes == [torn, *(n for c in columns for n in c.teller.notes)]
    # Once for all tellers, or with the names of those that it holds for.
    assert page.skipped == [
        ("ranking", Bilingual(no_stars, "数据没有点赞数")),
        ("verbatim", Bilingual("early, late: not known", "early, late：not known")),
    ]


def test_answers_are_marked_by_what_their_own_teller_was_trained_on(pictures: list[Path]) -> None:
    asked = find_pictures(pictures[:1], "问题").questions
    answers = [[Answer("", "", "雨伞分手时只说：好聚好伞。", True)]]

    def teller(label: str, learned: list[str] | None) -> Column:
        return Column(Teller(label, Path(), {}, True, learned), answers, None)

    columns = [teller("base", None), teller("a", ["好聚好伞"]),
               teller("b", ["雨伞分手时只说：好聚好伞！"]), teller("c", ["雨伞分手时只说好聚好散。"])]  # fmt: skip
    page = page_of(title="", asked=asked, columns=columns, settings={})
    assert page.question == "问题"
    assert [(said.source, said.verbatim) for (said,) in page.rows[0].answers] == [
        (None, False),
        (None, False),
        ("雨伞分手时只说：好聚好伞！", True),
        ("雨伞分手时只说好聚好散。", False),
    ]
    assert [teller.learned for teller in page.tellers] == [False, True, True, True]


def test_what_was_heard_is_not_asked_again_and_what_is_new_is(
    tiny: Path, pictures: list[Path], tmp_path: Path, asked: list[Any], monkeypatch: Any
) -> None:
    out = tmp_path / "page.html"
    first = compare(plan(tiny, pictures[:2]), out, bars)
    page = out.read_bytes()
    assert [name for name, _ in asked] == [path.name for path in pictures[:2]]
    monkeypatch.setattr(hearing, "load", lambda *_, **__: pytest.fail("loaded for nothing"))
    again = compare(plan(tiny, pictures[:2]), out, bars)
    assert (len(asked), again, out.read_bytes()) == (2, first, page)
    monkeypatch.setattr(hearing, "load", load_checkpoint)
    # Other settings, another question, another teller: nothing that was heard holds.
    for changes in (
        {"settings": GenerationSettings(5)},
        {"prompt": "别的问题"},
        {"dtype": "bf16"},
        {"tellers": tellers(["nano"])},
    ):
        asked.clear()
        compare(plan(tiny, pictures[:2], **changes), out, bars)
        assert len(asked) == 2
    asked.clear()
    compare(plan(tiny, pictures[:2]), out, bars)
    assert asked == []


def test_a_killed_comparison_goes_on_and_ends_as_if_it_had_not_been(
    tiny: Path, pictures: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    settings = GenerationSettings(6, temperature=1.5, seed=3)
    # Four pictures of three answers: two to a batch.
    wanted = plan(tiny, pictures, settings=settings, samples=3)
    whole = compare(wanted, tmp_path / "whole.html", bars)
    batches: list[tuple[int, int | None]] = []

    def stopped(engine: Any, questions: Any, settings: GenerationSettings) -> Iterator[Answer]:
        batches.append((len(questions), settings.seed))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return put(engine, questions, settings)

    monkeypatch.setattr(hearing, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, tmp_path / "killed.html", bars)
    log = tmp_path / "killed.answers.jsonl"
    log.write_bytes(log.read_bytes() + b'{"key": "half')
    resumed = compare(wanted, tmp_path / "killed.html", bars)
    assert batches == [(6, 3), (6, 5), (6, 5)]
    assert resumed == whole
    assert (tmp_path / "killed.html").read_bytes() == (tmp_path / "whole.html").read_bytes()
    assert log.read_bytes() == (tmp_path / "whole.answers.jsonl").read_bytes()
    texts = {answer.text for said in whole[0].answers for answer in said}
    assert len(texts) > 4


def test_a_teller_is_gone_before_the_next_is_loaded(
    tiny: Path, pictures: list[Path], tmp_path: Path, asked: list[Any], monkeypatch: Any
) -> None:
    models: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert all(model() is None for model in models)
        loaded = load_checkpoint(*arguments, **settings)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(hearing, "load", watched)
    gc.disable()
    try:
        two = tellers([f"a={tiny}", "b=nano"])
        compare(plan(tiny, pictures[:1], tellers=two), tmp_path / "page.html", bars)
    finally:
        gc.enable()
    assert len(models) == 2


def test_records_are_evaluated_and_their_pictures_shown_where_none_is_named(
    tiny: Path, records: Path, tmp_path: Path, asked: list[Any]
) -> None:
    read = load_records(records)
    wanted = plan(tiny, [], data=records, records=read)
    (column,) = compare(wanted, tmp_path / "page.html", bars)
    # Once each: what is shown is what is evaluated.
    assert len(asked) == len(column.answers) == 4
    assert column.evaluation is not None
    figures = {found.name: found for found in column.evaluation.metrics}
    assert figures["joke form"].n == figures["held-out loss"].n == 4
    assert figures["held-out loss"].low is not None
    assert VERBATIM not in figures
    assert figures["2T1 accuracy"].chance == 0.5
    assert column.evaluation.skipped["ranking"] == "the records have no stars"
    (again,) = compare(wanted, tmp_path / "page.html", bars)
    assert again.evaluation == column.evaluation
    drawn = plan(tiny, [], data=records, records=read, samples=2,
                 settings=GenerationSettings(4, temperature=1.0, seed=0))  # fmt: skip
    asked.clear()
    compare(drawn, tmp_path / "page.html", bars)
    # Evaluation is greedy whatever is shown, and that was heard before.
    assert [settings.temperature for _, settings in asked] == [1.0] * 8
    asked.clear()
    compare(replace(drawn, samples=1), tmp_path / "page.html", bars)
    assert len(asked) == 4


def test_several_answers_without_drawing_are_refused(tiny: Path, pictures: list[Path]) -> None:
    with pytest.raises(DeadpanError, match="all be the same"):
        plan(tiny, pictures, samples=2)


def test_a_damaged_line_of_kept_answers_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    Kept(file, {"teller": 1}).keep({"asked": 1}, "好")
    assert Kept(file, {"teller": 1}).recall({"asked": 1}) == "好"
    assert Kept(file, {"teller": 2}).recall({"asked": 1}) is None
    file.write_text("not json\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DeadpanError, match="damaged") as caught:
        Kept(file, {})
    assert caught.value.where == f"{file} line 1"
    with pytest.raises(DeadpanError, match="cannot be kept"):
        Kept(tmp_path, {})
