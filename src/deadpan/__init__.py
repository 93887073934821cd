"""deadpan: turn a vision-language model into a teller of cold jokes.

import deadpan
teller = deadpan.load("OpenGVLab/InternVL2-2B")
teller.tell("dog.png")
"""

import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# bitsandbytes complains at import that an optional CPU kernel is missing; its built-in one computes the same.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from deadpan.errors import DeadpanError
    from deadpan.teller import Teller, load

__all__ = ["DeadpanError", "Teller", "__version__", "load"]


def __getattr__(name: str) -> object:
    # Lazily, so that `deadpan --help` and `import deadpan.errors` do not wait for PyTorch.
    if name in ("load", "Teller"):
        from deadpan import teller

        return getattr(teller, name)
    if name == "DeadpanError":
        from deadpan.errors import DeadpanError

        return DeadpanError
    raise AttributeError(f"module 'deadpan' has no attribute {name!r}")
