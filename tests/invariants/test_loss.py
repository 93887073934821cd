"""The loss of a sample and its gradient do not depend on how it is computed or on what stands beside it.

Losses are means over supervised tokens and of the order of 10, where a float32 is good for 1e-6; the
largest gradients are of the order of 1. The sums behind them run in another order from one way to the
other, so both are compared within 1e-5.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters import adapted
from deadpan.data.records import Turn
from deadpan.data.records import load as load_records
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.attention import VARLEN
from deadpan.models.build import checkpoint_layers
from deadpan.processing.collate import Batch, collate
from deadpan.processing.encoding import IGNORE_INDEX
from deadpan.processing.processor import Processor, Sample, load_processor
from make_tiny_model import make_official

TOLERANCE = 1e-5
Gradients = dict[str, torch.Tensor]


def trainable_model(folder: Path, attention: str, dropout: float = 0.0) -> PeftModel:
    """A model in training mode whose adapter says something, as a fresh one does not."""
    return adapted(folder, attention=attention, dropout=dropout)


@pytest.fixture(scope="module", params=["eager", "sdpa", "varlen"])
def model(request: pytest.FixtureRequest, tiny: Path) -> PeftModel:
    return trainable_model(tiny, request.param)


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Processor:
    return load_processor(tiny, max_tiles=4)


@pytest.fixture(scope="module")
def samples(processor: Processor, records: Path) -> list[Sample]:
    """Samples of different lengths: about a picture, without one, and of several turns."""
    turns = [Turn("human", "Why is it funny?"), Turn("gpt", "一只狗。")]
    text = processor.sample([], turns, "text")
    longer = processor.sample([], [*turns, Turn("human", "说"), Turn("gpt", "一只猫。")], "turns")
    first, *others = (processor.record(record) for record in load_records(records))
    samples = [first, text, *others, longer]
    assert len({len(sample.input_ids) for sample in samples}) > 3
    return samples


def run(
    model: PeftModel, batch: Batch, *more: Batch, full: bool = False
) -> tuple[torch.Tensor, Gradients]:
    """The mean loss of batches taken together, and its gradients.

    Args:
        model: Keeps nothing of it.
        batch: The first batch.
        more: Further batches.
        full: Whether transformers computes the loss, with all logits.
    """
    batches = [batch, *more]
    supervised = sum(batch.supervised for batch in batches)
    total = torch.zeros(())
    for one in batches:
        if full:
            attention = plain_model(model).config._attn_implementation
            if attention == VARLEN:  # whose packed rows only our loss knows how to announce
                plain_model(model).set_attn_implementation("sdpa")
            mean = plain_model(model)(
                input_ids=one.input_ids,
                pixel_values=one.pixel_values,
                position_ids=one.position_ids,
                labels=one.labels,
                use_cache=False,  # with a cache, transformers takes a packed row for one sample
            ).loss
            plain_model(model).set_attn_implementation(attention)
            loss = mean * one.supervised
        else:
            inputs = (one.input_ids, one.labels, one.position_ids, one.pixel_values)
            loss = AnswerLoss(model)(*inputs)
        (loss / supervised).backward()
        total += loss.detach() / supervised
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return total, gradients


def assert_equal(
    one: tuple[torch.Tensor, Gradients],
    other: tuple[torch.Tensor, Gradients],
    tolerance: float = TOLERANCE,
) -> None:
    assert one[1].keys() == other[1].keys()
    assert max(gradient.abs().max().item() for gradient in one[1].values()) > 0.1
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def singly(samples: Sequence[Sample]) -> list[Batch]:
    return [collate([sample], 0) for sample in samples]


def test_gradients_reach_the_adapter_and_the_projector_only(
    model: PeftModel, samples: list[Sample]
) -> None:
    _, gradients = run(model, collate(samples, 0))
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_the_batch_counts_the_supervised_tokens(samples: list[Sample]) -> None:
    expected = sum(label != IGNORE_INDEX for sample in samples for label in sample.labels)
    for packing in (False, True):
        batch = collate(samples, 0, packing)
        assert batch.supervised == expected
        assert batch.tokens == sum(len(sample.input_ids) for sample in samples)
        assert batch.names == [sample.name for sample in samples]


@pytest.mark.parametrize("packing", [False, True])
def test_the_answer_loss_is_the_full_loss(
    model: PeftModel, samples: list[Sample], packing: bool
) -> None:
    batch = collate(samples, 0, packing)
    assert_equal(run(model, batch), run(model, batch, full=True))


def test_the_loss_is_the_log_probability_of_each_answer_token(
    model: PeftModel, samples: list[Sample]
) -> None:
    # Written out once, independently of any loss function.
    batch = collate([samples[0]], 0)
    with torch.no_grad():
        logits = plain_model(model)(batch.input_ids, pixel_values=batch.pixel_values).logits[0]
    learned = [i for i, label in enumerate(samples[0].labels) if label != IGNORE_INDEX]
    assert learned[0] > 0
    shares = logits.log_softmax(-1)
    tokens = samples[0].input_ids
    expected = -torch.stack([shares[i - 1, tokens[i]] for i in learned]).mean()
    torch.testing.assert_close(run(model, batch)[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("packing", [False, True])
def test_samples_together_are_as_samples_one_at_a_time(
    model: PeftModel, samples: list[Sample], packing: bool
) -> None:
    assert_equal(run(model, collate(samples, 0, packing)), run(model, *singly(samples)))


@pytest.mark.parametrize("packing", [False, True])
def test_samples_without_pictures_train_too(
    model: PeftModel, samples: list[Sample], packing: bool
) -> None:
    texts = [sample for sample in samples if sample.pixel_values is None]
    batch = collate(texts, 0, packing)
    assert batch.pixel_values is None
    assert_equal(run(model, batch), run(model, *singly(texts)))


def test_the_order_within_a_batch_does_not_matter(model: PeftModel, samples: list[Sample]) -> None:
    for packing in (False, True):
        forward, backward = collate(samples, 0, packing), collate(samples[::-1], 0, packing)
        assert_equal(run(model, forward), run(model, backward))


def test_what_stands_in_the_padding_has_no_influence(
    model: PeftModel, samples: list[Sample]
) -> None:
    batch = collate(samples, 0)
    noisy = copy.deepcopy(batch)
    for row, sample in enumerate(samples):
        width = noisy.input_ids.shape[1] - len(sample.input_ids)
        noisy.input_ids[row, len(sample.input_ids) :] = torch.arange(5, 5 + width)
    assert (noisy.input_ids != batch.input_ids).sum() > 20
    # Not one rounding differs: the real tokens are computed the same way.
    assert_equal(run(model, batch), run(model, noisy), tolerance=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_changes_nothing(
    tiny: Path, samples: list[Sample], attention: str, packing: bool
) -> None:
    batch = collate(samples, 0, packing)
    results, passes = [], []
    for checkpointing in (False, True):
        # With dropout: what is recomputed must draw the same random numbers again.
        model = trainable_model(tiny, attention, dropout=0.1)
        language_model = plain_model(model).model.language_model
        if checkpointing:
            checkpoint_layers(language_model)
        count = [0]
        for layer in language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        torch.manual_seed(1)
        results.append(run(model, batch))
        passes.append(count[0])
    layers = len(language_model.layers)
    assert passes == [layers, 2 * layers]  # it did recompute
    assert_equal(results[0], results[1], tolerance=0)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM"])
def test_packing_keeps_samples_apart_in_every_language_model(
    family: str, attention: str, records: Path, tmp_path: Path
) -> None:
    folder = make_official(tmp_path / family, family)
    model, processor = trainable_model(folder, attention), load_processor(folder, max_tiles=4)
    samples = [processor.record(record) for record in load_records(records)]
    assert_equal(run(model, collate(samples, 0, packing=True)), run(model, *singly(samples)))
