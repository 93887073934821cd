"""How loss curves are shown; apart from the drawing, so that the command line knows the defaults without it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """What to show, and how.

    Attributes:
        x: What the curves run along: step, sample or time.
        smoothing: The weight of `deadpan.report.curves.smooth`; 0 draws no average. With the default it
            stands for about the last five values: more would lag behind a loss that falls fast.
        log: Whether the loss axis is logarithmic.
        narrow: Whether the figure is for a narrow column: its text is then larger beside the curves, and
            the legend stands below them.
    """

    x: str = "step"
    smoothing: float = 0.8
    log: bool = False
    narrow: bool = False
