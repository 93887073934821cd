"""Nano: the base model that comes with deadpan, and its starter set of pictures with jokes.

`tools/pretrain_nano.py` made the one and `tools/make_starter_data.py` the other. Both are package data: here is where
they lie, and by which names they are asked for.
"""

from pathlib import Path

from deadpan.errors import DeadpanError, did_you_mean

_HERE = Path(__file__).parent

MODEL = "nano"
"""What the base model is called where a checkpoint is asked for; `./nano` is a folder of that name."""

BASE = _HERE / "base"
"""Its folder, in the Hugging Face layout."""

RECORDS = {
    "nano:train": _HERE / "starter" / "train.json",
    "nano:held-out": _HERE / "starter" / "held-out.json",
}
"""The starter set's files, by what they are called where a file of records is asked for."""

PREFERENCES = {
    "nano:preferences": _HERE / "starter" / "preferences.jsonl",
    "nano:preferences-held-out": _HERE / "starter" / "preferences-held-out.jsonl",
}
"""Its preference pairs, for `objective: dpo`."""


def records_file(path: Path) -> Path:
    """The file that a name stands for; any other path stands for itself.

    Raises:
        DeadpanError: If it looks like a name of the starter set and is none.
    """
    name, files = str(path), RECORDS | PREFERENCES
    if name in files:
        return files[name]
    if name.startswith(f"{MODEL}:"):
        raise DeadpanError(
            "The starter set has no such part.", where=name, fix=did_you_mean(name, files)
        )
    return path
