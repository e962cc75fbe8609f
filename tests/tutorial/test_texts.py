"""The lesson's texts: both languages whole, alike, and read as they are meant; formulas."""

from __future__ import annotations

import configparser
import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("markdown_it")

from rmsnorm.tutorial import build, formulas, texts

LANGUAGES = tuple(texts.LANGUAGES)


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


def test_chinese_has_no_line_break_that_a_browser_shows_as_a_space():
    broken = "[\u3000-\u9fff\uff00-\uffef]\n[\u3000-\u9fff\uff00-\uffef]"
    assert [key for key, text in texts.load("zh").items() if re.search(broken, text)] == []


def test_both_languages_have_the_same_formulas():
    english, chinese = map(texts.load, LANGUAGES)
    for key in english:
        found = [sorted(re.findall(r"(\$\$?)([^$]+)\1", text[key])) for text in (english, chinese)]
        assert found[0] == found[1], key


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a / √(b + 2)", "mfrac(mi(a) msqrt(mrow(mi(b) mo(+) mn(2))))"),
        ("(9 + 16) / 2", "mfrac(mrow(mn(9) mo(+) mn(16)) mn(2))"),
        ("rms² = 1", "msup(mi(rms) mn(2)) mo(=) mn(1)"),
        ("f(x)", "mi(f) mo(\u2061) mrow(mo(() mi(x) mo()))"),
        ("r (x)", "mi(r) mo(\u2062) mrow(mo(() mi(x) mo()))"),
        ("2√m", "mn(2) mo(\u2062) msqrt(mi(m))"),
        ("sin θ · x̂", "mi(sin) mo(\u2061) mi(θ) mo(·) mover(mi(x) mo(^))"),
    ],
)
def test_a_formula_becomes_mathml(formula, expected):
    def plain(element: ElementTree.Element) -> str:
        return f"{element.tag}({element.text or ''}{' '.join(map(plain, element))})"

    assert " ".join(map(plain, ElementTree.fromstring(formulas.mathml(formula, block=True)))) == expected


def test_a_fraction_inside_a_line_is_no_higher_than_it():
    """Its brackets stay."""
    found = ElementTree.fromstring(formulas.mathml("1 / (2√m)"))
    assert "".join(found.itertext()) == "1/(2\u2062m)"
    assert found.find(".//mfrac") is None


@pytest.mark.parametrize(("formula", "why"), [("(a", "too early"), ("√", "too early"), ("a ; b", "';' is no sign")])
def test_a_formula_that_is_none_is_refused(formula, why):
    with pytest.raises(ValueError, match=why):
        formulas.mathml(formula)


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


@pytest.mark.parametrize("text", ["title: words", "[a]\nb:\n", "[a]\nb: words\nb: words", "[a]\nwords"])
def test_a_text_without_panel_words_or_name_of_its_own_is_refused(text):
    with pytest.raises((configparser.Error, ValueError), match=r"no section|no words|already exists|parsing errors"):
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
