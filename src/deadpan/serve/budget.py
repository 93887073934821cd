"""How much of something may be held at once, over all requests."""

import threading
import weakref

from deadpan.serve.tellers import QueueFull


class Budget:
    """A count that may not exceed a limit; taken by any thread, given back by any.

    Args:
        limit: The most that is held at once.
        what: What is counted, for messages.
    """

    def __init__(self, limit: int, what: str) -> None:
        self.limit = limit
        self._what = what
        self._held = 0
        # Reentrant: the garbage collector may run `give` in the middle of `take`.
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """What is held now."""
        return self._held

    def take(self, amount: int) -> None:
        """Hold an amount.

        Raises:
            QueueFull: If others hold too much for it to fit.
        """
        with self._lock:
            if self._held + amount > self.limit:
                raise QueueFull(
                    f"The server holds too many {self._what} already.",
                    expected=f"at most {self.limit:,}",
                    found=f"{self._held:,} held, {amount:,} more",
                    fix="ask again later",
                )
            self._held += amount

    def give(self, amount: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._held -= amount

    def give_with(self, owner: object, amount: int) -> None:
        """Give back what was taken as soon as nobody holds the owner any more."""
        weakref.finalize(owner, self.give, amount)
