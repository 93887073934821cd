"""vLLM and LMDeploy behind the engine protocol, held against the builtin engine by stand-ins."""

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import deadpan
from deadpan.checkpoints.export import _write
from deadpan.checkpoints.load import load as load_checkpoint
from deadpan.checkpoints.source import Layout, resolve
from deadpan.cli.main import app
from deadpan.data.records import PROMPT, Turn
from deadpan.engines.base import Engine, GenerationSettings, Joke, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.engines.concurrent import _pieces
from deadpan.errors import DeadpanError
from deadpan.serve.tellers import Tellers
from deadpan.teller import Teller, request
from standins import install, model_in
from training import recipes, train

GREEDY = GenerationSettings(max_new_tokens=8)
DTYPE = {"vllm": "fp32", "lmdeploy": "bf16"}
"""One in which each can be held against the builtin engine on a CPU."""


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export writes, without its comparison in a fresh process."""
    folder = tmp_path_factory.mktemp("exported")
    _write(load_checkpoint(tiny, device="cpu"), folder, Layout.HF, torch.float32, None)
    return folder


@pytest.fixture(scope="module", params=["vllm", "lmdeploy"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def teller(name: str, exported: Path) -> Iterator[Teller]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        teller = deadpan.load(exported, engine=name, dtype=DTYPE[name])
        yield teller
        teller.close()
        assert model_in(teller.engine).closed


@pytest.fixture
def builtin(name: str, exported: Path) -> Engine:
    return BuiltinEngine(load_checkpoint(exported, device="cpu", dtype=DTYPE[name]), batch_size=1)


@pytest.fixture(scope="module")
def requests(pictures: list[Path]) -> list[Request]:
    images = [Image.open(path).convert("RGB") for path in pictures]
    history = [Turn("human", "<image>\n一只猫。"), Turn("gpt", "冷。"), Turn("human", "Why?")]
    return [
        Request([], [Turn("human", "Tell me a joke.")]),
        Request([images[3]], [Turn("human", f"<image>\n{PROMPT}")]),
        Request(images[1:3], [Turn("human", "<image> and <image>: which is funnier?")]),
        Request([images[2]], history),
    ]


def test_the_same_answers_as_the_builtin_engine(
    teller: Teller, builtin: Engine, requests: list[Request]
) -> None:
    jokes = teller.engine.generate(requests, GREEDY)
    assert jokes == builtin.generate(requests, GREEDY)
    assert len({joke.text for joke in jokes}) == len(requests)
    assert teller.engine.generate([], GREEDY) == []


def test_a_stop_token_ends_an_answer_and_is_counted(
    name: str, teller: Teller, builtin: Engine, requests: list[Request]
) -> None:
    """The third greedy token is declared to be the template's stop token, for all concerned."""
    processor, other = teller.processor, builtin._processor  # type: ignore[attr-defined]
    ids = processor.tokenizer(builtin.generate(requests[1:2], GREEDY)[0].text)["input_ids"]
    stop = processor.stop_id
    try:
        processor.stop_id = other.stop_id = ids[4]
        other_model = builtin._model  # type: ignore[attr-defined]
        other_model.generation_config.eos_token_id = ids[4]
        (joke,) = teller.engine.generate(requests[1:2], GREEDY)
        assert joke.finish_reason == "stop"
        assert joke.tokens < GREEDY.max_new_tokens
        assert [joke] == builtin.generate(requests[1:2], GREEDY)
        assert finished(teller.engine, requests[1]) == joke
    finally:
        processor.stop_id = stop


def finished(engine: Engine, request: Request) -> Joke:
    """What a stream returns; its pieces are the text."""
    told: list[Joke] = []

    def read() -> Iterator[str]:
        told.append((yield from engine.stream(request, GREEDY)))

    pieces = list(read())
    assert "".join(pieces) == told[0].text
    assert all(pieces)
    return told[0]


def test_a_stream_is_the_same_answer_in_pieces(teller: Teller, requests: list[Request]) -> None:
    for question, joke in zip(requests, teller.engine.generate(requests, GREEDY), strict=True):
        assert finished(teller.engine, question) == joke


