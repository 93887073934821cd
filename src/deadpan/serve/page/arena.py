"""The tab where people vote on two tellers without knowing who they are."""

import asyncio
import secrets
from pathlib import Path

import gradio as gr

from deadpan.errors import DeadpanError
from deadpan.serve.page import cards
from deadpan.serve.page.tell import FURTHER, explain, picture_input, question_input, read
from deadpan.serve.page.words import Words
from deadpan.serve.pictures import Pictures
from deadpan.serve.ranking import rank
from deadpan.serve.tellers import Tellers
from deadpan.serve.votes import AlreadyVoted, Outcome, Votes

_ANY = secrets.SystemRandom()


def arena_tab(
    words: Words, tellers: Tellers, pictures: Pictures, votes: Votes, tab: gr.Tab
) -> None:
    """Build the tab."""
    match = gr.State()  # the id of the match that is shown; it never leaves the server
    gr.HTML(cards.quiet(words.arena_rules))
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=2, min_width=280):
            picture = picture_input(words, "arena-picture")
            with gr.Accordion(words.question, open=False):
                prompt = question_input(words)
            start = gr.Button(words.start, variant="primary", elem_id="start")
        with gr.Column(scale=3, min_width=280):
            answers = gr.HTML(cards.quiet(words.nothing_asked), elem_id="answers")
            with gr.Row(visible=False, elem_id="ballot") as ballot:
                buttons = {
                    outcome: gr.Button(
                        text, size="sm", elem_id=f"vote-{outcome.replace(' ', '-')}", min_width=118
                    )
                    for outcome, text in words.outcomes.items()
                }
            said = gr.HTML(elem_id="said")
    table = gr.HTML(elem_id="ranking")

    async def ask(path: str | None, prompt: str) -> tuple[object, ...]:
        if path is None:
            return cards.quiet(words.no_picture), None, gr.update(visible=False), "", gr.skip()
        names = _ANY.sample(tellers.names(), 2)
        try:
            image = await read(words, pictures, path)
            told = await asyncio.gather(
                *(tellers.tell(name, [image], prompt, FURTHER) for name in names)
            )
            left, right = ((name, joke) for name, (joke,) in zip(names, told, strict=True))
            # Stored before it is shown: a vote can only be on what a teller has really said.
            number = await asyncio.to_thread(votes.add_match, Path(path), prompt, left, right)
        except DeadpanError as error:
            return cards.quiet(explain(words, error)), None, gr.update(visible=False), "", gr.skip()
        shown = cards.match(words.sides, [left[1], right[1]])
        return shown, number, gr.update(visible=True), "", gr.update(value=words.next_round)

    def vote(number: str | None, outcome: Outcome) -> tuple[object, ...]:
        if number is None:
            return gr.skip(), None, gr.update(visible=False), gr.skip(), gr.skip()
        try:
            told = votes.vote(number, outcome)
        except AlreadyVoted:
            noted = cards.quiet(words.voted_before)
            return gr.skip(), None, gr.update(visible=False), noted, gr.skip()
        except DeadpanError as error:
            # The vote did not count; it may be given again.
            return gr.skip(), number, gr.skip(), cards.quiet(explain(words, error)), gr.skip()
        shown = cards.match(
            words.sides, [told.left_answer, told.right_answer], [told.left, told.right]
        )
        noted = cards.quiet(words.voted.format(words.outcomes[outcome]))
        return shown, None, gr.update(visible=False), noted, standings()

    def standings() -> str:
        return cards.ranking(words, rank(votes.all()))

    outputs = [answers, match, ballot, said]
    start.click(
        ask,
        [picture, prompt],
        [*outputs, start],
        show_progress_on=answers,
        api_visibility="private",
    )
    for outcome, button in buttons.items():
        button.click(
            lambda number, outcome=outcome: vote(number, outcome),
            match,
            [*outputs, table],
            show_progress="hidden",
            api_visibility="private",
        )
    tab.select(standings, outputs=table, show_progress="hidden", api_visibility="private")
