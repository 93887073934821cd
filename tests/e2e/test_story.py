"""The whole story by the command line, each step in a process of its own, as a user has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from command import Outcome, deadpan, forked


@pytest.fixture(scope="module")
def desk(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the user works in."""
    folder = tmp_path_factory.mktemp("desk")
    recipe = {
        "model": "nano",
        "device": "cpu",
        "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        "max_tiles": 4,
        "data": {"train": str(records), "workers": 0},
        "optimizer": {"lr": 5e-3},
        "epochs": 40,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_every_steps": 25,
        "keep_checkpoints": 1,
        "run": "runs/first",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def training(desk: Path) -> Outcome:
    (outcome,) = deadpan(desk, ["train", "recipe.yaml"])
    return outcome


@pytest.fixture(scope="module")
def exports(desk: Path, training: Outcome) -> dict[str, Outcome]:
    hf, adapter = (
        ["export", "runs/first", f"my out/{name}", "--layout", name] for name in ("hf", "adapter")
    )
    return {"hf": deadpan(desk, hf)[0], "adapter": forked(desk, adapter)[0]}


@pytest.fixture(scope="module")
def jokes(records: Path) -> list[str]:
    """What the model was taught to say about each picture."""
    return [sample["conversations"][1]["value"] for sample in json.loads(records.read_text())]


def test_the_data_are_looked_at_before_a_model_is(
    desk: Path, records: Path, pictures: list[Path]
) -> None:
    check, preview, stats = deadpan(
        desk,
        ["data", "check", records],
        ["data", "preview", records, "--out", "preview.html"],
        ["data", "stats", records, "--model", "nano", "--max-tiles", 4, "--json"],
    )
    assert (check.code, check.out) == (0, "4 records, 4 pictures: 0 errors, 0 warnings\n")
    assert preview.code == stats.code == 0
    page = (desk / "preview.html").read_text(encoding="utf-8")
    assert "上班第一天，我就想退休。" in page
    assert page.count("data:image/") == len(pictures)
    figures = json.loads(stats.out)
    assert figures["records"] == 4
    # The shortest answer has four characters; the template, the picture and the question come to it.
    assert figures["sample_tokens"]["minimum"] > 20


def test_recipes_are_listed_shown_and_copied(desk: Path) -> None:
    listed, shown, copied = deadpan(
        desk,
        ["recipe", "list"],
        ["recipe", "show", "internvl2-2b-lora", "optimizer.lr=1e-4"],
        ["recipe", "copy", "internvl2-2b-qlora", "mine"],
    )
    assert (listed.code, shown.code, copied.code) == (0, 0, 0)
    assert "internvl2-2b-qlora" in listed.out
    assert yaml.safe_load(shown.out)["lora"]["r"] == 128
    assert "lr: 0.0001\n" in shown.out
    copy = desk / "mine" / "internvl2-2b-qlora.yaml"
    assert yaml.safe_load(copy.read_text())["quantization"] == "nf4"
    assert str(copy.relative_to(desk)) in copied.out


def test_training_writes_a_run(desk: Path, training: Outcome) -> None:
    assert training.code == 0, training.error
    folder = desk / "runs" / "first"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 41))
    assert metrics[-1]["loss"] < 0.1 * metrics[0]["loss"]
    assert f"done: 40 steps, last loss {metrics[-1]['loss']:.4f}" in training.out
    assert "hear it: deadpan tell runs/first PICTURE" in training.out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000040"]
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (resolved["lora"]["r"], resolved["max_tiles"]) == (8, 4)
    assert (resolved["gradient_accumulation_steps"], resolved["schedule"]["name"]) == (2, "auto")


