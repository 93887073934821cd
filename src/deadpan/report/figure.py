"""Loss curves as a figure.

Everything is set on the figure's own objects: matplotlib's global state stays as it is, so that a
figure may be drawn inside another program.
"""

import hashlib
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps, colors, font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from deadpan.errors import DeadpanError, did_you_mean, writing
from deadpan.report.curves import Curve, smooth
from deadpan.report.style import Style

_FORMATS = (".png", ".svg")

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart; without yellow, which is too pale for lines."""
_INK, _QUIET, _FAINT = "#222222", "#666666", "#E4E4E4"
_LOGGED: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.28, "zorder": 2}
_BARE: dict[str, Any] = {"linewidth": 1.2, "zorder": 3}
"""As logged, where no average is drawn."""
_SMOOTHED: dict[str, Any] = {"linewidth": 1.9, "zorder": 3}
_HELD_OUT: dict[str, Any] = {
    "linewidth": 1.3, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 5,
    "markerfacecolor": "white", "markeredgewidth": 1.3, "zorder": 4,
}  # fmt: skip
_LOWEST: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6.5, "zorder": 5}
_SIZE, _NARROW_SIZE, _MARGIN = (9.0, 4.8), (5.8, 4.3), 0.14
"""In inches."""
_DOTS_PER_INCH = 160
_LONGEST_NAME = 36
"""Characters of a name in the legend, which stands beside the curves and takes its room from theirs."""

_CJK_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Microsoft YaHei",
    "Noto Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Hiragino Sans GB", "Heiti SC",
    "Heiti TC", "STHeiti", "SimHei", "Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans CJK HK",
    "Noto Sans CJK KR", "Droid Sans Fallback", "Arial Unicode MS", "SimSun",
)  # fmt: skip
"""Fonts with Chinese characters, the best first."""
_NEEDED = {
    "sample": (
        "how many samples a step has",
        "recipe.yaml beside the log, with micro_batch_size and gradient_accumulation_steps",
    ),
    "time": (
        "how long its steps took",
        "mmengine's `time` in each line; or `samples_per_second` there, and recipe.yaml beside the log",
    ),
}
"""By axis, what a run may fail to say, and where it would be."""
_MISSING = "□"
"""Stands for a character that no font has."""


def draw(curves: Sequence[Curve], style: Style | None = None) -> Figure:
    """Draw curves on one figure: losses as logged, their moving average, and the held-out loss.

    Raises:
        DeadpanError: If there is no such axis, a run does not tell where it is along it, or the
            smoothing is out of bounds.
    """
    style = style or Style()
    places = [_places(curve, style.x) for curve in curves]
    unit, label = _unit(style.x, max(x.max() for x, _ in places))
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN)
    size = _NARROW_SIZE if style.narrow else _SIZE
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout=layout, facecolor="white")
    axes = figure.add_subplot()
    for curve, colour, (x, eval_x) in zip(curves, colours(len(curves)), places, strict=True):
        _draw_curve(axes, curve, x / unit, eval_x / unit, colour, style.smoothing)
    _dress(axes, curves, label, style.log)
    _add_legend(figure, curves, style)
    return figure


def svg(curves: Sequence[Curve], style: Style | None = None) -> str:
    """Draw curves as an SVG element, to be put into an HTML page.

    The text is the same whenever the curves are, and no other figure on the page has its ids. A page
    may change colours, for a dark one: `#0072b2` is `var(--curve-0072b2, #0072b2)`.

    Raises:
        DeadpanError: See `draw`.
    """
    text = _render(draw(curves, style), "svg").decode("utf-8")
    element = text[text.index("<svg") :].strip()
    root = "c" + hashlib.sha256(element.encode()).hexdigest()[:8]
    label = html.escape("loss of " + ", ".join(curve.name for curve in curves))
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{root}-", element)
    element = re.sub(r"((?:fill|stroke): )#([0-9a-f]{6})", r"\1var(--curve-\2, #\2)", element)
    # Or matplotlib's rule for all elements would be one for the whole page.
    element = element.replace("*{stroke", f"#{root} *{{stroke", 1)
    return element.replace("<svg", f'<svg id="{root}" role="img" aria-label="{label}"', 1)


def save(curves: Sequence[Curve], out: Path, style: Style | None = None) -> list[Path]:
    """Draw curves and write them.

    Args:
        curves: What to draw.
        out: A file named .png or .svg; without such an ending, both are written. Older files are
            replaced.
        style: How to draw them.

    Returns:
        The files written.

    Raises:
        DeadpanError: See `draw`; or the name has another ending, or a file cannot be written.
    """
    paths = [out] if out.suffix else [out.with_suffix(ending) for ending in _FORMATS]
    if not all(path.suffix.lower() in _FORMATS for path in paths):
        raise DeadpanError(
            "A figure is written as PNG or SVG.",
            where=out,
            expected="a name that ends in .png or .svg, or has no ending for both",
            fix=f"--out {out}.png",
        )
    figure = draw(curves, style)
    for path in paths:
        with writing("figure", path):
            path.write_bytes(_render(figure, path.suffix.lower().removeprefix(".")))
    return paths


def missing_characters(text: str) -> str:
    """The characters of a text that no installed font has; a figure shows a box for each of them."""
    fonts = [
        font_manager.get_font(font_manager.findfont(family, fallback_to_default=False))
        for family in _families()
    ]
    return "".join(
        character
        for character in dict.fromkeys(text)
        if not any(font.get_char_index(ord(character)) for font in fonts)
    )


def _families() -> list[str]:
    installed = set(font_manager.get_font_names())
    # DejaVu Sans comes with matplotlib.
    return ["DejaVu Sans", *[family for family in _CJK_FONTS if family in installed][:1]]


def _places(curve: Curve, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the training losses and the held-out losses of a curve are along the axis."""
    along = {"step": curve.steps, "sample": curve.samples, "time": curve.seconds}
    if x not in along:
        raise DeadpanError(
            "There is no such axis.", where=f"--x {x}", found=x, fix=did_you_mean(x, along)
        )
    values = along[x]
    if values is None:
        lacking, source = _NEEDED[x]
        raise DeadpanError(
            f"The run {curve.name} does not say {lacking}.",
            where=curve.source,
            expected=source,
            fix="draw the runs along their steps: --x step",
        )
    # Held-out losses may be taken at steps that are not logged, and before the first one.
    eval_values = np.interp(curve.eval_steps, [0, *curve.steps], [0, *values])
    return np.asarray(values, float), eval_values


