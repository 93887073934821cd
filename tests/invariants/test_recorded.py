"""A pass over a filled-up batch, as a GPU plays it back, gives the plain pass's loss and gradients.

Here it runs on the CPU, unrecorded, in float32: what is read, filled up, left out and added is the same.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters import adapted
from deadpan.data.records import load as load_records
from deadpan.models import recorded
from deadpan.models.fused_loss import FusedLoss, picture_features
from deadpan.models.recorded import RecordedLoss
from deadpan.models.shapes import Shape
from deadpan.processing.collate import Batch, collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample, load_processor
from deadpan.train import model as train_model
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from make_tiny_model import make_official
from training import course, recipes, result_of

Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]
TOLERANCE = 1e-6
"""What differs is the order of sums in products of another size."""


@pytest.fixture(scope="module", params=["InternLM2ForCausalLM", "Qwen2ForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_official(tmp_path_factory.mktemp("recorded") / "model", request.param)


@pytest.fixture(scope="module")
def samples(folder: Path, records: Path) -> list[Sample]:
    processor = load_processor(folder, max_tiles=4)
    return [processor.record(record) for record in load_records(records)]


def text_only(sample: Sample) -> Sample:
    """Its supervised tokens alone."""
    ids = [label for label in sample.labels if label != IGNORE_INDEX]
    return replace(sample, input_ids=ids, labels=ids, pixel_values=None)


def outcome(model: PeftModel, loss_of: Callable[[Batch], torch.Tensor], *steps: Batch) -> Outcome:
    """The loss of the last of several micro-batches, and the gradients of the mean over all."""
    torch.manual_seed(5)
    for batch in steps:
        loss = loss_of(batch)
        (loss / sum(step.supervised for step in steps)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def assert_equal(one: Outcome, other: Outcome) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=TOLERANCE, atol=0)
    assert one[1].keys() == other[1].keys()
    norm = torch.stack([gradient.norm() for gradient in other[1].values()]).norm()
    assert norm > 1
    for name, expected in other[1].items():
        assert (one[1][name] - expected).norm() <= TOLERANCE * norm, name


def known(fused: FusedLoss, *batches: Batch) -> RecordedLoss:
    """A loss to which the shapes of some batches are no news."""
    loss_of = RecordedLoss(fused)
    for batch in batches:
        loss_of(batch)
    assert loss_of.played == 0
    return loss_of


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_loss_and_gradients_are_the_plain_ones(
    folder: Path, samples: list[Sample], packing: bool, dropout: float, checkpoint: bool
) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, packing)
    fused = FusedLoss(model, torch.float32, dropout=dropout)
    fused.checkpoint = checkpoint
    loss_of = known(fused, batch)
    assert_equal(outcome(model, loss_of, batch), outcome(model, fused, batch))
    assert loss_of.played == 1
    # It begins anew with what is kept now.
    fused.checkpoint = not checkpoint
    for _ in range(2):
        assert_equal(outcome(model, loss_of, batch), outcome(model, fused, batch))
    assert loss_of.played == 2


def test_batches_of_unlike_shapes_take_turns(folder: Path, samples: list[Sample]) -> None:
    """Several micro-batches a step: long after short, without pictures after some with them."""
    model = adapted(folder)
    texts = [text_only(sample) for sample in samples]
    # The largest is neither first nor last.
    steps = [
        collate(part, 0, True)
        for part in ([samples[0]], texts, samples * 3, [texts[0], samples[1]], samples[::-1])
    ]
    fused = FusedLoss(model, torch.float32, dropout=0.1)
    loss_of = RecordedLoss(fused)
    for batch in [*steps, *steps]:  # the second time all are known
        loss_of(batch)
    before = loss_of.played
    assert_equal(outcome(model, loss_of, *steps), outcome(model, fused, *steps))
    assert loss_of.played == before + len(steps)
    first, *others = loss_of._passes
    assert len(others) >= 2
    assert all(first.tokens > other.tokens for other in others)
    # A step without pictures leaves the projector no gradient.
    assert_equal(outcome(model, loss_of, steps[1]), outcome(model, fused, steps[1]))


def test_the_weights_are_read_anew(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, True)
    fused = FusedLoss(model, torch.float32)
    loss_of = known(fused, batch)
    before = outcome(model, loss_of, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    after = outcome(model, loss_of, batch)
    assert (after[0] - before[0]).abs() > 0.01
    assert_equal(after, outcome(model, fused, batch))


def test_a_frozen_projector_and_known_features(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder, train_projector=False)
    batch = collate(samples, 0, True)
    fused = FusedLoss(model, torch.float32)
    assert batch.pixel_values is not None
    with torch.no_grad():
        features = picture_features(fused.model, batch.pixel_values)
    cached = replace(batch, pixel_values=None, features=features)
    loss_of = known(fused, batch)
    assert_equal(outcome(model, loss_of, cached), outcome(model, fused, batch))
    assert loss_of.played == 1


def test_a_batch_that_is_not_finite_leaves_nothing_behind(
    folder: Path, samples: list[Sample]
) -> None:
    """What a longer batch has left of its pictures lies where the next is filled up."""
    model = adapted(folder)
    short, long = collate(samples[:1], 0, True), collate(samples, 0, True)
    assert long.pixel_values is not None
    broken = replace(long, pixel_values=long.pixel_values * torch.nan)
    fused = FusedLoss(model, torch.float32)
    loss_of = known(fused, short, broken)
    assert loss_of(broken).isnan()
    assert_equal(outcome(model, loss_of, short), outcome(model, fused, short))
    assert loss_of.played == 2


def full(count: int, rest: int, samples: Sequence[Sample]) -> Batch:
    """Texts that leave `rest` tokens of `count`."""
    ids = [i % 50 + 5 for i in range(count - rest)]
    cut = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
    return collate(
        [replace(samples[0], input_ids=part, labels=part, pixel_values=None) for part in cut],
        0,
        True,
    )


@pytest.mark.parametrize("rest", [0, 1, 2, 3])
def test_a_batch_that_all_but_fills_its_shape(
    folder: Path, samples: list[Sample], rest: int
) -> None:
    """Two samples are filled up to four, with two tokens at least."""
    model = adapted(folder)
    batch = full(256, rest, samples)
    fused = FusedLoss(model, torch.float32)
    shape = Shape.of(fused.read(batch), pictured=False)
    assert shape[:2] == (256 if rest >= 2 else 512, 4)
    filled = shape.filled(fused.read(batch))
    assert len(filled[-1]) == 5
    assert filled[-1].diff().min() >= 1  # no sample is empty
    assert filled[-1].diff().max() <= shape.longest
    loss_of = known(fused, batch)
    assert_equal(outcome(model, loss_of, batch), outcome(model, fused, batch))


def test_what_cannot_be_played_back_goes_the_plain_way(
    folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, True)
    fused = FusedLoss(model, torch.float32)
    loss_of = known(fused, batch)
    assert len(loss_of(batch, reduction="none")) == batch.supervised
    with torch.no_grad():
        loss_of(batch)
    model.eval()
    loss_of(batch)
    model.train()
    shared = replace(batch, position_ids=batch.position_ids.clone())
    shared.position_ids[0, -4:] -= 4
    assert fused.read(shared).segments.readers is not None
    for _ in range(2):
        assert_equal(outcome(model, loss_of, shared), outcome(model, fused, shared))
    monkeypatch.setattr(recorded, "MOST_TOKENS", Shape.of(fused.read(batch), True).tokens - 1)
    loss_of(batch)
    assert loss_of.played == 0


def test_a_pass_asks_its_device_for_nothing(
    folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no numbers at all, to ask for one is an error, as it is in a recording."""
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # it knows no such device
    model = adapted(folder)
    batch = collate(samples, 0, True)
    fused = FusedLoss(model, torch.float32, dropout=0.1)
    # Angles are found beforehand: where they depend on the last position, that is asked for.
    found = fused.decoder.rotation(torch.zeros(0), torch.arange(6144))
    angles = [angle.to("meta") for angle in found]
    fused = FusedLoss(model.to("meta"), torch.float32, dropout=0.1)
    with monkeypatch.context() as patched:
        patched.setattr(fused.decoder, "rotation", lambda like, positions: angles)
        loss_of = RecordedLoss(fused)
    fused.model.model.language_model.rotary_emb.rope_type = "dynamic"
    loss_of._seen.add(Shape.of(fused.read(batch), True))
    loss_of(batch).backward()
    assert loss_of.played == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradients_that_are_gone_are_not_given(folder: Path, samples: list[Sample]) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, True)
    loss_of = known(FusedLoss(model, torch.float32), batch)
    first, second = loss_of(batch), loss_of(batch)
    with pytest.raises(RuntimeError, match="later batch"):
        first.backward()
    second.backward()


