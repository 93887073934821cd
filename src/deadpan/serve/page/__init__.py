"""The web page: tell, arena, runs.

It is gradio, mounted on the server's own app, once for each language. Nothing is fetched from anywhere else: fonts are
the system's, telemetry is off, and a Content-Security-Policy has the browser refuse whatever would leave the server.
"""

import hmac
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.routing import Mount

from deadpan.serve.page import cards
from deadpan.serve.page.arena import arena_tab
from deadpan.serve.page.guard import PageGuard, UploadsOnly
from deadpan.serve.page.runs import runs_tab
from deadpan.serve.page.tell import tell_tab
from deadpan.serve.page.words import LANGUAGES, Words, preferred
from deadpan.serve.pictures import Pictures
from deadpan.serve.tellers import Tellers
from deadpan.serve.votes import Votes

_FORM = 2**16
"""Bytes that a request may have besides a picture."""
_KEPT = 3600
"""Seconds that a dropped picture is kept for; those of matches are copied."""
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="15" fill="#2f6f6a"/>'
    '<path d="M9 12h4M19 12h4M10 22h12" stroke="#fff" stroke-width="2.4"/></svg>'
)
"""A straight face."""
_FONTS = [
    "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
    "Noto Sans SC", "sans-serif",
]  # fmt: skip


def mount_page(
    app: FastAPI,
    tellers: Tellers,
    pictures: Pictures,
    *,
    votes: Votes | None = None,
    runs: Path | None = None,
    api_key: str | None = None,
) -> None:
    """Put the page on an app: in each language under its code, with `/` leading to the browser's own.

    Args:
        app: The server's app.
        tellers: Who tells.
        pictures: Opens what is dropped.
        votes: Where the arena's votes go; without it, or with a single teller, there is no arena.
        runs: A folder of run folders to show; without it, they have no tab.
        api_key: What whoever opens the page must give as the password, under any name; None for none.
    """

    @app.get("/", include_in_schema=False)
    def language(request: Request) -> RedirectResponse:
        words = preferred(request.headers.get("accept-language", ""))
        return RedirectResponse(f"{request.scope.get('root_path', '')}/{words.code}/")

    # A browser asks for both at the root, wherever the page lies.
    @app.get("/manifest.json", include_in_schema=False)
    def manifest() -> dict[str, str]:
        return {"name": "deadpan", "display": "browser"}

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return Response(_ICON, media_type="image/svg+xml")

    for words in LANGUAGES:
        gr.mount_gradio_app(
            app,
            build(words, tellers, pictures, votes, runs),
            f"/{words.code}",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=pictures.max_bytes,
            auth=None if api_key is None else _opened_by(api_key),
            auth_message=words.locked,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=_theme(),
            css_paths=Path(__file__).with_name("page.css"),
        )
    # An open page keeps a connection for as long as it is open: it is not to keep the server from ending.
    app.state.closing = [
        route.app.stop_event.set
        for route in app.routes
        if isinstance(route, Mount) and isinstance(route.app, gr.routes.App)
    ]
    app.add_middleware(
        PageGuard,
        paths=[f"/{words.code}/" for words in LANGUAGES],
        max_body=pictures.max_bytes + _FORM,
    )


def build(
    words: Words, tellers: Tellers, pictures: Pictures, votes: Votes | None, runs: Path | None
) -> gr.Blocks:
    """The page in one language."""
    with UploadsOnly(
        analytics_enabled=False, title=words.title, fill_width=True, delete_cache=(_KEPT, _KEPT)
    ) as blocks:
        gr.HTML(cards.header(words, [other for other in LANGUAGES if other is not words]))
        with gr.Tabs():
            with gr.Tab(words.tell, id="tell"):
                tell_tab(words, tellers, pictures)
            if votes is not None and len(tellers.names()) > 1:
                with gr.Tab(words.arena, id="arena", elem_id="arena") as tab:
                    arena_tab(words, tellers, pictures, votes, tab)
            if runs is not None:
                with gr.Tab(words.runs, id="runs", elem_id="runs-tab") as tab:
                    runs_tab(words, runs, tab)
    # The tellers have a queue of their own.
    return blocks.queue(default_concurrency_limit=None)


def _opened_by(api_key: str) -> Callable[[str, str], bool]:
    key = api_key.encode()
    return lambda _, password: hmac.compare_digest(password.encode(), key)


def _theme() -> gr.themes.Base:
    paper, card, ink, soft, line, accent = (
        "#f6f5f2", "#ffffff", "#1d1d1b", "#6c6a64", "#dedcd5", "#2f6f6a",
    )  # fmt: skip
    dark_paper, dark_card, dark_ink, dark_soft, dark_line, dark_accent = (
        "#161716", "#1f2120", "#e9e7e1", "#9a988f", "#31332f", "#7fc4bd",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        radius_size="lg",
        font=_FONTS,
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill=paper,
        body_background_fill_dark=dark_paper,
        body_text_color=ink,
        body_text_color_dark=dark_ink,
        body_text_color_subdued=soft,
        body_text_color_subdued_dark=dark_soft,
        background_fill_primary=card,
        background_fill_primary_dark=dark_card,
        background_fill_secondary=paper,
        background_fill_secondary_dark=dark_paper,
        border_color_primary=line,
        border_color_primary_dark=dark_line,
        block_background_fill=card,
        block_background_fill_dark=dark_card,
        block_border_color=line,
        block_border_color_dark=dark_line,
        block_label_text_color=soft,
        block_label_text_color_dark=dark_soft,
        color_accent=accent,
        button_primary_background_fill=accent,
        button_primary_background_fill_hover="#275d59",
        button_primary_background_fill_dark=dark_accent,
        button_primary_background_fill_hover_dark="#94d1cb",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark=dark_paper,
        button_secondary_background_fill=card,
        button_secondary_background_fill_dark=dark_card,
        button_secondary_border_color=line,
        button_secondary_border_color_dark=dark_line,
    )