def _unit(x: str, furthest: float) -> tuple[float, str]:
    """What the axis counts in, and what it says."""
    if x != "time":
        return 1, {"step": "optimizer step", "sample": "samples seen"}[x]
    if furthest < 3 * 60:
        return 1, "time in steps (seconds)"
    if furthest < 3 * 3600:
        return 60, "time in steps (minutes)"
    return 3600, "time in steps (hours)"


def colours(number: int) -> Sequence[str]:
    """The colours of so many curves, as `#rrggbb`, in the order in which they are drawn."""
    if number <= len(_PALETTE):
        return _PALETTE[:number]
    # No set of so many colours is told apart by all; an even scale at least shows the order of a sweep.
    scale = colormaps["viridis"](np.linspace(0, 0.9, number))
    return [colors.to_hex(colour) for colour in scale]


def _draw_curve(
    axes: Axes, curve: Curve, x: np.ndarray, eval_x: np.ndarray, colour: str, smoothing: float
) -> None:
    if smoothing:
        axes.plot(x, curve.losses, color=colour, **_LOGGED)
        axes.plot(x, smooth(curve.losses, smoothing), color=colour, **_SMOOTHED)
    else:
        axes.plot(x, curve.losses, color=colour, **_BARE)
    if curve.eval_losses:
        losses = np.array(curve.eval_losses)
        lowest = np.argmin(np.where(np.isnan(losses), np.inf, losses))
        axes.plot(eval_x, losses, color=colour, **_HELD_OUT)
        axes.plot(eval_x[lowest], losses[lowest], color=colour, **_LOWEST)


