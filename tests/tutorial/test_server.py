"""The lesson's server: two pages, three answers, and nothing else for anybody else."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import pytest

pytest.importorskip("markdown_it")

from rmsnorm.tutorial import measured, serve


@pytest.fixture
def server(quick):
    found = serve.bind(0)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://{serve.HOST}:{found.server_address[1]}/"
    found.shutdown()
    found.server_close()
    thread.join()


def get(address: str, **headers: str):
    """Status, type and text of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as found:
            return found.status, found.headers["Content-Type"], found.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.headers["Content-Type"], refusal.read().decode()


def test_the_server_has_two_pages_and_three_answers(server):
    for name, language in (("", "en"), ("en.html", "en"), ("zh.html", "zh-Hans")):
        status, kind, page = get(server + name)
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert f'<html lang="{language}" data-live>' in page
    status, kind, found = get(server + "live/cost?rows=128&dtype=bfloat16")
    assert (status, kind) == (200, "application/json; charset=utf-8")
    assert set(json.loads(found)["seconds"]) == set(measured.NAMES)
    assert json.loads(get(server + "live/ulps")[2])["bfloat16"] <= 0.51
    assert json.loads(get(server + "live/depth?sentence=a")[2]) == {"why": "no model here"}


@pytest.mark.parametrize(
    ("path", "headers", "status", "words"),
    [
        ("other.html", {}, 404, "en.html, zh.html"),
        ("../command.py", {}, 404, "no page"),
        ("live/cost?rows=1000000000&dtype=float32", {}, 404, "nothing is measured"),
        ("live/cost?rows=1&dtype=int8", {}, 404, "nothing is measured"),
        ("live/other", {}, 404, "nothing is measured"),
        ("en.html", {"Host": "example.org"}, 403, "127.0.0.1"),
        ("live/ulps", {"Host": "example.org:80"}, 403, "127.0.0.1"),
    ],
)
def test_the_server_refuses_the_rest(server, path, headers, status, words):
    found = get(server + path, **headers)
    assert found[0] == status
    assert words in found[2]
    assert found[1].startswith("text/plain")