def test_a_character_of_several_tokens_is_told_whole(teller: Teller) -> None:
    ids = teller.processor.choice(" 饿了 饿 ")
    parts = [[token] for token in ids]
    assert len(parts) > 6
    told = list(_pieces(teller.processor, parts))
    assert "".join(told) == "饿了 饿"
    assert not [piece for piece in told if "\ufffd" in piece]
    assert len(told) > 1


def test_the_same_scores_as_the_builtin_engine(
    name: str, teller: Teller, builtin: Engine, requests: list[Request]
) -> None:
    choices = ["冷得像周一。", "Why is it funny?", "一只猫。"]
    tolerance = 1e-3 if DTYPE[name] == "fp32" else 0.3
    for question in requests[:2]:
        scores = teller.engine.score(question, choices)
        assert scores == pytest.approx(builtin.score(question, choices), abs=tolerance)
        assert len(set(scores)) == len(choices)


def test_questions_are_in_the_engine_together(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    """Of one batch, and of many askers: no answer is given before all have been asked."""
    install(monkeypatch)
    engine = deadpan.load(exported, engine=name, dtype=DTYPE[name]).engine
    model = model_in(engine)
    model.wanted = len(requests)
    assert len(engine.generate(requests, GREEDY)) == len(requests)
    assert model.most_inside == len(requests)

    async def ask() -> None:
        model.wanted, model.most_inside = 5, 0
        model._enough.clear()
        tellers = Tellers({"big": engine}, batch_size=5)
        asked = [tellers.tell("big", [], f"{number}?", GREEDY) for number in range(4)]
        pieces = tellers.stream("big", [], "streamed?", GREEDY)

        async def read() -> list[str]:
            return [piece async for piece in pieces]

        *jokes, told = await asyncio.gather(*asked, read())
        assert all(jokes)
        assert told
        assert model.most_inside == 5
        await tellers.close()

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert model.closed
    assert not [thread for thread in threading.enumerate() if thread.name == "teller big"]


def test_a_reader_who_goes_frees_the_engine(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    install(monkeypatch)
    engine = deadpan.load(exported, engine=name, dtype=DTYPE[name]).engine
    model = model_in(engine)
    model.pause = 0.5
    stream = engine.stream(requests[0], GREEDY)
    assert next(stream)
    assert not model.left.is_set()
    stream.close()
    assert model.left.wait(20)
    engine.close()


def test_drawing_is_as_asked_and_differs_within_a_batch(
    name: str, teller: Teller, requests: list[Request]
) -> None:
    drawn = GenerationSettings(4, temperature=0.7, top_p=0.9, seed=5)
    model = model_in(teller.engine)
    model.sampling.clear()
    teller.engine.generate([requests[1]] * 3, drawn)
    told = model.sampling
    if name == "vllm":
        assert sorted(sampling.seed for sampling in told) == [5, 6, 7]
        assert {(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in told} == {(0.7, 0.9, 0, 4)}
        # One picture, one digest; the others of this module's requests have others.
        assert len(set(model.digests[-3:])) == 1
        assert len(set(model.digests)) == 4
    else:
        assert sorted(sampling.random_seed for sampling in told) == [5, 6, 7]
        assert {(s.do_sample, s.temperature, s.top_p, s.top_k, s.max_new_tokens) for s in told} == {
            (True, 0.7, 0.9, 0, 4)
        }


def test_an_engine_is_started_by_what_the_export_says(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    teller = deadpan.load(exported, engine=name, memory=0.5, max_tiles=3)
    arguments = model_in(teller.engine).arguments
    assert arguments.dtype == "bfloat16"
    assert teller.model is None
    assert teller.processor.tile_policy.max_tiles == 3
    if name == "vllm":
        assert arguments.model == str(exported)
        assert arguments.max_model_len == 4096  # what the tiny model has positions for
        assert arguments.gpu_memory_utilization == 0.5
        assert signal.SIGINT in teller.engine._llm.blocked  # type: ignore[attr-defined]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    else:
        assert arguments.session_len == 4096
        assert arguments.cache_max_entry_count == pytest.approx(0.45)
    teller.close()


def test_what_fails_is_one_message(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch, requests: list[Request]
) -> None:
    install(monkeypatch)
    with pytest.raises(DeadpanError, match="cannot start") as failed:
        deadpan.load(exported, engine=name, memory=0.05)
    assert failed.value.found in (
        "Engine core initialization failed. See root cause above.",
        "No enough gpu memory for kv cache.",
    )
    teller = deadpan.load(exported, engine=name, dtype=DTYPE[name])
    model_in(teller.engine).fails = "abort"
    with pytest.raises(DeadpanError, match="gave up the answer"):
        teller.engine.generate(requests, GREEDY)
    model_in(teller.engine).fails = None
    bad = Request([], [Turn("human", "<image>")], "the bad one")
    with pytest.raises(DeadpanError, match="do not match") as failed:
        teller.engine.generate([requests[0], bad], GREEDY)
    assert failed.value.where == "the bad one"
    teller.close()


def test_a_missing_engine_is_explained(
    name: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deadpan.engines.concurrent.find_spec", lambda _: None)
    with pytest.raises(DeadpanError, match=f"The engine {name} is not installed") as failed:
        deadpan.load(exported, engine=name)
    assert failed.value.fix is not None
    assert f"pip install 'deadpan[{name}]'" in failed.value.fix


def test_an_engine_that_cannot_be_imported_is_explained(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.delitem(sys.modules, "vllm.sampling_params")
    with pytest.raises(DeadpanError, match="cannot be imported") as failed:
        deadpan.load(exported, engine="vllm")
    assert failed.value.found == "No module named 'vllm.sampling_params'"


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"attention": "flash"}, "does not take --attention", "--engine builtin with --attention"),
        ({"quantization": "nf4"}, "does not take --quantization", "leave it out"),
        ({"base": "nano"}, "does not take --base", "leave it out"),
        ({"device": "cpu"}, "computes on the first GPU", "CUDA_VISIBLE_DEVICES"),
        ({"dtype": "bf61"}, "does not compute in 'bf61'", "bf16"),
    ],
)
def test_options_that_are_the_builtin_engines_are_refused(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    what: str,
    hint: str,
) -> None:
    install(monkeypatch)
    with pytest.raises(DeadpanError, match=what) as failed:
        deadpan.load(exported, engine="vllm", **options)
    assert hint in (failed.value.fix or "")


def test_what_is_no_export_is_told_how_to_become_one(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with pytest.raises(DeadpanError, match="loads whole models") as failed:
        deadpan.load(tiny, engine=name)
    assert failed.value.found == "a model in the official layout"
    assert f"deadpan export {tiny} exported --layout hf" in (failed.value.fix or "")
    if name == "vllm":
        return
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DeadpanError, match="loads whole models") as failed:
        deadpan.load(tmp_path, engine=name, base="elsewhere")
    assert failed.value.found == "an adapter"
    assert f"deadpan export {tmp_path} --base elsewhere exported" in (failed.value.fix or "")


@pytest.fixture(scope="module")
def adapters(
    exported: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Path]:
    """By whether the projector was trained beside the language model."""
    runs = tmp_path_factory.mktemp("runs")
    make = recipes(exported, records)
    for projector in (False, True):
        train(
            make(
                runs / str(projector),
                train_projector=projector,
                max_steps=1,
                lora={"r": 9},
                optimizer={"lr": 3e-2},
            )
        )
    return {projector: runs / str(projector) for projector in (False, True)}


def test_vllm_puts_an_adapter_on_its_base(
    adapters: dict[bool, Path],
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[Request],
) -> None:
    install(monkeypatch)
    teller = deadpan.load(adapters[False], engine="vllm", dtype="fp32")
    arguments = model_in(teller.engine).arguments
    assert arguments.model == str(exported)
    assert (arguments.enable_lora, arguments.max_lora_rank) == (True, 16)
    jokes = teller.engine.generate(requests, GREEDY)
    builtin = BuiltinEngine(load_checkpoint(adapters[False], device="cpu", dtype="fp32"))
    assert jokes == builtin.generate(requests, GREEDY)
    plain = BuiltinEngine(load_checkpoint(exported, device="cpu", dtype="fp32"))
    assert jokes != plain.generate(requests, GREEDY)
    choices = ["冷得像周一。", "一只猫。"]
    scores = teller.engine.score(requests[1], choices)
    assert scores == pytest.approx(builtin.score(requests[1], choices), abs=1e-3)
    teller.close()


def test_an_adapter_that_vllm_does_not_put_on_a_model(
    adapters: dict[bool, Path],
    tiny: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    with pytest.raises(DeadpanError, match="the language model alone") as failed:
        deadpan.load(adapters[True], engine="vllm")
    assert failed.value.found == "multi_modal_projector trained whole beside it"
    assert "train_projector=false" in (failed.value.fix or "")
    with pytest.raises(DeadpanError, match="on a whole model in the layout hf") as failed:
        deadpan.load(adapters[False], engine="vllm", base=tiny)
    assert f"deadpan export {tiny} base-hf --layout hf" in (failed.value.fix or "")
    with pytest.raises(DeadpanError, match="loads whole models"):
        deadpan.load(adapters[False], engine="lmdeploy")

    checkpoint = resolve(adapters[False])
    for path in checkpoint.iterdir():
        copyfile(path, tmp_path / path.name)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 513}))
    with pytest.raises(DeadpanError, match="rank is more than vllm takes") as failed:
        deadpan.load(tmp_path, engine="vllm")
    assert (failed.value.expected, failed.value.found) == ("at most 512", "513")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    with pytest.raises(DeadpanError, match="does not take the adapter"):
        deadpan.load(tmp_path, engine="vllm")
    assert not [thread for thread in threading.enumerate() if thread.name == "vllm"]