def _dress(axes: Axes, curves: Sequence[Curve], x_label: str, log: bool) -> None:
    held_out = any(curve.eval_losses for curve in curves)
    title = "Training and held-out loss" if held_out else "Training loss"
    axes.set_title(
        title + ", on a logarithmic scale" * log,
        loc="left", fontsize=12, fontweight="bold", color=_INK, pad=10,
    )  # fmt: skip
    axes.set_xlabel(x_label, fontsize=9.5, color=_QUIET, labelpad=6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_QUIET)
    axes.tick_params(which="both", labelsize=9, labelcolor=_QUIET, color=_QUIET, length=0)
    axes.tick_params(axis="x", length=3.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    if log:
        _make_logarithmic(axes)


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    # By powers of ten alone, or over a short range by their halves and fifths, it could hardly be read.
    axes.yaxis.set_major_locator(
        ticker.LogLocator(subs=(1, 2, 5)) if high > 8 * low else ticker.MaxNLocator(6)
    )
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _add_legend(figure: Figure, curves: Sequence[Curve], style: Style) -> None:
    """Name the runs and, below or beside, say what each kind of line is."""
    entries = [
        (Line2D([], [], color=colour, **_SMOOTHED), _legible(curve.name))
        for curve, colour in zip(curves, colours(len(curves)), strict=True)
    ]
    kinds = []
    if style.smoothing:
        break_or_space = " " if style.narrow else "\n"
        kinds += [
            (_LOGGED, "as logged"),
            (_SMOOTHED, f"moving average,{break_or_space}exponential, {style.smoothing:g}"),
        ]
    if any(curve.eval_losses for curve in curves):
        kinds += [(_HELD_OUT, "held-out loss"), (_LOWEST, "its lowest")]
    if kinds:
        # A gap between the two; in columns, as many as the runs' one may lack.
        gaps = max(0, len(kinds) - len(curves)) if style.narrow else 1
        entries += [(Line2D([], [], linestyle="none"), "")] * gaps
        entries += [(Line2D([], [], color=_INK, **kind), text) for kind, text in kinds]
    legend = figure.legend(
        [line for line, _ in entries],
        ["x"] * len(entries),
        loc="outside lower left" if style.narrow else "outside right upper",
        ncols=2 if style.narrow and kinds else 1,
        frameon=False,
        fontsize=9.5,
        handlelength=2.4,
        borderaxespad=1.2,
    )
    families = _families()
    for number, (text, (_, words)) in enumerate(zip(legend.get_texts(), entries, strict=True)):
        # Set afterwards, since matplotlib leaves out entries that begin with an underscore and
        # takes what stands between dollar signs for a formula.
        text.set(text=words, parse_math=False, fontfamily=families)
        text.set_color(_INK if number < len(curves) else _QUIET)


def _legible(name: str) -> str:
    """A name that fits into the legend and that the fonts can show."""
    if len(name) > _LONGEST_NAME:
        half = _LONGEST_NAME // 2
        name = f"{name[: half - 1]}…{name[-half:]}"
    return name.translate({ord(character): _MISSING for character in missing_characters(name)})


def _render(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    # SVG's ids are drawn from the salt, and its metadata has the date: both would differ every time.
    metadata = (
        dict.fromkeys(("Creator", "Date", "Format", "Type")) if file_format == "svg" else None
    )
    with matplotlib.rc_context({"svg.hashsalt": "deadpan"}):
        figure.savefig(buffer, format=file_format, metadata=metadata)
    return buffer.getvalue()