def test_every_export_reports_how_near_it_is(desk: Path, exports: dict[str, Outcome]) -> None:
    for layout, outcome in exports.items():
        assert outcome.code == 0, outcome.error
        report = json.loads((desk / "my out" / layout / "export.json").read_text())
        assert report["layout"] == layout
        assert report["source"].endswith("runs/first/checkpoints/step-000040")
        assert report["max_logit_difference"] <= report["limit"]
        assert outcome.out.startswith(f"wrote my out/{layout} ({layout})\n")
        assert f"{report['max_logit_difference']:.3g} of the source" in outcome.out
        assert f"limit {report['limit']:.3g}" in outcome.out
        assert f"hear it: deadpan tell 'my out/{layout}' PICTURE\n" in outcome.out


def test_the_run_and_every_export_say_the_jokes_that_were_taught(
    desk: Path, exports: dict[str, Outcome], pictures: list[Path], jokes: list[str]
) -> None:
    prompt = ["--prompt", "请你根据这张图片，讲一个脑洞大开的梗。"]
    models = ["runs/first", *(f"my out/{layout}" for layout in exports)]
    heard = [
        *deadpan(desk, ["tell", "runs/first", *pictures, *prompt]),
        *forked(desk, *(["tell", model, *pictures, *prompt, "--json"] for model in models)),
    ]
    assert [outcome.code for outcome in heard] == [0] * 4, heard[0].error
    expected = [f"{picture}: {joke}" for picture, joke in zip(pictures, jokes, strict=True)]
    assert heard[0].out.splitlines() == expected
    lines: list[list[dict[str, Any]]] = [
        [json.loads(line) for line in outcome.out.splitlines()] for outcome in heard[1:]
    ]
    assert [line["text"] for line in lines[0]] == jokes
    assert [line["picture"] for line in lines[0]] == list(map(str, pictures))
    assert {line["finish_reason"] for line in lines[0]} == {"stop"}
    # Token counts and all: the prompts are the same too.
    assert [export == lines[0] for export in lines[1:]] == [True] * 2


def test_a_model_in_the_official_layout_stays_in_it(
    desk: Path, tiny: Path, pictures: list[Path]
) -> None:
    """Nano has the Hugging Face layout alone, so this is told by the tiny model with random weights."""
    (trained,) = forked(
        desk, ["train", "recipe.yaml", f"model={tiny}", "run=runs/official", "max_steps=2"]
    )
    assert trained.code == 0, trained.error
    refused, exported = forked(
        desk,
        ["export", "nano", "out/refused", "--layout", "official"],
        ["export", "runs/official", "out/official", "--layout", "official"],
    )
    assert (refused.code, exported.code) == (1, 0), exported.error
    assert "--official-files" in refused.error
    assert not (desk / "out" / "refused").exists()
    heard = forked(
        desk,
        *[
            ["tell", model, pictures[0], "--json", "--max-new-tokens", 8]
            for model in ("runs/official", "out/official")
        ],
    )
    assert [outcome.code for outcome in heard] == [0, 0]
    assert json.loads(heard[0].out) == json.loads(heard[1].out)


def test_the_run_is_evaluated_and_drawn(desk: Path, training: Outcome, records: Path) -> None:
    evaluated, drawn, doctor = deadpan(
        desk,
        ["evaluate", "runs/first", records, "--out", "figures.json", "--answers", "answers.jsonl"],
        ["plot", "runs/first", "--out", "curve.svg"],
        ["doctor", "--json"],
    )
    assert (evaluated.code, drawn.code) == (0, 0), evaluated.error + drawn.error
    figures = json.loads((desk / "figures.json").read_text())["models"]["runs/first"]
    values = {metric["name"]: metric["value"] for metric in figures["metrics"]}
    assert (figures["questions"], values["verbatim from training"]) == (4, 1.0)
    assert len((desk / "answers.jsonl").read_text().splitlines()) == 4
    assert "<svg" in (desk / "curve.svg").read_text()
    assert json.loads(doctor.out)


