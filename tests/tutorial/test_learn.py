"""`rmsnorm learn`: its texts, its refusals, its pages, its server, and what it measures."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("markdown_it")

from typer.testing import CliRunner

from rmsnorm import _smollm, cli
from rmsnorm._extras import extra_line
from rmsnorm.models import loading
from rmsnorm.tutorial import build, command, measured, serve, texts, ulp

LANGUAGES = tuple(texts.LANGUAGES)


def learn(*arguments: str):
    return CliRunner().invoke(cli.build(), ["learn", *arguments])


def test_both_languages_have_the_same_keys():
    english, chinese = map(texts.load, LANGUAGES)
    assert list(english) == list(chinese)
    assert len(english) > 300


def test_chinese_is_chinese():
    """But for names, symbols and the sentence that SmolLM2 reads first."""
    chinese = texts.load("zh")
    names = (
        r"(Batch|Weight|Layer|p?RMS)Norm|\{\w+\}|nats|post|pre|peri|rms|mean|NaN|token|\W"
        r"|\d|δ|ε|b?float\d\d|term|ulp|dx|x|y|²|⁴"
    )
    foreign = [key for key, text in chinese.items() if not re.search("[\u4e00-\u9fff]", text)]
    assert [key for key in foreign if re.sub(names, "", chinese[key]) and key != "depth.sentence.start"] == []


@pytest.mark.parametrize("panel", build.PANELS)
def test_both_languages_quote_the_same_numbers(panel):
    english, chinese = map(texts.load, LANGUAGES)
    for key in english:
        if key.startswith(f"{panel}."):
            quoted = [sorted(re.findall(r"(?<!\{)\{([\w.]+)\}", text[key])) for text in (english, chinese)]
            assert quoted[0] == quoted[1], key


def test_the_outline_is_the_tutorials():
    """The original's headings, in its order: principle, formula, geometry, implementation, why LLaMA uses it."""
    assert list(build.CHAPTERS) == ["principle", "formula", "geometry", "implementation", "llama"]
    titles = [texts.load("zh")[f"chapters.{name}"] for name in build.CHAPTERS]
    for heading, title in zip(("原理", "公式", "几何", "实现", "LLaMA 为什么用它"), titles, strict=True):
        assert heading in title


@pytest.mark.parametrize("text", ["title: words", "# a\nb:\n", "# a\nb: words\nb: words", "# a\nwords"])
def test_a_text_without_panel_words_or_name_of_its_own_is_refused(text):
    with pytest.raises(ValueError, match=r"needs a panel|no words"):
        texts.parse(text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_GB.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "zh"),
    ],
)
def test_the_locale_chooses_the_language(monkeypatch, variables, expected):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert texts.of_locale() == expected


