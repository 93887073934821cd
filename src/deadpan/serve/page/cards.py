"""The parts of the page that are HTML of our own. What tellers and people wrote is escaped here, and nowhere else."""

from collections.abc import Mapping, Sequence
from html import escape

from deadpan.serve.page.words import Words
from deadpan.serve.ranking import Standing


def header(words: Words, others: Sequence[Words]) -> str:
    """The page's head, with links to the other languages."""
    links = " ".join(
        f'<a href="../{other.code}/" lang="{other.code}" hreflang="{other.code}">{other.language}</a>'
        for other in others
    )
    return (
        f'<header class="masthead"><div><h1>{escape(words.title)}</h1>'
        f"<p>{escape(words.tagline)}</p></div><nav>{links}</nav></header>"
    )


def quiet(text: str) -> str:
    """A line where there is nothing else to show."""
    return f'<p class="quiet" role="status">{escape(text)}</p>'


def jokes(told: Mapping[str, Sequence[str]], unfinished: Mapping[str, str]) -> str:
    """A card for each teller: its newest joke large, the older ones below.

    Args:
        told: What each teller has told, the oldest first.
        unfinished: What those that are telling have said so far.
    """
    cards = []
    for name, before in told.items():
        telling = name in unfinished
        newest, *older = [*([unfinished[name]] if telling else []), *reversed(before)] or [""]
        cards.append(_card(name, newest, older, telling))
    return f'<div class="jokes">{"".join(cards)}</div>'


def match(sides: Sequence[str], answers: Sequence[str], names: Sequence[str] | None = None) -> str:
    """Two answers, side by side; with the names of who said them once they may be known."""
    heads = sides if names is None else [f"{s} · {n}" for s, n in zip(sides, names, strict=True)]
    cards = [
        _card(head, answer, (), telling=False) for head, answer in zip(heads, answers, strict=True)
    ]
    return f'<div class="jokes pair">{"".join(cards)}</div>'


def _card(head: str, newest: str, older: Sequence[str], telling: bool) -> str:
    lines = "".join(f"<li>{escape(joke)}</li>" for joke in older)
    return (
        f'<article class="joke{" telling" * telling}" aria-busy="{str(telling).lower()}">'
        f'<h3>{escape(head)}</h3><p class="newest">{escape(newest)}</p>'
        f"{f'<ul>{lines}</ul>' if lines else ''}</article>"
    )


def ranking(words: Words, standings: Sequence[Standing]) -> str:
    """The ranking as a table."""
    if not standings:
        return quiet(words.no_votes)
    heads = "".join(f"<th>{escape(column)}</th>" for column in words.columns)
    rows = "".join(
        f"<tr><td>{row.rank}</td><th>{escape(row.teller)}</th><td>{row.rating:.0f}</td>"
        f"<td>{row.low:.0f}–{row.high:.0f}</td><td>{row.votes:,}</td><td>{row.won:,}</td>"
        f"<td>{row.both_dry:,}</td><td>{row.both_bad:,}</td></tr>"
        for row in standings
    )
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    groups: dict[int, list[str]] = {}
    for row in standings:
        groups.setdefault(row.group, []).append(row.teller)
    if len(groups) > 1:
        table += quiet(words.not_connected + "; ".join(map(", ".join, groups.values())))
    return f'<section class="ranking"><h2>{escape(words.ranking)}</h2>{table}</section>'


def probes(
    words: Words, run: str, pictures: Sequence[tuple[str, str | None, Sequence[tuple[int, str]]]]
) -> str:
    """What a run said about its probe pictures.

    Args:
        words: The language.
        run: The run's name.
        pictures: For each, its name, its `data:` address if it could be opened, and the answers by step.
    """
    cards = []
    for name, source, answers in pictures:
        image = f'<img src="{source}" alt="{escape(name)}">' if source else ""
        said = "".join(
            f"<li><span>{words.step} {step:,}</span> {escape(text)}</li>" for step, text in answers
        )
        cards.append(
            f'<article class="probe">{image}<h3>{escape(name)}</h3><ol>{said}</ol></article>'
        )
    return (
        f"<section><h2>{escape(run)} · {escape(words.probes)}</h2>"
        f'<div class="probes">{"".join(cards)}</div></section>'
    )
