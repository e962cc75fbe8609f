"""The only file that carries ``rmsnorm patch`` out, one thing after the other: each is shown as soon as it is known,
and nothing that fails takes back what was shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from .._info import info
from ..bench import console as machines
from ..study.corpus import documentation
from . import comparison, loading, screen, workload
from .classes import switch
from .inputs import Uncallable, inputs_of, positions, text_config, tokens_of, vocabulary
from .patching import patch, unpatch

T = TypeVar("T")
READ = 128
"""Tokens of real text that are read at once when times are taken, and that a training step takes."""
TEXT = "Python's documentation"


@dataclass(frozen=True)
class Options:
    """What was asked for; ``command.py`` says what each means."""

    model: str
    prompt: str
    tokens: int
    text: int
    dtype: torch.dtype
    seconds: float
    patch: dict[str, bool]


@dataclass
class Course:
    """One model, from its file to its times."""

    options: Options
    found: dict[str, Any] = field(default_factory=dict)
    """Plain data, for JSON: as far as one got."""
    out: Console = field(default_factory=Console)
    doing: screen.Doing = field(default_factory=screen.Doing)
    _found: dict[str, Tensor] | Uncallable | None = None

    def run(self) -> int:
        """Does everything; returns the status of the process.

        Raises:
            Unusable: there is no such model.
            KeyboardInterrupt: what was found until then is in ``found``.
        """
        asked = self.options
        machine = machines.machine()  # asked before there is load of our own
        self.found |= {"model": asked.model, "dtype": str(asked.dtype).removeprefix("torch."), "prompt": asked.prompt}
        self.found["rmsnorm"] = vars(info())
        try:
            tokenizer, model = loading.load(asked.model, asked.dtype, lambda step: self.doing(loading.STEPS[step]))
            if not self._patched(tokenizer, model):
                return 0
            inputs = self._compared(tokenizer, model)
            if inputs is None:
                return 1
            if asked.seconds:
                self._show("", machines.header(machine), markup=True)
                self._timed(model, inputs)
        finally:
            self.doing.done()
        return 0

    def _patched(self, tokenizer: Any, model: Any) -> bool:
        """Patches and reports; False if there is nothing to compare."""
        asked = self.options
        self.doing("patching: each kind of norm is examined and proven")
        called: Any = asked.patch["fuse"] or asked.patch["fuse_add"]
        if called:
            try:  # to fuse, with what the model can be called with
                called = self._inputs(tokenizer, model)
            except Uncallable:
                called = True  # its dummy inputs: the report will say what came of it
        memory = "lean" if asked.patch["lean"] else None
        fused = {"fuse" if asked.patch["fuse"] else "fuse_add": called}
        report = patch(model, **fused, layer_norm=asked.patch["layer_norm"], memory=memory)
        self.found |= {"class": type(model).__name__, "report": report.to_dict()}
        self._show(f"{asked.model}: {type(model).__name__}, {self.found['dtype']}", report)
        if not (report.patched or report.fused):
            count = 0 if asked.patch["layer_norm"] else layer_norms(model)
            self._show(screen.nothing(report, count))
        return bool(report.patched or report.fused)

    def _inputs(self, tokenizer: Any, model: Any) -> dict[str, Tensor]:
        """What the model can be called with, with room for one token more. Found once: the model runs for each guess.

        Raises:
            Uncallable: nothing was found, now or before.
        """
        if self._found is None:
            try:
                self._found = inputs_of(model, some_tokens(tokenizer, model, min(READ, positions(model) - 1)))
            except Uncallable as reason:
                self._found = reason
        if isinstance(self._found, Uncallable):
            raise self._found
        return self._found

    def _compared(self, tokenizer: Any, model: Any) -> dict[str, Tensor] | None:
        """Compares what the model says; returns what it can be called with, or None if that failed."""
        asked = self.options

        def compared() -> tuple[dict[str, Tensor], comparison.Comparison]:
            inputs = self._inputs(tokenizer, model)
            prompt = prompt_of(tokenizer, model, asked.prompt)
            said = {"input_ids": prompt[None]} if comparison.writes(model) else inputs
            text = some_tokens(tokenizer, model, asked.text)
            return inputs, comparison.compare(model, switch(model), said, prompt, text, asked.tokens)

        with self._trying("outputs", "running it with its own norms, then with ours") as trying:
            inputs, result = trying(compared)
            self.found |= result.numbers()
            self._show("", *screen.said(result, tokenizer, TEXT))
            return inputs
        return None

    def _timed(self, model: Any, inputs: dict[str, Tensor]) -> None:
        """Times what it does, and measures the memory of a training step."""
        turn, writes, seconds = switch(model), comparison.writes(model), self.options.seconds
        speeds: dict[str, workload.Speed] = {}
        for name, work in workload.kinds(model, inputs, writes=writes).items():
            with self._trying(name, f"timing: {name}, {seconds:g} s") as trying:
                speeds[name] = trying(lambda work=work: workload.time(work, turn, seconds))  # type: ignore[misc]
        self.found["times"] = {name: speed.to_dict() for name, speed in speeds.items()}
        if speeds:
            self._show(screen.times(speeds))
        with self._trying("memory", "measuring the memory of a training step") as trying:
            memory = trying(lambda: workload.memories(model, inputs, turn, writes=writes))
            self.found["bytes"] = {when: asdict(one) for when, one in memory.items()}
            self._show(*screen.memory(memory))

    def _show(self, *lines: Any, markup: bool = False) -> None:
        self.doing.done()
        for line in lines:
            self.out.print(line, markup=markup, highlight=False)

    @contextmanager
    def _trying(self, name: str, what: str) -> Iterator[Callable[[Callable[[], T]], T]]:
        """Says what is being done. What a stranger's code raises in it is one line, and not the end."""
        self.doing(what)

        def trying(call: Callable[[], T]) -> T:
            try:
                return call()
            except Exception as error:
                raise _Failed(error) from error

        try:
            yield trying
        except _Failed as failed:
            error = failed.args[0]
            reason = str(error) if isinstance(error, Uncallable) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())
            self.found.setdefault("not_measured", {})[name] = reason
            self.doing.done()
            print(f"rmsnorm patch: {name} not measured: {reason}", file=sys.stderr)


class _Failed(Exception):
    """Carries what a stranger's code raised, so that a fault of ours isn't taken for it."""


def layer_norms(model: Any) -> int:
    """How many norms of an unpatched model ``layer_norm=True`` would take."""
    try:
        return len(patch(model, layer_norm=True).patched)
    finally:
        unpatch(model)


def some_tokens(tokenizer: Any, model: Any, count: int) -> Tensor:
    """So many tokens of real text, ``[count]``."""
    known = vocabulary(model)
    return tokens_of(tokenizer, documentation().decode()[: 12 * count], known)[:count]


def prompt_of(tokenizer: Any, model: Any, prompt: str) -> Tensor:
    """The prompt's tokens, at least one, and room for one more: an empty prompt is the token that texts begin with."""
    ids = tokens_of(tokenizer, prompt, vocabulary(model))
    if not ids.numel():
        sources = (tokenizer, text_config(model)) if tokenizer else (text_config(model),)
        starts = (getattr(one, name, None) for one in sources for name in ("bos_token_id", "eos_token_id"))
        newline = ord("\n") % vocabulary(model)  # not 0, which may be padding, and say nothing
        ids = torch.tensor([next((token for token in starts if isinstance(token, int)), newline)])
    return ids[-max(1, positions(model) - 1) :]
