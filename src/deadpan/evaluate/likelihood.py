"""How likely a model finds the answers that people gave."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deadpan.data.pictures import open_picture
from deadpan.data.records import Record
from deadpan.engines.base import Engine, Request
from deadpan.evaluate.choices import ChoiceQuestion, Context, picture_name, results
from deadpan.evaluate.statistics import Items
from deadpan.models.answer_loss import AnswerLoss, plain_model
from deadpan.models.attention import kernels
from deadpan.processing.collate import collate
from deadpan.processing.processor import Processor


@torch.inference_mode()
def answer_loss(
    model: Any,
    processor: Processor,
    records: Sequence[Record],
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """The cross-entropy of the records' answers, as training computes it.

    Args:
        model: InternVL, plain or wrapped by PEFT.
        processor: Makes its inputs.
        records: What to score.
        batch: Records of a forward pass.
        progress: Called with the number of records scored and their total.

    Returns:
        The mean of -log p over supervised tokens, in nats, and their number.
    """
    loss_of = AnswerLoss(model).eval()
    device = plain_model(model).lm_head.weight.device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(records), batch):
        samples = [processor.record(record) for record in records[start : start + batch]]
        rows = collate(samples, processor.pad_id).to(device)
        pixels = rows.pixel_values
        if pixels is not None:
            pixels = pixels.to(plain_model(model).dtype)
        with kernels():
            loss = loss_of(rows.input_ids, rows.labels, rows.position_ids, pixels)
        total += loss.double().cpu()
        tokens += rows.supervised
        if progress is not None:
            progress(min(start + batch, len(records)), len(records))
    return (total / tokens).item(), tokens


LOSS = "held-out loss"


def likelihoods(
    engine: Engine,
    count_tokens: Callable[[str], int],
    records: Sequence[Record],
    questions: Sequence[ChoiceQuestion] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Items]:
    """Score the records' answers and the questions' options, each picture in one call.

    Args:
        engine: Gives the likelihoods.
        count_tokens: How many tokens an answer has, its stop token included.
        records: Held-out records, all from one folder of pictures.
        questions: Questions about their pictures.
        progress: Called with the number of contexts scored and their total.

    Returns:
        First the held-out loss, an item a record: what `answer_loss` computes, with the records told apart. Then the
        measures of the questions.

    Raises:
        DeadpanError: If a picture is broken.
    """
    wanted: dict[Context, dict[str, None]] = {}
    for record in records:
        for place, turn in enumerate(record.turns):
            if turn.role == "gpt":
                context = record.images, record.turns[:place]
                wanted.setdefault(context, {})[turn.text] = None
    for question in questions:
        wanted.setdefault(question.context, {}).update(dict.fromkeys(question.options))
    folder = records[0].folder
    scores: dict[Context, dict[str, float]] = {}
    for done, (context, texts) in enumerate(wanted.items(), start=1):
        scores[context] = _scores(engine, context, list(texts), folder)
        if progress is not None:
            progress(done, len(wanted))
    return [_loss(records, scores, count_tokens), *results(questions, scores)]


def _scores(
    engine: Engine, context: Context, texts: Sequence[str], folder: Path
) -> dict[str, float]:
    images, turns = context
    request = Request(
        [open_picture(folder / image) for image in images], turns, picture_name(images, turns)
    )
    return dict(zip(texts, engine.score(request, texts), strict=True))


def _loss(
    records: Sequence[Record],
    scores: dict[Context, dict[str, float]],
    count_tokens: Callable[[str], int],
) -> Items:
    values, tokens = [], []
    for record in records:
        answers = [
            (scores[record.images, record.turns[:place]][turn.text], count_tokens(turn.text))
            for place, turn in enumerate(record.turns)
            if turn.role == "gpt"
        ]
        values.append(-sum(score for score, _ in answers))
        tokens.append(sum(count for _, count in answers))
    pictures = [picture_name(record.images, record.turns[:-1]) for record in records]
    return Items(LOSS, values, pictures, tokens)