def test_tellers_stand_side_by_side(
    desk: Path, exports: dict[str, Outcome], records: Path, pictures: list[Path], jokes: list[str]
) -> None:
    photos = desk / "photos"
    photos.mkdir()
    for picture in pictures[:2]:
        (photos / picture.name).write_bytes(picture.read_bytes())
    (photos / "torn.png").write_bytes(pictures[0].read_bytes()[:150])
    command = [
        "compare", "base=nano", "runs/first", "exported=my out/hf", "--data", records,
        "--prompt", "请你根据这张图片，讲一个脑洞大开的梗。", "--out", "side/page.html",
        # As a shell writes out a pattern.
        "--pictures", "photos", *pictures[2:],
    ]  # fmt: skip
    (told,) = deadpan(desk, command)
    assert (told.code, "Traceback" in told.error) == (1, False), told.error
    assert "not asked about: The picture is damaged" in told.error
    assert "photos/torn.png" in told.error
    assert "base: no verbatim from training" in told.out
    page = (desk / "side" / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4
    assert "broken, and shown to no teller: The picture is damaged" in page
    # The run has learned its four answers by heart, and its export says where it comes from.
    assert page.count("a training answer, word for word") == 8
    assert [page.count(joke) for joke in jokes] == [2, 2, 2, 2]
    assert page.count("<svg") == 1
    assert "first, exported" in page
    for text in ("2T1 accuracy", "the records have no stars", "base: it is not known what it was"):
        assert text in page
    kept = (desk / "side" / "page.answers.jsonl").read_bytes()
    (photos / "torn.png").unlink()
    (again,) = deadpan(desk, command)
    assert again.code == 0, again.error
    assert (desk / "side" / "page.answers.jsonl").read_bytes() == kept
    assert "broken" not in (desk / "side" / "page.html").read_text(encoding="utf-8")


def test_a_users_mistake_is_a_message_that_names_the_file(
    desk: Path,
    training: Outcome,
    records: Path,
    pictures: list[Path],
) -> None:
    broken = desk / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:150])
    samples = json.loads(records.read_text())
    for sample, picture in zip(samples, [broken, *pictures[1:]], strict=True):
        sample["image"] = str(picture)
    (desk / "broken.json").write_text(json.dumps(samples))
    (desk / "typo.yaml").write_text("model: m\ndata: {train: x.json}\nlora: {rank: 8}\n")
    light: dict[tuple[str, ...], list[str]] = {
        ("train", "missing.yaml"): ["There is no such recipe", "missing.yaml"],
        ("train", "typo.yaml"): ["'lora.rank' is unknown", "typo.yaml"],
    }
    heavy: dict[tuple[str, ...], list[str]] = {
        ("train", "recipe.yaml"): ["holds a run already", "where: runs/first", "--resume"],
        ("train", "recipe.yaml", "data.train=broken.json", "run=runs/second"): [
            "1 of 4 records cannot be trained on",
            "broken.json record 0",
            str(broken),
        ],
        ("train", "recipe.yaml", "model=out/nothing", "run=runs/second"): ["'out/nothing'"],
        ("tell", "./nothing", str(pictures[0])): ["There is no model './nothing'"],
        ("tell", "runs/first", str(broken)): [f"where: {broken}"],
        ("export", "runs/first", "runs"): ["exists already", "where: runs"],
        ("compare", "a=nano", "a=runs/first", "--data", "nano:held-out"): [
            "Two tellers are called 'a'",
            "NAME=runs/first",
        ],
        ("compare", "nano", "--pictures", "runs"): ["The folder has no pictures", "where: runs"],
        ("compare", "nano", str(broken)): ["None of the pictures can be opened", str(broken)],
        ("compare", "nano", str(pictures[0]), "--out", "x.png"): ["--out x.html"],
        ("compare", str(pictures[0])): ["nothing to compare"],
    }
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    outcomes = dict(
        zip([*light, *heavy], [*deadpan(desk, *light), *forked(desk, *heavy)], strict=True)
    )
    for command, texts in {**light, **heavy}.items():
        outcome = outcomes[command]
        assert (outcome.code, outcome.out) == (1, ""), command
        assert "Traceback" not in outcome.error
        assert "error: " in outcome.error
        assert [text for text in texts if text not in outcome.error] == []
    assert {path: path.stat().st_mtime_ns for path in desk.rglob("*")} == before
