"""Run the app: a socket of our own, and an end that finishes what is running."""

import errno
import signal
import socket

import uvicorn
from fastapi import FastAPI

from deadpan.errors import DeadpanError


def listen(host: str, port: int) -> socket.socket:
    """Open the socket; port 0 takes a free one.

    Raises:
        DeadpanError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise DeadpanError(
            f"The address {host} port {port} cannot be listened on: {error.strerror}.",
            fix="choose another --port; 0 takes a free one"
            if error.errno == errno.EADDRINUSE
            else "choose another --port, or a --host that is an address of this machine",
        ) from None


class Server(uvicorn.Server):
    """Tells the app's parts when it begins to shut down, by calling what is in `app.state.closing`."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for close in getattr(self.config.app.state, "closing", ()):  # type: ignore[union-attr]
            close()
        await super().shutdown(sockets)


def serve(app: FastAPI, listener: socket.socket, grace: float) -> None:
    """Serve until SIGTERM or Ctrl-C, then refuse what is new and finish what is running; a second Ctrl-C ends at once.

    Args:
        app: What `create_app` returns.
        listener: An open socket.
        grace: Seconds that running requests get to finish.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(grace) + 1,
    )
    # uvicorn raises the signal again when it has shut down; to whoever stopped it, that is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[listener])