def test_when_memory_runs_out_the_plain_way_is_gone(
    folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(folder)
    batch = collate(samples, 0, True)
    fused = FusedLoss(model, torch.float32)
    loss_of = known(fused, batch)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(recorded, "layer_backward", no_room)
    first = outcome(model, loss_of, batch)
    monkeypatch.undo()
    assert_equal(first, outcome(model, fused, batch))
    assert_equal(outcome(model, loss_of, batch), outcome(model, fused, batch))
    assert loss_of.played == 0
    loss_of.forget()  # perhaps there is room now
    for _ in range(2):
        assert_equal(outcome(model, loss_of, batch), outcome(model, fused, batch))
    assert loss_of.played == 1


def test_a_run_trains_the_same(
    tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, two micro-batches a step and short steps, evaluations amid them."""
    make = recipes(tiny, records)
    settings = {
        "decoder": "fused",
        "packing": True,
        "lora": {"lora_dropout": 0.05},
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "epochs": 4,
        "data": {"validation": 0.25},
        "evaluation": {"every_steps": 4, "memorisation_pictures": 0, "probe_pictures": 0},
        "optimizer": {"eps": 1e-4},  # see test_accumulation.py
    }
    plain = Trainer(make(tmp_path / "plain", **settings), False, Watcher()).train()
    monkeypatch.setattr(train_model, "suits", lambda fused: True)
    trainer = Trainer(make(tmp_path / "recorded", **settings), False, Watcher())
    found = trainer.train()
    assert trainer.loss._recorded is not None
    assert trainer.loss._recorded.played > 3
    for line, expected in zip(
        course(tmp_path / "recorded"), course(tmp_path / "plain"), strict=True
    ):
        assert line == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        result_of(found.checkpoint), result_of(plain.checkpoint), rtol=0, atol=1e-6
    )
