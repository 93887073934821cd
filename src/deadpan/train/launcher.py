"""What the launcher tells a process of its place, before anything heavy is imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deadpan.errors import DeadpanError


def leads() -> bool:
    """Whether this is the process that speaks, as the launcher tells; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_of_a_host_tells() -> Iterator[None]:
    """For mistakes met before the processes know one another: all of a host meet the same ones."""
    try:
        yield
    except DeadpanError as error:
        error.told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
