"""Proves that the API reference, which is made of the docstrings, is whole: each public name says what it takes, and
shows an example that runs."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from dataclasses import is_dataclass

import pytest
import torch

import rmsnorm
from rmsnorm import _info, functional, hub, surgery
from rmsnorm.models import report

PUBLIC = {f"rmsnorm.{name}": getattr(rmsnorm, name) for name in rmsnorm.__all__}
PUBLIC |= {f"rmsnorm.hub.{name}": getattr(hub, name) for name in ("register", "unregister", "mapping")}  # docs/hub.md
PUBLIC["rmsnorm.surgery.load"] = surgery.load
RETURNED = {"Info": _info.Info, "Entry": report.Entry}  # by info() and PatchReport
each = pytest.mark.parametrize("name", PUBLIC)


def sections(text: str) -> dict[str, str]:
    """The parts of a docstring, by Google's headings; ``""`` is what stands before them."""
    parts = re.split(
        r"^(Args|Shape|Returns|Yields|Raises|Examples|Source): *", inspect.cleandoc(text), flags=re.MULTILINE
    )
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@each
def test_arguments_are_documented(name):
    """Each by its name at the start of an entry; entries that share a text share a line."""
    documented = sections(PUBLIC[name].__doc__)
    assert documented[""].strip(), "a sentence on top"
    parameters = {} if is_dataclass(PUBLIC[name]) else inspect.signature(PUBLIC[name]).parameters
    if "more" in parameters:  # typed keywords of another function's
        parameters = inspect.signature(functional.further[name.rpartition(".")[2]]).parameters
    entries = re.findall(r"^ {4}(\w[\w, ]*):", documented.get("Args", ""), re.MULTILINE)
    assert sorted(word for entry in entries for word in entry.split(", ")) == sorted(parameters)


@each
def test_results_and_errors_are_documented(name):
    thing = PUBLIC[name]
    documented = sections(thing.__doc__)
    if inspect.isclass(thing):
        return
    source = inspect.getsource(thing)
    returns = inspect.signature(thing).return_annotation
    assert ("Returns" in documented or "Yields" in documented) == (returns not in ("None", "Iterator[None]"))
    assert "Raises" in documented or not re.search(r"\b(raise|_check\w*)\b", source)


@each
def test_example_runs(name, capsys):
    """As on the page, after ``import torch`` and ``from rmsnorm import *``."""
    if name.startswith("rmsnorm.hub"):
        pytest.importorskip("kernels")
    if name == "rmsnorm.surgery.load":
        pytest.importorskip("transformers")
        pytest.importorskip("typer")
    if "install" in name and rmsnorm.info().why_not_native:
        pytest.skip("no native library")
    names = {"torch": torch, "rmsnorm": rmsnorm, **{public: getattr(rmsnorm, public) for public in rmsnorm.__all__}}
    test = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, names, name, None, None)
    assert test.examples
    assert "Examples" in sections(PUBLIC[name].__doc__), "under that heading the reference shows it as code"
    try:
        result = doctest.DocTestRunner().run(test)
    finally:
        rmsnorm.uninstall()
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_methods_are_documented(name):
    own = {n: f for n, f in vars(PUBLIC[name]).items() if not n.startswith("_") and inspect.isfunction(f)}
    assert [n for n, method in own.items() if not method.__doc__] == []


@pytest.mark.parametrize("cls", [PUBLIC["rmsnorm.PatchReport"], *RETURNED.values()], ids=lambda cls: cls.__name__)
def test_fields_are_documented(cls):
    """By the string behind each, which the reference reads."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for field, behind in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(behind, ast.Expr), f"{cls.__name__}.{field.target.id} has no word behind it"
            assert isinstance(behind.value.value, str)