def test_an_export_names_the_class_by_which_lmdeploy_finds_its_language_model(
    exported: Path,
) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]


def test_the_command_line_tells_one_picture_and_a_folder(
    name: str,
    exported: Path,
    pictures: list[Path],
    builtin: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    options = ["--engine", name, "--dtype", DTYPE[name], "--max-new-tokens", "8"]
    # The folder's pictures are told in one go, more of them than the builtin engine takes at once.
    for number in range(12):
        copyfile(pictures[number % 4], tmp_path / f"{number:02}.png")
    out = tmp_path / "jokes.jsonl"
    command = ["tell", str(exported), "--pictures", str(tmp_path), "--out", str(out), *options]
    result = CliRunner().invoke(app, command)
    assert result.exception is None, result.output
    told = [json.loads(line)["answers"] for line in out.read_text().splitlines()]
    expected = builtin.generate([request(path, PROMPT) for path in pictures], GREEDY)
    assert told == [[expected[number % 4].text] for number in range(12)]
    settings = json.loads((tmp_path / "jokes.settings.json").read_text())
    assert settings["engine"] == name

    single = CliRunner().invoke(app, ["tell", str(exported), str(pictures[0]), *options])
    assert single.output.strip() == expected[0].text.strip()


def test_an_export_that_lmdeploy_would_not_find_the_code_for_is_written_anew(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    for path in exported.iterdir():
        copyfile(path, tmp_path / path.name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["architectures"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeadpanError, match="does not name") as failed:
        deadpan.load(tmp_path, engine="lmdeploy")
    assert f"deadpan export {tmp_path} exported" in (failed.value.fix or "")
    deadpan.load(tmp_path, engine="vllm").close()


def test_without_a_gpu_or_by_an_unknown_name(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("deadpan.engines.exported.best_device", lambda: "cpu")
    with pytest.raises(DeadpanError, match="vllm needs an NVIDIA GPU"):
        deadpan.load(exported, engine="vllm")
    with pytest.raises(DeadpanError, match="engine 'vlm' is unknown") as failed:
        deadpan.load(exported, engine="vlm")
    assert failed.value.fix == "did you mean 'vllm'?"
