"""The tab of what has been trained: loss curves, and what was said on the way."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import yaml

from deadpan.data.pictures import data_uri, open_picture
from deadpan.errors import DeadpanError
from deadpan.nano import records_file
from deadpan.report.curves import read_all
from deadpan.report.figure import svg
from deadpan.report.style import Style
from deadpan.serve.page import cards
from deadpan.serve.page.words import Words

_LONG_EDGE = 240
"""Of a probe picture, in pixels."""
_DEPTH = 3
"""Folders within folders in which runs are looked for."""
_drawing = threading.Lock()
"""matplotlib's settings are the process's own, and a figure is drawn in settings of its own."""


def runs_tab(words: Words, folder: Path, tab: gr.Tab) -> None:
    """Build the tab."""
    with gr.Row(elem_classes="controls"):
        chosen = gr.CheckboxGroup([], label=words.choose_runs, elem_id="runs", scale=4)
        axis = gr.Radio(
            [(text, name) for name, text in words.axes.items()],
            value=Style.x,
            label=words.axis,
            scale=2,
        )
        refresh = gr.Button(words.refresh, scale=0, min_width=110)
    page = gr.HTML(cards.quiet(words.no_runs), elem_id="run-page")

    def show(chosen: list[str], axis: str) -> str:
        return render(words, folder, chosen, axis)

    def look(chosen: list[str], axis: str) -> tuple[object, str]:
        names = list(find_runs(folder))
        kept = [name for name in chosen if name in names] or names[:1]
        return gr.update(choices=names, value=kept), show(kept, axis)

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    tab.select(look, [chosen, axis], [chosen, page], **hidden)
    refresh.click(look, [chosen, axis], [chosen, page], **hidden)
    chosen.input(show, [chosen, axis], page, **hidden)
    axis.input(show, [chosen, axis], page, **hidden)


def find_runs(folder: Path) -> dict[str, Path]:
    """The run folders inside a folder, or the folder itself, by what to call them; the newest first."""
    logs = [
        log for depth in range(_DEPTH + 1) for log in folder.glob("*/" * depth + "metrics.jsonl")
    ]
    logs.sort(key=lambda log: log.stat().st_mtime, reverse=True)
    return {
        folder.absolute().name
        if log.parent == folder
        else str(log.parent.relative_to(folder)): log.parent
        for log in logs
    }


def render(words: Words, folder: Path, chosen: Sequence[str], axis: str) -> str:
    """The curves of some runs on one figure and, below, what each said about its probe pictures."""
    found = find_runs(folder)
    # Names come from the browser: only those of runs that were found mean anything.
    runs = {name: found[name] for name in chosen if name in found}
    if not runs:
        return cards.quiet(words.no_runs)
    try:
        with _drawing:
            parts = [
                f'<div class="curve">{svg(read_all(list(runs.values())), Style(x=axis))}</div>'
            ]
    except DeadpanError as error:
        parts = [cards.quiet(error.what)]
    for name, run in runs.items():
        if said := probe_jokes(run):
            parts.append(cards.probes(words, name, said))
    return "".join(parts)


def probe_jokes(run: Path) -> list[tuple[str, str | None, list[tuple[int, str]]]]:
    """What a run said about each of its probe pictures.

    Returns:
        For each picture its name, its `data:` address if it can be opened, and the answers by step. An answer that is
        the one before is left out.
    """
    said: dict[str, list[tuple[int, str]]] = {}
    try:
        text = (run / "jokes.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.split("\n"):
        try:
            joke = json.loads(line)
        except json.JSONDecodeError:
            break  # a last line that is being written
        answers = said.setdefault(joke["picture"], [])
        if not answers or answers[-1][1] != joke["answer"]:
            answers.append((joke["step"], joke["answer"]))
    folders = _picture_folders(run)
    return [(Path(name).name, _thumbnail(name, folders), answers) for name, answers in said.items()]


def _picture_folders(run: Path) -> list[Path]:
    """Where the paths of a run's pictures may start from, by its recipe."""
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return []
    match recipe:
        case {"data": {"images": str(images)}}:
            return [Path(images)]
        case {"data": {"train": str(train), **others}}:
            files = [train, *([v] if isinstance(v := others.get("validation"), str) else [])]
            return [records_file(Path(file)).parent for file in files]
    return []


def _thumbnail(name: str, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        if (folder / name).is_file():
            try:
                return data_uri(open_picture(folder / name), _LONG_EDGE)
            except DeadpanError:
                return None
    return None
