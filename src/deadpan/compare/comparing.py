"""Tellers side by side: the same pictures and questions put to each, one teller after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deadpan import __version__, nano
from deadpan.batch.pictures import Item, find
from deadpan.checkpoints.digest import weights_digest
from deadpan.checkpoints.load import choose_device, choose_dtype
from deadpan.compare.page import Column, page_of
from deadpan.compare.tellers import Teller, with_error
from deadpan.data.pictures import PictureError, open_picture
from deadpan.data.records import Record
from deadpan.engines.base import GenerationSettings
from deadpan.errors import DeadpanError
from deadpan.evaluate import choices
from deadpan.evaluate.answers import Question, questions
from deadpan.evaluate.evaluation import Evaluation, evaluate
from deadpan.evaluate.hearing import Asking, Bars, Heard, hear
from deadpan.evaluate.kept import Kept
from deadpan.report import comparison
from deadpan.report.words import Bilingual
from deadpan.teller import check_number

_BROKEN = Bilingual("broken, and shown to no teller", "图片损坏，没有给任何模型看")


@dataclass(frozen=True)
class Pictures:
    """Pictures to ask about.

    Attributes:
        questions: About those that can be opened.
        broken: What is wrong with the others.
    """

    questions: list[Question] = field(default_factory=list)
    broken: list[PictureError] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to compare, and how.

    Attributes:
        tellers: Whom to ask, in the order of the columns.
        pictures: What to show; if none, the pictures of `records` are.
        settings: How answers are drawn.
        samples: Answers to each picture.
        data: Records to evaluate every teller on, as they were named; None for no evaluation.
        records: These records.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, bf16, fp16 or fp32.
        quantization: none, nf4 or fp8.
        max_tiles: Overrides the checkpoints' own tile limits.
        title: The page's heading.
        language: What the page opens in.

    Raises:
        DeadpanError: If several samples are asked for that would all be the same.
    """

    tellers: Sequence[Teller]
    pictures: Pictures
    settings: GenerationSettings
    samples: int = 1
    data: Path | None = None
    records: Sequence[Record] = ()
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    max_tiles: int | None = None
    title: str | None = None
    language: comparison.Language = "en"

    def __post_init__(self) -> None:
        check_number(self.samples, self.settings)


def find_pictures(places: Sequence[Path], prompt: str) -> Pictures:
    """Find pictures, and open each once: better told now than after an hour.

    Args:
        places: Picture files, and folders of them.
        prompt: What to ask about each.

    Raises:
        DeadpanError: If there is no such file or folder, it is records, or a folder holds no picture.
    """
    items: dict[Path, Item] = {}
    for place in places:
        if str(place) in nano.RECORDS or place.suffix in (".json", ".jsonl"):
            raise DeadpanError(
                "These are records, and not a picture.",
                where=place,
                expected="a picture, or a folder of pictures",
                fix=f"--data {place} instead of --pictures shows the pictures of the records",
            )
        if not place.exists():
            raise DeadpanError("There is no such picture or folder of pictures.", where=place)
        one = [Item(str(place), (str(place),), (place,), prompt)]
        for item in find(place, prompt) if place.is_dir() else one:
            items.setdefault(item.paths[0].resolve(), item)
    found = Pictures()
    for item in items.values():
        try:
            for picture in item.open():
                picture.close()
        except PictureError as error:
            found.broken.append(error)
        else:
            found.questions.append(Question(item.paths, item.turns, (), {}, item.id))
    return found


def compare(plan: Plan, out: Path, bars: Callable[[str], Bars]) -> list[Column]:
    """Ask every teller, and write the page.

    Answers are kept beside the page in a file named `.answers.jsonl`: a comparison that was stopped
    goes on, and one that gains a teller or a picture asks what is new.

    Args:
        plan: What to compare.
        out: The page.
        bars: Given a teller's label, shows how far its stages are.

    Returns:
        What each teller said, in their order.

    Raises:
        DeadpanError: If a model or a record is not in order, or the page cannot be written.
    """
    evaluated = questions(plan.records)
    asking = Asking(plan.pictures.questions or evaluated, plan.settings, plan.samples)
    judged = Asking(evaluated, replace(plan.settings, temperature=0.0))
    askings = [asking] if asking == judged else [asking, judged]
    drawn = choices.draw(plan.records)
    for path in dict.fromkeys(path for record in plan.records for path in record.image_paths):
        open_picture(path).close()
    loaded_as = _loaded_as(plan)
    columns = []
    for teller in plan.tellers:
        weights = {"deadpan": __version__, "weights": weights_digest(teller.folder)}
        heard = hear(
            teller.folder,
            askings,
            plan.records,
            drawn.questions,
            bars=bars(teller.label),
            device=plan.device,
            dtype=plan.dtype,
            quantization=plan.quantization,
            max_tiles=plan.max_tiles,
            kept=Kept(out.with_suffix(".answers.jsonl"), weights | loaded_as),
        )
        evaluation = _evaluation(teller, evaluated, heard, drawn.skipped)
        columns.append(Column(teller, heard.answers[0], evaluation))
    data = {} if plan.data is None else {"evaluated on": str(plan.data)}
    page = page_of(
        title=plan.title or "冷笑话: " + ", ".join(teller.label for teller in plan.tellers),
        asked=asking.questions,
        columns=columns,
        settings=_decoding(plan) | loaded_as | data,
        notes=[with_error(_BROKEN, error) for error in plan.pictures.broken],
        language=plan.language,
    )
    comparison.write(page, out)
    return columns


def _evaluation(
    teller: Teller, asked: Sequence[Question], heard: Heard, skipped: Mapping[str, str]
) -> Evaluation | None:
    if not asked:
        return None
    answers = [said[0] for said in heard.answers[-1]]
    return evaluate(asked, answers, teller.learned, likelihood=heard.likelihood, skipped=skipped)


def _decoding(plan: Plan) -> dict[str, str]:
    settings = plan.settings
    how = {"decoding": "greedy"}
    if settings.temperature > 0:
        how = {
            "samples": str(plan.samples),
            "temperature": f"{settings.temperature:g}",
            "top-p": f"{settings.top_p:g}",
            "seed": str(settings.seed),
        }
    return how | {"most new tokens": str(settings.max_new_tokens)}


def _loaded_as(plan: Plan) -> dict[str, str]:
    device = choose_device(plan.device)
    dtype = str(choose_dtype(plan.dtype, device)).removeprefix("torch.")
    found = {"device": device.type, "weights in memory": dtype}
    if plan.quantization != "none":
        found["weights in memory"] = f"{plan.quantization}, {dtype}"
    return found if plan.max_tiles is None else found | {"most tiles": str(plan.max_tiles)}
