import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from deadpan.errors import DeadpanError
from deadpan.report import figure as module
from deadpan.report.curves import Curve, read_all, smooth
from deadpan.report.figure import draw, missing_characters, save, svg
from deadpan.report.style import Style

FIRST = Curve(
    name="first",
    source=Path("runs/first"),
    steps=(10, 20, 30, 40),
    losses=(4.0, 2.0, 3.0, 1.0),
    eval_steps=(0, 15, 40),
    eval_losses=(4.5, 2.5, 3.5),
    samples=(80, 160, 240, 320),
    seconds=(100.0, 200.0, 400.0, 480.0),
)
SECOND = replace(FIRST, name="second", eval_steps=(), eval_losses=())


def lines(figure: Figure) -> list[Line2D]:
    return list(figure.axes[0].lines)


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_data()
    return np.asarray(x).tolist(), np.asarray(y).tolist()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ids(element: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', element))


def test_a_curve_is_drawn_as_logged_smoothed_and_held_out() -> None:
    logged, smoothed, held_out, lowest = lines(draw([FIRST], Style(smoothing=0.5)))
    steps = list(FIRST.steps)
    assert points(logged) == (steps, list(FIRST.losses))
    assert points(smoothed) == (steps, smooth(FIRST.losses, 0.5))
    assert points(held_out) == ([0, 15, 40], [4.5, 2.5, 3.5])
    assert points(lowest) == ([15], [2.5])
    assert len({to_hex(line.get_color()) for line in (logged, smoothed, held_out, lowest)}) == 1
    assert (logged.get_alpha() or 1) < 0.5
    assert held_out.is_dashed()


def test_without_smoothing_only_the_logged_line_is_drawn() -> None:
    figure = draw([SECOND], Style(smoothing=0))
    (line,) = lines(figure)
    assert points(line) == (list(SECOND.steps), list(SECOND.losses))
    assert legend(figure) == ["second"]


def test_a_held_out_loss_that_is_not_a_number_is_not_the_lowest() -> None:
    curve = replace(FIRST, eval_losses=(float("nan"), 3.0, 2.0))
    assert points(lines(draw([curve]))[-1]) == ([40], [2.0])


@pytest.mark.parametrize(
    ("x", "stretch", "places", "held_out", "label"),
    [
        ("step", 1, [10, 20, 30, 40], [0, 15, 40], "optimizer step"),
        ("sample", 1, [80, 160, 240, 320], [0, 120, 320], "samples seen"),
        ("time", 0.25, [25, 50, 100, 120], [0, 37.5, 120], "time in steps (seconds)"),
        ("time", 6, [10, 20, 40, 48], [0, 15, 48], "time in steps (minutes)"),
        ("time", 360, [10, 20, 40, 48], [0, 15, 48], "time in steps (hours)"),
    ],
)
def test_the_axis(
    x: str, stretch: float, places: list[float], held_out: list[float], label: str
) -> None:
    seconds = tuple(stretch * second for second in FIRST.seconds or ())
    figure = draw([replace(FIRST, seconds=seconds)], Style(x))
    assert points(lines(figure)[0])[0] == pytest.approx(places)
    assert points(lines(figure)[2])[0] == pytest.approx(held_out)
    assert figure.axes[0].get_xlabel() == label


@pytest.mark.parametrize(
    ("x", "lacking"),
    [("sample", "how many samples a step has"), ("time", "how long its steps took")],
)
def test_a_run_that_does_not_say_where_it_is_is_named(x: str, lacking: str) -> None:
    curve = replace(SECOND, samples=None, seconds=None)
    with pytest.raises(DeadpanError) as caught:
        draw([FIRST, curve], Style(x))
    assert caught.value.what == f"The run second does not say {lacking}."
    assert caught.value.where == str(Path("runs/first"))
    draw([FIRST, curve])


def test_an_unknown_axis_is_an_error() -> None:
    with pytest.raises(DeadpanError, match="no such axis") as caught:
        draw([FIRST], Style("samples"))
    assert caught.value.fix == "did you mean 'sample'?"


def test_the_legend_names_the_runs_and_says_how_they_were_smoothed() -> None:
    figure = draw([SECOND, replace(SECOND, name="_a $x$ b")], Style(smoothing=0.75))
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    assert legend(figure) == [
        "second",
        "_a $x$ b",
        "",
        "as logged",
        "moving average,\nexponential, 0.75",
    ]
    assert legend(draw([FIRST], Style(smoothing=0)))[2:] == ["held-out loss", "its lowest"]


def test_a_long_name_is_shortened_in_the_middle() -> None:
    name = "internvl2-2b-qlora-" + "x" * 50 + "-seed-7"
    shown = legend(draw([replace(FIRST, name=name)]))[0]
    assert len(shown) == 36
    assert shown.startswith("internvl2-2b-q")
    assert shown.endswith("x-seed-7")


@pytest.mark.parametrize("number", [2, 7, 8, 20])
def test_each_curve_has_a_colour_of_its_own(number: int) -> None:
    figure = draw([SECOND] * number, Style(smoothing=0))
    assert len({to_hex(line.get_color()) for line in lines(figure)}) == number


@pytest.mark.parametrize("losses", [(6.0, 0.004), (6.0, 1.7), (2.9, 2.1), (2.30, 2.29), (1.0, 0.0)])
def test_a_logarithmic_axis_has_labels_to_read_it_by(losses: tuple[float, float]) -> None:
    curve = replace(SECOND, steps=(1, 2), losses=losses)
    figure = draw([curve], Style(smoothing=0, log=True))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    labels = {place: text.get_text() for place, text in ticks if low <= place <= high}
    assert len(labels) == len(set(labels.values())) >= 3
    assert min(labels) < 3 * low
    assert max(labels) > high / 3


def test_svg_is_one_element_that_fits_into_a_page() -> None:
    element = svg([replace(FIRST, name="<&> 'first' \"run\"")])
    root = ElementTree.fromstring(element)
    assert root.tag.endswith("svg")
    assert root.get("aria-label") == "loss of <&> 'first' \"run\""
    assert "date" not in element
    # The style rule is for this figure only, and every reference has its target.
    assert re.findall(r"[^\s>{}]*\s*\*\{", element) == [f"#{root.get('id')} *{{"]
    references = set(re.findall(r'href="#([^"]+)"', element))
    references |= set(re.findall(r"url\(#([^)]+)\)", element))
    assert references
    assert references <= ids(element)


def test_svg_is_deterministic_and_its_ids_are_its_own() -> None:
    assert svg([FIRST]) == svg([FIRST])
    assert not ids(svg([FIRST])) & ids(svg([SECOND]))


def test_matplotlib_is_left_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    svg([FIRST])
    assert dict(matplotlib.rcParams) == before
    code = "import deadpan.report.figure, sys; print('matplotlib.pyplot' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("fonts", [module._CJK_FONTS, ()])
def test_no_name_makes_matplotlib_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fonts: Sequence[str]
) -> None:
    monkeypatch.setattr(module, "_CJK_FONTS", fonts)
    curves = [replace(FIRST, name=name) for name in ("冷笑话", "🐻 a\tb", "_x", "$a", "$a$", "")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(curves, tmp_path / "loss")


def test_characters_without_a_font_become_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CJK_FONTS", ())
    assert missing_characters("a冷b笑冷") == "冷笑"
    assert legend(draw([replace(FIRST, name="a冷b笑")]))[0] == "a□b□"


def test_chinese_is_shown_where_a_font_has_it() -> None:
    if len(module._families()) == 1:
        pytest.skip("no font with Chinese characters is installed")
    assert missing_characters("冷笑话，第一次") == ""
    assert legend(draw([replace(FIRST, name="冷笑话")]))[0] == "冷笑话"


@pytest.mark.parametrize(
    ("out", "written"),
    [
        ("new/loss", ["new/loss.png", "new/loss.svg"]),
        ("loss.png", ["loss.png"]),
        ("loss.SVG", ["loss.SVG"]),
    ],
)
def test_the_ending_decides_what_is_written(tmp_path: Path, out: str, written: list[str]) -> None:
    paths = save([FIRST], tmp_path / out)
    assert paths == [tmp_path / name for name in written]
    for path in paths:
        if path.suffix.lower() == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as picture:
                assert (picture.format, picture.size) == ("PNG", (1440, 768))


def test_another_ending_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "metrics.jsonl"
    with pytest.raises(DeadpanError, match="PNG or SVG") as caught:
        save([FIRST], out)
    assert caught.value.fix == f"--out {out}.png"
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeadpanError, match="cannot be written") as caught:
        save([FIRST], tmp_path / "file" / "loss.png")
    assert caught.value.where == str(tmp_path / "file" / "loss.png")


def test_real_logs_of_mmengine_are_drawn(golden: Path, tmp_path: Path) -> None:
    names = ["adamw_scalars", "dadapt_adam_scalars"]
    curves = read_all([golden / "seed" / f"{name}.json" for name in names])
    assert [curve.name for curve in curves] == names
    assert [(len(curve.steps), curve.steps[-1]) for curve in curves] == [(200, 2000), (134, 1340)]
    assert [round(curve.losses[-1], 2) for curve in curves] == [1.85, 0.04]
    # 1.81 hours each.
    assert [round((curve.seconds or (0,))[-1] / 3600, 1) for curve in curves] == [1.8, 1.8]
    assert len(save(curves, tmp_path / "loss", Style("time", log=True))) == 2
