"""What to do next."""

import shlex
from pathlib import Path


def hear(model: Path) -> str:
    """How to hear what has just been made."""
    return f"hear it: deadpan tell {shlex.quote(str(model))} PICTURE"
