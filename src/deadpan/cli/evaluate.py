"""`deadpan evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadpan.cli.options import DataImages, Device, Dtype

if TYPE_CHECKING:
    from deadpan.data.records import Record
    from deadpan.evaluate.answers import Question
    from deadpan.evaluate.choices import QuestionSet
    from deadpan.evaluate.evaluation import Evaluation
    from deadpan.evaluate.statistics import Difference, Metric


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint folders, run folders, Hub ids, or nano. Of several, each is compared with the first.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(help="Records that no model was trained on, or nano:held-out."),
    ],
    training: Annotated[
        Path | None,
        typer.Option(
            help="The records they were trained on, to see what they have by heart; of a run, its checkpoints and "
            "exports they are known."
        ),
    ] = None,
    images: DataImages = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    answers_out: Annotated[
        Path | None,
        typer.Option("--answers", help="Write the (first) model's answers here, as JSON lines."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Ask the choice questions of this file again.")
    ] = None,
    questions_out: Annotated[
        Path | None, typer.Option(help="Write the choice questions here, for other models.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="What a describing model said about the pictures (its --answers): wrong options to choose from."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which choice questions are drawn.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Put tellers into figures: what they say, what they know, and whether two of them differ.

    Each picture is asked once, greedily. An answer has joke form if it is one finished line of 4 to
    60 characters that does not describe the picture; it is grounded if it names something pictured,
    or puns on it (for records that say what is pictured, under "concepts"); it is verbatim if it is
    a training answer, punctuation aside.

    Without being asked to speak, a teller is given answers to score: the held-out loss is that of
    the answers in DATA; in 2T1, 3T1, 4T1 and 5T2 it picks the answers to the picture among others;
    in the ranking it orders five answers, whose likes ("stars") are known. Intervals are 95%,
    bootstrapped over pictures. Several models meet the same questions and are compared by a paired
    randomisation test. docs/evaluation.md defines every figure.

    Example: deadpan evaluate nano runs/demo/run nano:held-out --out figures.json
    """
    from deadpan.data.records import load as load_records
    from deadpan.errors import DeadpanError, refuse_unwritable, writing
    from deadpan.evaluate import choices
    from deadpan.evaluate.answers import questions as questions_of
    from deadpan.evaluate.evaluation import differences

    for model in models:
        if models.count(model) > 1:
            raise DeadpanError(
                "A model is named twice.", found=model, fix="name each model that is compared once"
            )
    for what, file in (("figures", out), ("answers", answers_out), ("questions", questions_out)):
        if file is not None:
            refuse_unwritable(what, file)
    records = load_records(data, images)
    asked = questions_of(records)
    if questions is not None:
        drawn = choices.read(questions)
        _refuse_strangers(drawn, records, questions)
    else:
        drawn = choices.draw(records, _captions(captions, records), seed)
    if questions_out is not None:
        drawn.write(questions_out)
    found: dict[str, Evaluation] = {}
    for number, model in enumerate(models):
        found[model] = _evaluate(
            model,
            records,
            asked,
            drawn,
            training,
            answers_out if number == 0 else None,
            max_new_tokens,
            device,
            dtype,
        )
    first = found[models[0]]
    compared = {model: differences(first, found[model]) for model in list(found)[1:]}
    if out is not None:
        import json

        figures = {
            "data": str(data),
            "questions_sha256": drawn.sha256,
            "models": {model: one.to_json() for model, one in found.items()},
            "differences": {
                model: {"from": models[0], "metrics": [one.to_json() for one in against]}
                for model, against in compared.items()
            },
        }
        text = json.dumps(figures, ensure_ascii=False, indent=2)
        with writing("figures", out):
            out.write_text(text + "\n", encoding="utf-8")
    print_figures(found)
    for model, against in compared.items():
        _print_differences(models[0], model, against)


def _evaluate(
    model: str,
    records: "list[Record]",
    asked: "list[Question]",
    drawn: "QuestionSet",
    training: Path | None,
    answers_out: Path | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
) -> "Evaluation":
    from deadpan.checkpoints.source import resolve
    from deadpan.cli.progress import bar
    from deadpan.data.records import load as load_records
    from deadpan.engines.base import GenerationSettings
    from deadpan.evaluate.answers import write
    from deadpan.evaluate.evaluation import evaluate as figures_of
    from deadpan.evaluate.hearing import Asking, hear
    from deadpan.train.run_folder import run_of
    from deadpan.train.split import learned

    by_heart = None
    if training is not None:
        by_heart = [answer for record in load_records(training) for answer in record.answers]
    elif (run := run_of(resolve(model))) is not None:
        by_heart = learned(run)
    heard = hear(
        model,
        [Asking(asked, GenerationSettings(max_new_tokens))],
        records,
        drawn.questions,
        bars=lambda stage: bar(f"{model}: {stage}"),
        device=device,
        dtype=dtype,
    )
    answers = [said[0] for said in heard.answers[0]]
    if answers_out is not None:
        write(answers, answers_out)
    return figures_of(asked, answers, by_heart, likelihood=heard.likelihood, skipped=drawn.skipped)


def _captions(path: Path | None, records: "list[Record]") -> dict[str, str]:
    """Captions by the pictures' paths as the records write them."""
    if path is None:
        return {}
    from deadpan.errors import DeadpanError
    from deadpan.evaluate.answers import read

    # The answers name the file that was opened, which may be the same one by another path.
    said = {Path(answer.picture).resolve(): answer.text for answer in read(path)}
    captions = {
        record.images[0]: said[record.image_paths[0].resolve()]
        for record in records
        if record.images and record.image_paths[0].resolve() in said
    }
    if not captions:
        raise DeadpanError(
            "No caption is of a picture of the records.",
            where=path,
            expected="answers to the same data, as deadpan evaluate MODEL DATA --answers writes them",
        )
    return captions


def _refuse_strangers(drawn: "QuestionSet", records: "list[Record]", path: Path) -> None:
    from deadpan.errors import DeadpanError

    known = {(record.images, record.turns[:-1]) for record in records}
    strange = [one for one in drawn.questions if one.context not in known]
    if strange:
        raise DeadpanError(
            f"{len(strange):,} of {len(drawn.questions):,} questions are not about these records.",
            where=path,
            found=" ".join(strange[0].images) or strange[0].turns[-1].text,
            fix="pass the records that the questions were drawn from",
        )


def print_figures(evaluations: "Mapping[str, Evaluation]") -> None:
    """Show evaluations side by side, a column a teller, and what was skipped."""
    from rich.console import Console
    from rich.table import Table

    from deadpan.evaluate.evaluation import rows

    console = Console(highlight=False)
    table = Table(show_edge=False)
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows(list(evaluations.values())):
        label = row.name if row.chance is None else f"{row.name} (chance {row.chance})"
        table.add_row(label, *map(_cell, row.cells))
    console.print(table)
    for name, evaluation in evaluations.items():
        for task, reason in evaluation.skipped.items():
            console.print(f"{name}: no {task}: {reason}", style="dim", markup=False)


def _cell(metric: "Metric | None") -> str:
    if metric is None:
        return "-"
    return metric.text if metric.interval is None else f"{metric.text} ({metric.interval})"


def _print_differences(first: str, second: str, found: "list[Difference]") -> None:
    from rich.console import Console
    from rich.table import Table

    from deadpan.evaluate.evaluation import difference_rows

    table = Table("", title=f"{second} less {first}", show_edge=False, title_justify="left")
    for heading in ("difference", "95% interval", "p"):
        table.add_column(heading, justify="right")
    for cells in difference_rows(found):
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print()
    console.print(table)
