"""The tab where tellers tell, side by side."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from PIL import Image

from deadpan.data.records import PROMPT
from deadpan.engines.base import GenerationSettings
from deadpan.errors import DeadpanError
from deadpan.serve.page import cards
from deadpan.serve.page.words import Words
from deadpan.serve.pictures import Pictures
from deadpan.serve.tellers import AnswerTimeout, QueueFull, ShuttingDown, Tellers

FIRST = GenerationSettings()
"""The first joke about a picture is the likeliest one."""
FURTHER = GenerationSettings(temperature=0.8)
"""Any other is drawn, or it would be the same one."""


@dataclass
class Told:
    """What has been told about a picture.

    Attributes:
        subject: The picture and the question; of another one nothing has been told.
        jokes: By teller, the oldest first.
    """

    subject: tuple[str, str] | None = None
    jokes: dict[str, list[str]] = field(default_factory=dict)


def tell_tab(words: Words, tellers: Tellers, pictures: Pictures) -> None:
    """Build the tab."""
    names = tellers.names()
    told = gr.State(Told())
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=2, min_width=280):
            picture = picture_input(words, "tell-picture")
            chosen = gr.CheckboxGroup(
                names,
                value=names[:2],
                label=words.tellers,
                elem_id="tellers",
                visible=len(names) > 1,
            )
            with gr.Accordion(words.question, open=False):
                prompt = question_input(words)
            button = gr.Button(words.tell_one, variant="primary", elem_id="tell")
        with gr.Column(scale=3, min_width=280):
            jokes = gr.HTML(cards.quiet(words.nothing_told), elem_id="jokes")

    async def tell(
        path: str | None, chosen: list[str], prompt: str, told: Told
    ) -> AsyncIterator[tuple[object, ...]]:
        if path is None or not chosen:
            missing = words.no_picture if path is None else words.no_teller
            yield cards.quiet(missing), told, gr.skip()
            return
        if told.subject != (path, prompt):
            told = Told((path, prompt))
        try:
            image = await read(words, pictures, path)
        except DeadpanError as error:
            yield cards.quiet(explain(words, error)), told, gr.skip()
            return
        for name in chosen:
            told.jokes.setdefault(name, [])
        shown = {name: told.jokes[name] for name in chosen}
        unfinished = dict.fromkeys(chosen, "")
        yield cards.jokes(shown, unfinished), told, gr.skip()
        async with contextlib.aclosing(_tell_all(words, tellers, shown, image, prompt)) as pieces:
            async for name, piece in pieces:
                if piece is None:
                    told.jokes[name].append(unfinished.pop(name))
                else:
                    unfinished[name] += piece
                yield cards.jokes(shown, unfinished), told, gr.skip()
        yield cards.jokes(shown, {}), told, gr.update(value=words.another)

    asked = {"inputs": [picture, chosen, prompt, told], "outputs": [jokes, told, button]}
    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    picture.upload(tell, **asked, **hidden)
    button.click(tell, **asked, **hidden)
    picture.clear(
        lambda: (cards.quiet(words.nothing_told), gr.update(value=words.tell_one)),
        outputs=[jokes, button],
        **hidden,
    )


def picture_input(words: Words, name: str) -> gr.Image:
    """Where a picture is dropped; the file comes as it was given."""
    return gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label=words.picture,
        show_label=False,
        placeholder=words.drop,
        height=320,
        buttons=[],
        elem_id=name,
    )


def question_input(words: Words) -> gr.Textbox:
    """What the tellers are asked."""
    return gr.Textbox(PROMPT, label=words.question, show_label=False, lines=2, max_length=2000)


async def read(words: Words, pictures: Pictures, path: str) -> Image.Image:
    """Open an uploaded picture, which may be broken or too large."""
    return await pictures.open(await asyncio.to_thread(Path(path).read_bytes), words.picture)


def explain(words: Words, error: DeadpanError) -> str:
    """An error, as the page says it: without paths of the server."""
    known = {QueueFull: words.busy, AnswerTimeout: words.slow, ShuttingDown: words.closing}
    return known.get(type(error), error.what)


async def _tell_all(
    words: Words,
    tellers: Tellers,
    told: Mapping[str, list[str]],
    image: Image.Image,
    prompt: str,
) -> AsyncGenerator[tuple[str, str | None]]:
    """The jokes of several tellers as they come: names with pieces, and with None at each joke's end."""
    pieces: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()

    async def listen(name: str) -> None:
        settings = FURTHER if told[name] else FIRST
        try:
            async for piece in tellers.stream(name, [image], prompt, settings):
                pieces.put_nowait((name, piece))
        except DeadpanError as error:
            pieces.put_nowait((name, explain(words, error)))
        pieces.put_nowait((name, None))

    async with asyncio.TaskGroup() as group:
        listeners = [group.create_task(listen(name)) for name in told]
        try:
            telling = len(told)
            while telling:
                name, piece = await pieces.get()
                telling -= piece is None
                yield name, piece
        finally:
            for listener in listeners:
                listener.cancel()
