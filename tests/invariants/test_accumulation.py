"""How a step is cut into micro-batches does not decide what it learns.

The loss of the step is the mean over its supervised tokens, whichever micro-batch they came in. Only
the order of float32 sums differs, so losses agree within 1e-6 of their size, and weights within 1e-6.
"""

import json
from pathlib import Path

import pytest
import torch

from deadpan.models.answer_loss import plain_model
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Sample
from deadpan.train.loop import Trainer
from deadpan.train.watcher import Watcher
from training import MakeRecipe, course, result_of, train

Outcome = tuple[list[tuple[int, float, float, float]], dict[str, torch.Tensor]]


def outcome(make: MakeRecipe, run: Path, size: int, accumulation: int, packing: bool) -> Outcome:
    recipe = make(
        run,
        micro_batch_size=size,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        max_steps=5,
        # Each micro-batch draws its own dropout, and there must be none to compare.
        lora={"lora_dropout": 0.0},
        # AdamW divides a gradient by its own size: with the usual 1e-8 the rounding error of one that is nearly zero
        # grows to a whole step.
        optimizer={"eps": 1e-4},
    )
    checkpoint = train(recipe).checkpoint
    return course(run), result_of(checkpoint)


@pytest.fixture(scope="module")
def at_once(make: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Five steps of four padded samples."""
    return outcome(make, tmp_path_factory.mktemp("at-once") / "run", 4, 1, packing=False)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_four_samples_at_once_are_two_twice_and_one_four_times(
    at_once: Outcome, make: MakeRecipe, tmp_path: Path, size: int, accumulation: int, packing: bool
) -> None:
    log, weights = outcome(make, tmp_path / "run", size, accumulation, packing)
    assert [line[0] for line in log] == [1, 2, 3, 4, 5]
    for line, expected in zip(log, at_once[0], strict=True):
        assert line == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(weights, at_once[1], rtol=0, atol=1e-6)


def token_losses(trainer: Trainer, sample: Sample) -> torch.Tensor:
    """Minus the log-probability of each supervised token, from the full logits."""
    logits = plain_model(trainer.model)(
        input_ids=torch.tensor([sample.input_ids]), pixel_values=sample.pixel_values
    ).logits[0, :-1]
    targets = torch.tensor(sample.labels[1:])
    kept = targets != IGNORE_INDEX
    return -logits.log_softmax(-1)[kept].gather(1, targets[kept, None])[:, 0]


@pytest.mark.parametrize("packing", [False, True])
def test_an_uneven_step_weighs_every_token_the_same(
    make: MakeRecipe, records: Path, tmp_path: Path, packing: bool
) -> None:
    # Three records where four would fit: micro-batches of two and of one.
    samples = json.loads(records.read_text(encoding="utf-8"))[:3]
    samples[0]["conversations"][1]["value"] *= 4
    (tmp_path / "three.json").write_text(json.dumps(samples), encoding="utf-8")
    recipe = make(
        tmp_path / "run",
        data={"train": tmp_path / "three.json", "images": records.parent},
        lora={"lora_dropout": 0.0},
        micro_batch_size=2,
        packing=packing,
        max_steps=1,
    )
    trainer = Trainer(recipe, False, Watcher())
    batches = [batch.indices for batch in trainer.plan.micro_batches()]
    assert [len(indices) for indices in batches] == [2, 1]
    losses = [
        token_losses(trainer, trainer.processor.record(record)) for record in trainer.survey.records
    ]
    chunks = [torch.cat([losses[i] for i in indices]) for indices in batches]
    token_mean = torch.cat(chunks).mean()
    token_mean.backward()
    norm = torch.stack([p.grad.norm() for p in trainer.trainable if p.grad is not None]).norm()
    trainer.model.zero_grad(set_to_none=True)
    # The usual mistake is far enough away to be told apart.
    assert abs(torch.stack([chunk.mean() for chunk in chunks]).mean() - token_mean) > 0.01
    trainer.train()
    ((_, loss, _, grad_norm),) = course(tmp_path / "run")
    assert loss == pytest.approx(token_mean.item(), rel=1e-6)
    assert grad_norm == pytest.approx(norm.item(), rel=1e-5)
