"""A tiny official model gives the official numbers: features, logits, tokens, losses, gradients.

Where a number has a tolerance, it is the one that the reference data comes with: float32 against float64 differs by a
tenth of it, while the mildest of the usual mistakes (another epsilon, a tanh GELU) moves the logits by four times it.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from deadpan.checkpoints import keys
from deadpan.checkpoints.export import export
from deadpan.checkpoints.load import Loaded, load, load_base
from deadpan.checkpoints.source import Layout
from deadpan.data.pictures import open_picture
from deadpan.data.records import Turn
from deadpan.engines.base import GenerationSettings, Request
from deadpan.engines.builtin import BuiltinEngine
from deadpan.models.answer_loss import AnswerLoss
from deadpan.processing.collate import Batch, collate
from deadpan.processing.processor import Processor, Sample, load_processor
from exporting import reloaded_here

CASES = ["one_tile", "many_tiles", "text_only", "multi_image", "multi_turn"]
VARIANTS = ["eager", "sdpa", "hf", "round-trip"]
"""The official folder with either attention; its hf export, loaded by transformers; that made official again."""

NTK = "dynamic_ntk"
RUNS = [(variant, case) for variant in VARIANTS for case in CASES]
RUNS += [("eager", NTK), ("sdpa", NTK)]

LOGITS, FEATURES, HIDDEN, LOSS = 5e-4, 1e-5, 1e-4, 1e-4  # absolute
GRADIENT_NORM = 1e-3  # relative
HIDDEN_STATES = "llm_hidden_last8"
GREEDY = GenerationSettings(max_new_tokens=24)


@dataclass
class Run:
    """What a model makes of a case, and what it should."""

    case: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    seen: dict[str, torch.Tensor]
    hidden: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    tokens: list[int]
    steps: list[float]
    response: str


@pytest.fixture(scope="module")
def official(golden: Path) -> Path:
    return golden / "official_tiny"


@pytest.fixture(scope="module")
def reference(official: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((official / "expected.json").read_text(encoding="utf-8"))
    assert [*CASES, NTK] == list(content["cases"])
    return content


@pytest.fixture(scope="module")
def hf(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "hf"
    with reloaded_here():
        export(official, folder, "hf", device="cpu")
    return folder


@pytest.fixture(scope="module")
def official_again(official: Path, hf: Path) -> Path:
    folder = hf.parent / "official"
    with reloaded_here():
        export(hf, folder, "official", device="cpu", official_files=official)
    return folder


@pytest.fixture(scope="module")
def ntk(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with so few positions that every picture is beyond them."""
    folder = tmp_path_factory.mktemp("ntk")
    for path in official.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((official / "config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def processor(official: Path) -> Processor:
    return load_processor(official)


def fresh(folder: Path, processor: Processor, attention: str) -> Loaded:
    """A model of its own; making another processor of 92,553 tokens would take longer than all the rest."""
    cpu = torch.device("cpu")
    model = load_base(folder, Layout.OFFICIAL, processor, cpu, torch.float32, attention)
    return Loaded(model, processor, folder, folder)


@pytest.fixture(scope="module")
def loaded(
    request: pytest.FixtureRequest, official: Path, processor: Processor
) -> Callable[[str], Loaded]:
    """Load a variant, once each."""

    @cache
    def make(variant: str) -> Loaded:
        if variant == "hf":
            folder = request.getfixturevalue("hf")
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            return Loaded(model, load_processor(folder), folder, folder)
        if variant == "round-trip":
            return load(request.getfixturevalue("official_again"), device="cpu", dtype="fp32")
        return fresh(official, processor, attention=variant)

    return make


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(
    request: pytest.FixtureRequest,
    official: Path,
    loaded: Callable[[str], Loaded],
    reference: dict[str, Any],
) -> Run:
    variant, name = request.param
    subject = loaded(variant)
    if name == NTK:
        # The reference is a fresh model's: what came before changes how long prompts are read.
        subject = fresh(request.getfixturevalue("ntk"), subject.processor, variant)
    case = reference["cases"][name]
    processor, model = copy.copy(subject.processor), subject.model
    processor.tile_policy = replace(processor.tile_policy, max_tiles=case["max_num"])
    texts = [*chain.from_iterable(case["history"] or []), case["question"]]
    turns = [Turn("gpt" if place % 2 else "human", text) for place, text in enumerate(texts)]
    inputs = processor([open_picture(official / "images" / f) for f in case["images"]], turns)
    seen: dict[str, torch.Tensor] = {}

    def keep(module: str) -> Callable[[Any, Any, torch.Tensor], None]:
        return lambda _, args, output: seen.update({f"{module}.in": args[0], module: output})

    with torch.inference_mode():
        with ExitStack() as hooks:
            for module in ("vision_tower.layernorm", "multi_modal_projector"):
                handle = model.get_submodule(f"model.{module}").register_forward_hook(keep(module))
                hooks.callback(handle.remove)
            output = model(**inputs, logits_to_keep=8, output_hidden_states=True)
        generated = model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = [step.double().logsumexp(-1).item() for step in generated.logits]
    tensors = load_file(official / "expected.safetensors")
    mine = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
    told = tokens, steps, processor.decode(tokens)
    return Run(case, mine, inputs, seen, output.hidden_states, output.logits[0], *told)


def test_the_inputs_are_the_official_ones(run: Run) -> None:
    assert run.inputs["input_ids"].tolist() == [run.case["input_ids"]]
    digest = None
    if "pixel_values" in run.inputs:
        digest = hashlib.sha256(run.inputs["pixel_values"].numpy().tobytes()).hexdigest()
    assert digest == run.case["pixel_values_sha256"]


def test_the_features_of_pictures_are_the_official_ones(run: Run) -> None:
    found = {}
    if run.case["images"]:
        features = run.seen["multi_modal_projector"]
        # transformers' closing LayerNorm is switched off, so what enters it is the last layer's output.
        last_layer = run.seen["vision_tower.layernorm.in"]
        assert torch.equal(run.seen["vision_tower.layernorm"], last_layer)
        found = {
            "vit_last_hidden": last_layer[:, :5],
            "pixel_shuffle": run.seen["multi_modal_projector.in"][:, :4],
            "mlp1_first4": features[:, :4],
            "mlp1_tile0": features[0],
        }
    expected = {k: v for k, v in run.tensors.items() if k not in ("logits_last8", HIDDEN_STATES)}
    torch.testing.assert_close(found, expected, atol=FEATURES, rtol=0)


def test_hidden_states_and_logits_are_the_official_ones(run: Run) -> None:
    hidden = torch.stack([layer[0, -8:] for layer in run.hidden])
    torch.testing.assert_close(hidden, run.tensors[HIDDEN_STATES], atol=HIDDEN, rtol=0)
    torch.testing.assert_close(run.logits, run.tensors["logits_last8"], atol=LOGITS, rtol=0)
    assert run.logits.argmax(-1).tolist() == run.case["argmax_last8"]


def test_greedy_answers_are_the_official_ones(run: Run) -> None:
    assert run.tokens == run.case["new_tokens"]
    assert run.response == run.case["response"]
    # Each step's distribution too: a logsumexp moves by no more than the logits.
    assert run.steps == pytest.approx(run.case["step_logsumexp"], rel=0, abs=LOGITS)


def test_official_to_hf_to_official_is_bit_identical(official: Path, official_again: Path) -> None:
    before = load_file(official / "model.safetensors")
    after = load_file(official_again / "model.safetensors")
    assert before.keys() == after.keys()
    assert len(before) == 55
    types = {name: (tensor.dtype, after[name].dtype) for name, tensor in before.items()}
    assert set(types.values()) == {(torch.float32, torch.float32)}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("tokens", [100, 600])
def test_a_long_prompt_leaves_no_trace_on_the_next(
    ntk: Path, processor: Processor, reference: dict[str, Any], tokens: int
) -> None:
    # The official code keeps the base for a short prompt too: there, this difference is 3.8.
    assert reference["dynamic_ntk_state"]["short_prompt_first_vs_after_a_long_one_max_abs_diff"] > 3
    model = fresh(ntk, processor, "sdpa").model
    ids = processor([], "你好")["input_ids"].repeat(1, 30)
    with torch.inference_mode():
        first = model(input_ids=ids[:, :tokens], logits_to_keep=8).logits
        model(input_ids=ids[:, :900])
        second = model(input_ids=ids[:, :tokens], logits_to_keep=8).logits
    assert torch.equal(first, second)


@pytest.fixture
def spied(
    loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> tuple[BuiltinEngine, list[tuple[list[list[int]], list[list[int]]]]]:
    """An engine, and for each of its batches the prompts' ids and the steps' tokens."""
    subject = loaded("sdpa")
    processor = copy.copy(subject.processor)  # its stop token may be changed
    engine = BuiltinEngine(replace(subject, processor=processor))
    calls: list[tuple[list[list[int]], list[list[int]]]] = []
    tokens = engine._tokens

    def spy(batch: Any, *arguments: Any) -> Iterator[list[int]]:
        calls.append(([prompt.ids for prompt in batch], []))
        for step in tokens(batch, *arguments):
            calls[-1][1].append(step)
            yield step

    monkeypatch.setattr(engine, "_tokens", spy)
    return engine, calls


def requests(official: Path, images: list[str], questions: list[str]) -> list[Request]:
    return [
        Request([open_picture(official / "images" / image)], [Turn("human", question)])
        for image, question in zip(images, questions, strict=True)
    ]


def test_a_batch_is_answered_as_batch_chat_does(
    spied: tuple[BuiltinEngine, list[tuple[list[list[int]], list[list[int]]]]],
    official: Path,
    reference: dict[str, Any],
) -> None:
    (engine, calls), expected = spied, reference["batch_chat"]
    jokes = engine.generate(requests(official, expected["images"], expected["questions"]), GREEDY)
    ((prompts, steps),) = calls
    # The official code pads on the left.
    masks = expected["attention_mask"]
    assert prompts == [
        ids[len(mask) - sum(mask) :] for ids, mask in zip(expected["input_ids"], masks, strict=True)
    ]
    assert [list(answer) for answer in zip(*steps, strict=True)] == expected["new_tokens"]
    assert [joke.text for joke in jokes] == expected["responses"]
    assert [(joke.tokens, joke.finish_reason) for joke in jokes] == [(24, "length")] * 2
    assert [joke.prompt_tokens for joke in jokes] == [sum(mask) for mask in masks]


def test_an_answer_ends_at_the_stop_token(
    spied: tuple[BuiltinEngine, list[tuple[list[list[int]], list[list[int]]]]],
    official: Path,
    reference: dict[str, Any],
) -> None:
    # The model says <|im_end|> nowhere, so a token that it does say stands in.
    (engine, calls), expected = spied, reference["stop_at_eos"]
    stop = expected["eos_token_id"]
    engine._processor.stop_id = stop
    case = reference["cases"][expected["case"]]
    (request,) = requests(official, case["images"], [case["question"]])
    (joke,) = engine.generate([request], GREEDY)
    assert [token for (token,) in calls[0][1]] == expected["new_tokens"]
    assert (joke.tokens, joke.finish_reason) == (len(expected["new_tokens"]), "stop")
    said = engine._processor.tokenizer.decode(expected["new_tokens"][:-1])
    assert joke.text == said.strip()
    assert case["response"].startswith(joke.text)


@pytest.fixture
def trainable(request: pytest.FixtureRequest, loaded: Callable[[str], Loaded]) -> Iterator[Loaded]:
    subject = loaded(request.param)
    subject.model.requires_grad_(True)
    yield subject
    subject.model.zero_grad(set_to_none=True)
    subject.model.requires_grad_(False)


def training_batch(name: str, training: dict[str, Any], official: Path, use: Processor) -> Batch:
    picture = open_picture(official / "images" / "one_tile.png")
    pixels = {"image_sample": use.tile_policy.pixel_values(picture, 1), "text_sample": None}
    samples = [
        Sample(training[part]["input_ids"][0], training[part]["labels"][0], pixels[part], part)
        for part in (pixels if name == "batch_of_both" else [name])
    ]
    return collate(samples, use.pad_id)


@pytest.mark.parametrize("trainable", ["eager", "sdpa"], indirect=True)
@pytest.mark.parametrize("name", ["image_sample", "text_sample", "batch_of_both"])
def test_loss_and_gradients_are_the_official_ones(
    trainable: Loaded, official: Path, reference: dict[str, Any], name: str
) -> None:
    model, expected = trainable.model, reference["training"][name]
    batch = training_batch(name, reference["training"], official, trainable.processor)
    assert batch.supervised == expected["n_labelled_tokens"]
    total = AnswerLoss(model)(batch.input_ids, batch.labels, batch.position_ids, batch.pixel_values)
    loss = total / batch.supervised
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=0, abs=LOSS)
    # A text alone leaves the vision tower without gradients: officially they are zeros.
    gradients = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in model.named_parameters()
    }
    entries = keys.official_entries(model.config, gradients, "InternLM2ForCausalLM")
    norms = {
        entry.source: entry.join([gradients[key] for key in entry.targets]).double().norm().item()
        for entry in entries
    }
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    assert whole == pytest.approx(expected["total_grad_norm"], rel=GRADIENT_NORM)
    # Of the text sample only the whole was written down.
    assert (expected["grad_norms"] is None) == (name == "text_sample")
    if expected["grad_norms"] is not None:
        assert norms == pytest.approx(expected["grad_norms"], rel=GRADIENT_NORM)