def one_line(result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_unknown_language_is_refused():
    one_line(learn("--lang", "fr"), "'fr'", "en, zh")


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind((serve.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(learn("--no-browser", "--port", str(port)), f"port {port}", "in use", "--port")


@pytest.mark.parametrize("package", command.NEEDED)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    one_line(learn("--no-browser"), package, extra_line("tutorial"))


def test_export_into_a_place_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    one_line(learn("--export", str(file)), str(file), "choose another directory")
    one_line(learn("--export", str(file / "below")), "choose another directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


@pytest.fixture
def quick(monkeypatch):
    """No model, a short race on a machine that is quiet."""

    def none():
        raise loading.Unusable("no model here")

    monkeypatch.setattr(measured, "SECONDS", 0.01)
    monkeypatch.setattr(measured, "BUSY", 1e9)
    monkeypatch.setattr(measured, "model", none)
    monkeypatch.setattr(measured, "COLS", 64)


class Fetched(HTMLParser):
    """Collects what a browser would fetch for a page, and its ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action") or (tag == "link" and name == "href"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)


def test_export_writes_two_pages_that_need_nothing_else(tmp_path, quick):
    directory = tmp_path / "new" / "pages"
    result = learn("--export", str(directory), "--home", "https://example.org/rmsnorm/")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in directory.iterdir()) == ["en.html", "zh.html"]
    ids = []
    for language in LANGUAGES:
        page = (directory / f"{language}.html").read_text(encoding="utf-8")
        found = Fetched(page)
        assert all(address.startswith("data:") for address in found.addresses)
        assert "@import" not in page
        assert "url(" not in page
        assert "no model here" in page
        assert len(gzip.compress(page.encode())) < 150_000  # a tenth of what was asked
        assert page.count('name="guess-') == sum(
            len(build.options(panel, texts.load(language))) for panel in build.PANELS
        )
        assert "https://example.org/rmsnorm/blob/main/docs/explained" in page
        assert len(found.ids) == len(set(found.ids))
        ids.append(found.ids)
        kept = json.loads(re.search(r'id="data-measured">(.*?)</script>', page)[1])
        assert set(kept["cost"]["seconds"]) == set(measured.NAMES)
        assert torch.__version__ in kept["machine"]
    assert ids[0] == ids[1]
    assert "blob/main" not in "".join(build.pages({}).values())


def test_an_export_that_fails_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(build, "page", lambda *rest: 1 / 0)
    assert isinstance(learn("--export", str(tmp_path)).exception, ZeroDivisionError)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


def test_an_export_without_room_is_one_line_and_leaves_the_old_pages(tmp_path, quick, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "en.html").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    one_line(learn("--export", str(tmp_path)), "no space left", "en.html", "choose another directory")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("en.html", "old")]


def test_a_module_that_the_page_cannot_hold_is_refused(monkeypatch):
    build.bundle.cache_clear()
    monkeypatch.setattr(build, "read", lambda name: 'import { a }\n  from "./numbers.js";\n')
    with pytest.raises(ValueError, match=r"page\.js: an import must be one line"):
        build.bundle("page")
    build.bundle.cache_clear()


def test_the_command_needs_neither_torch_nor_a_wait():
    """The page is served before torch is imported, and `rmsnorm learn` says what any other command says."""
    program = (
        "import sys; from rmsnorm_command import main; sys.argv = ['rmsnorm', 'learn', '--lang', 'fr']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *map(sys.modules.__contains__, ['torch', 'rmsnorm']))\n"
        "from rmsnorm_tutorial import serve\nserve.bind(0).server_close()\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["2", "False", "False", "False"], done.stderr
    assert "unknown language 'fr'" in done.stderr


def test_help_needs_no_page():
    """`rmsnorm` lists its commands without what the page is made with."""
    check = "sys.exit(' '.join({'markdown_it', 'rmsnorm.tutorial.build', 'matplotlib'} & set(sys.modules)) or 0)"
    program = f"import sys; from rmsnorm import cli; cli.build(); {check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def server(quick):
    found = serve.bind(0)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://{serve.HOST}:{found.server_port}/"
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


def test_a_busy_machine_has_no_timing(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert "busy" in measured.cost(1, "float32")["why"]


class LlamaRMSNorm(torch.nn.Module):
    """A norm of the name that transformers' has."""

    def forward(self, x):
        return 3 * x + 1


def test_depth_measures_what_each_norm_is_given(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), LlamaRMSNorm(), LlamaRMSNorm())
    words = torch.tensor([[1, 5, 2]])
    monkeypatch.setattr(measured, "model", lambda: (lambda text, return_tensors: {"input_ids": words}, model))
    found = measured.depth("three tokens")
    for part, rows in (("all", [1, 5, 2]), ("rest", [5, 2])):
        first = model[0].weight.detach().double().numpy()[rows]
        seen = found[part]
        assert seen["tokens"] == len(rows)
        assert len(_smollm.norms_of(model)) == len(seen["rms"]) == 2
        for place, x in enumerate((first, 3 * first + 1)):
            rms = np.sqrt((x**2).mean(-1))
            assert seen["rms"][place] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
            assert seen["largest"][place] == pytest.approx(abs(x).max(), rel=1e-6)
            assert seen["share"][place] == pytest.approx((abs(x.mean(-1)) / rms).mean(), rel=1e-5)


def test_kernels_err_by_less_than_was_promised():
    found = measured.ulps()
    assert found["bfloat16"] <= 0.51  # docs/numerics.md
    assert found["float16"] <= 0.51
    assert found["float32"] <= 2


@pytest.mark.parametrize(("dtype", "numpy"), [(torch.float32, np.float32), (torch.float16, np.float16)])
def test_gaps_are_numpys_spacing(dtype, numpy):
    values = np.array([1, 1.5, 2, 3.99, 1000, 6e-5, 1e-7, 0], dtype=numpy)
    exact = torch.from_numpy(values.astype(np.float64))
    assert ulp.gaps(exact, dtype).tolist() == np.spacing(values).astype(np.float64).tolist()


def test_gaps_of_bfloat16_are_float32s_without_16_bits():
    exact = torch.tensor([1.0, 3.0, 1e-30, 500.0], dtype=torch.float64)
    assert torch.equal(ulp.gaps(exact, torch.bfloat16), 2.0**16 * ulp.gaps(exact, torch.float32))


def test_errors_count_what_is_not_finite_as_infinite():
    exact = torch.tensor([1.0, 70000.0, np.inf, 1.0], dtype=torch.float64)
    rounded = torch.tensor([1.0 + 2**-10, np.inf, np.inf, np.nan], dtype=torch.float16)
    found = ulp.errors(rounded, exact).tolist()
    assert found[:2] == [1.0, np.inf]
    assert found[3] == np.inf


# Machado, Oliveira & Fernandes 2009: what a full protanope, deuteranope and tritanope see, in linear RGB.
BLIND = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour: str, eye: list[list[float]]) -> np.ndarray:
    """CIE L*a*b* of a colour as an eye sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(eye) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1, 1.089]), 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", BLIND)
@pytest.mark.parametrize("look", [0, 1], ids=["light", "dark"])
def test_the_norms_can_be_told_apart_by_the_colour_blind(eye, look):
    """A difference of 10 is seen at a glance; 2.3 is just noticeable."""
    named = dict.fromkeys(("rms", "layer", "batch"), "")
    found = {name: re.findall(rf"--{name}: (#\w{{6}})", build.read("style.css")) for name in named}
    colours = [lab(found[name][look], BLIND[eye]) for name in named]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[i + 1 :]]
    assert min(apart) > 10
