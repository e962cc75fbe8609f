"""The only file that serves the lesson: on 127.0.0.1, without a network, until Ctrl-C.

The page is there before torch is: what needs it is imported by the first question that the page asks.
"""

from __future__ import annotations

import json
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import build

HOST = "127.0.0.1"
LONGEST = 2000
"""Letters of a sentence."""


class Unavailable(Exception):
    """Why there is no server, in one line, with the remedy."""


class Asked(ValueError):
    """Why a question has no answer."""


def answer(name: str, asked: dict[str, str]) -> Any:
    """What this machine says to a question of the page.

    Args:
        name: cost, depth or ulps.
        asked: its arguments, as strings from outside.

    Raises:
        Asked: there is no such question, or not with these arguments.
    """
    from rmsnorm._extras import hush
    from rmsnorm.tutorial import measured

    hush()
    if name == "ulps":
        return measured.ulps()
    if name == "depth":
        return measured.depth(asked.get("sentence", "")[:LONGEST])
    rows, dtype = asked.get("rows", ""), asked.get("dtype", "")
    if name != "cost" or rows not in map(str, measured.SHAPES) or dtype not in ("float32", "bfloat16"):
        raise Asked(f"nothing is measured for {name} with {asked}")
    return measured.cost(int(rows), dtype)


class Handler(BaseHTTPRequestHandler):
    """Two pages, and the questions under /live/. Whoever asks under another name than this machine's own is refused:
    a page of the net whose name was pointed here would read what it likes."""

    pages: dict[str, str]
    turn = threading.Lock()
    """One measurement at a time: two would time each other."""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        name = asked.path.removeprefix("/") or "en.html"
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self._send(403, "this server answers to 127.0.0.1 alone", "text/plain")
        elif name in self.pages:
            self._send(200, self.pages[name], "text/html")
        elif name.startswith("live/"):
            try:
                with self.turn:
                    found = answer(
                        name.removeprefix("live/"), {key: one[0] for key, one in parse_qs(asked.query).items()}
                    )
            except Asked as reason:
                self._send(404, str(reason), "text/plain")
            else:
                self._send(200, json.dumps(found), "application/json")
        else:
            self._send(404, f"no page {name}: there are {', '.join(self.pages)}", "text/plain")

    def _send(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):  # the reader has left
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal has one line, the address."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:  # http.server's own asks a name server who 127.0.0.1 is
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = HOST, self.server_address[1]


def bind(port: int) -> Server:
    """A server on this machine's own address; port 0 takes any that is free.

    Raises:
        Unavailable: the port is taken, or not ours to take.
    """
    try:
        return Server((HOST, port), type("Pages", (Handler,), {"pages": build.pages({}, live=True)}))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Unavailable(f"port {port} of {HOST} can't be used: {reason}; leave --port out for a free one") from None


def address(server: Server, language: str) -> str:
    """Where a browser finds the lesson in this language."""
    return f"http://{HOST}:{server.server_port}/{language}.html"


def serve(server: Server, ready: Callable[[], object]) -> None:
    """Serves until Ctrl-C; calls ``ready``, in a thread of its own, as a browser may come."""
    threading.Thread(target=ready, daemon=True).start()
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def open_browser(url: str) -> None:
    """Opens the reader's browser, if there is one."""
    webbrowser.open(url)
