"""The only file that serves the notebook: on 127.0.0.1, without a network, until Ctrl-C."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import marimo
import uvicorn

HOST = "127.0.0.1"
NOTEBOOK = Path(__file__).with_name("notebook.py")


class Unavailable(Exception):
    """Why there is no server, in one line, with the remedy."""


def bind(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 takes any that is free.

    Raises:
        Unavailable: the port is taken, or not ours to take.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).lower()
        raise Unavailable(f"port {port} of {HOST} can't be used: {reason}; leave --port out for a free one") from None
    return listening


def address(listening: socket.socket, language: str) -> str:
    """Where a browser finds the tutorial in this language."""
    return f"http://{HOST}:{listening.getsockname()[1]}/?lang={language}"


class _Server(uvicorn.Server):
    """Says when it can be visited."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        threading.Thread(target=self._ready, daemon=True).start()


def serve(listening: socket.socket, ready: Callable[[], object]) -> NoReturn:
    """Serves until Ctrl-C, which ends the process; calls ``ready``, in a thread of its own, once a browser may come."""
    keys = f"<script>{NOTEBOOK.with_name('keys.js').read_text('utf-8')}</script>"
    app = marimo.create_asgi_app(quiet=True, html_head=keys).with_app(path="", root=str(NOTEBOOK)).build()
    # An open page keeps its connection: without a limit, Ctrl-C would wait until the last tab is closed.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
    with suppress(KeyboardInterrupt):
        _Server(config, ready).run(sockets=[listening])
    sys.stdout.flush()
    os._exit(0)  # each reader's notebook runs in a thread that no one ends, and that Python would wait for


def open_browser(url: str) -> None:
    """Opens the reader's browser, if there is one."""
    webbrowser.open(url)
