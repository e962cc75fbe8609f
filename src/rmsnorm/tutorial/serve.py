"""The only file that serves the lesson: on 127.0.0.1, without a network, until Ctrl-C.

The page is there before torch is: what needs it is imported by the first question that the page asks.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from . import build

HOST = "127.0.0.1"
LONGEST = 2000
"""Letters of a sentence."""


def answer(name: str, asked: dict[str, str]) -> Any:
    """What this machine says to a question of the page; None if there is no such question with these arguments.

    Args:
        name: cost, depth or ulps.
        asked: its arguments, as strings from outside.
    """
    from rmsnorm._extras import hush
    from rmsnorm.tutorial import measured

    hush()
    if name == "ulps":
        return measured.ulps()
    if name == "depth":
        return measured.depth(asked.get("sentence", "")[:LONGEST])
    rows, dtype = asked.get("rows", ""), asked.get("dtype", "")
    if name == "cost" and rows in map(str, measured.SHAPES) and dtype in ("float32", "bfloat16"):
        return measured.cost(int(rows), dtype)
    return None


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
            self._send(403, "this server answers to 127.0.0.1 alone")
        elif name in self.pages:
            self._send(200, self.pages[name], "text/html")
        elif name.startswith("live/"):
            with self.turn:
                found = answer(name.removeprefix("live/"), dict(parse_qsl(asked.query)))
            if found is None:
                self._send(404, f"nothing is measured for {self.path}")
            else:
                self._send(200, json.dumps(found), "application/json")
        else:
            self._send(404, f"no page {name}: there are {', '.join(self.pages)}")

    def _send(self, status: int, text: str, kind: str = "text/plain") -> None:
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


class Server(ThreadingTCPServer):  # http.server's own asks a name server who 127.0.0.1 is
    allow_reuse_address = daemon_threads = True


def bind(port: int) -> Server:
    """A server on this machine's own address; port 0 takes any that is free.

    Raises:
        OSError: the port is taken, or not ours to take.
    """
    return Server((HOST, port), type("Pages", (Handler,), {"pages": build.pages({}, live=True)}))
