"""`deadpan evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deadpan.evaluate.evaluation import Evaluation


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, a run folder, a Hub id, or nano."),
    ],
    data: Annotated[
        Path,
        typer.Argument(help="Records that the model was not trained on, or nano:held-out."),
    ],
    training: Annotated[
        Path | None,
        typer.Option(
            help="The records it was trained on, to see what it has by heart; of a run folder they are known."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder that DATA's picture paths start from.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    answers_out: Annotated[
        Path | None, typer.Option("--answers", help="Write the answers here, as JSON lines.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bf16 on a GPU, else fp32), bf16, fp16 or fp32.")
    ] = "auto",
) -> None:
    """Put a teller into figures: is it a joke, is it about the picture, is it learned by heart?

    Each picture is asked once, greedily. An answer has joke form if it is one finished line of 4 to
    60 characters that does not describe the picture; it is grounded if it names something pictured,
    or puns on it (for records that say what is pictured, under "concepts"); it is verbatim if it is
    a training answer, punctuation aside. The held-out loss is that of the answers in DATA.

    Example: deadpan evaluate runs/demo/run nano:held-out --out figures.json
    """
    from deadpan.checkpoints.load import load
    from deadpan.cli.progress import bar
    from deadpan.config.loader import load_recipe
    from deadpan.data.records import load as load_records
    from deadpan.engines.base import GenerationSettings
    from deadpan.engines.builtin import BuiltinEngine
    from deadpan.evaluate.answers import ask, questions, write
    from deadpan.evaluate.evaluation import evaluate as figures_of
    from deadpan.evaluate.likelihood import answer_loss
    from deadpan.train.split import trained_on

    records = load_records(data, images)
    learned = None
    if training is not None:
        learned = load_records(training)
    elif (Path(model) / "recipe.yaml").is_file():
        learned = trained_on(load_recipe(Path(model) / "recipe.yaml"))
    by_heart = None
    if learned is not None:
        by_heart = [answer for record in learned for answer in record.answers]
    asked = questions(records)
    settings = GenerationSettings(max_new_tokens)
    with bar("loading weights") as progress:
        loaded = load(model, device=device, dtype=dtype, progress=progress)
    with bar("scoring answers") as progress:
        loss, _ = answer_loss(loaded.model, loaded.processor, records, progress=progress)
    with bar("asking") as progress:
        answers = list(ask(BuiltinEngine(loaded), asked, settings, progress=progress))
    figures = figures_of(asked, answers, by_heart, loss)
    if answers_out is not None:
        write(answers, answers_out)
    if out is not None:
        import json

        text = json.dumps(figures.to_json(), ensure_ascii=False, indent=2)
        out.write_text(text + "\n", encoding="utf-8")
    print_figures({model: figures})


def print_figures(evaluations: "dict[str, Evaluation]") -> None:
    """Show evaluations side by side, a column a teller."""
    from rich.console import Console
    from rich.table import Table

    from deadpan.evaluate.evaluation import rows

    table = Table(show_edge=False)
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in rows(list(evaluations.values())):
        table.add_row(label, *cells)
    Console().print(table)
