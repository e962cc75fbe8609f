"""The only file that carries ``rmsnorm convert`` out: a model is loaded, changed, proven, and written.

The proof needs no copy, and none of the model in float64: ``pending.py`` widens what is read while it is read. So
memory holds the model, a head that was tied and isn't any more, and what a forward of some hundred tokens makes.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._info import version
from ..models import loading
from . import allocator, proof, saved
from .operations import SurgeryError, operate
from .pending import Pending
from .report import BAR, Difference, SurgeryReport
from .samples import trial_of

OPERATIONS = ("to_rms", "fold", "rotate")
"""In the order in which they are done."""


class Unconvertible(Exception):
    """Why nothing was written, in one line."""


@dataclass(frozen=True)
class Options:
    """What was asked for; ``command.py`` says what each means."""

    model: str
    out: Path
    operations: tuple[str, ...]
    dtype: torch.dtype | None = None
    untie: bool = True
    kind: str = "hadamard"
    seed: int = 0
    force: bool = False
    tokens: int = 64


@dataclass
class Conversion:
    """One model, from its file to another."""

    options: Options
    show: Callable[[Any], None] = print
    doing: Callable[[str], None] = lambda what: None
    found: dict[str, Any] = field(default_factory=dict)
    """Plain data, for JSON."""

    def run(self) -> None:
        """Does everything.

        Raises:
            Unusable: there is no such model.
            Unconvertible: nothing was written, for another reason.
        """
        asked = self.options
        source = self._checked()
        allocator.give_back()
        tokenizer, model = loading.load(asked.model, asked.dtype, lambda step: self.doing(loading.STEPS[step]))
        known = {name for name, _ in model.named_parameters()}
        try:
            reports = self._changed(tokenizer, model)
        except (Unconvertible, SurgeryError, ValueError, OverflowError) as error:
            raise Unconvertible(" ".join(str(error).split())) from error
        except Exception as error:  # of a stranger's forward
            reason = " ".join(str(error).split())[:200]
            raise Unconvertible(f"{asked.model} can't be run: {type(error).__name__}: {reason}") from error
        lacking = saved.lacking(model, known)
        self.found["lacking"] = lacking
        self.show(_loads(lacking, str(asked.out)))
        self._written(model, source, tokenizer, reports)

    def _checked(self) -> Path | None:
        """What can be known before anything is loaded; the directory of the model if it is one."""
        asked = self.options
        out = asked.out
        if not out.parent.is_dir():
            raise Unconvertible(f"{out.parent} is not a directory; make it first")
        if not os.access(out.parent, os.W_OK):
            raise Unconvertible(f"{out.parent} can't be written to; choose another directory")
        if os.path.lexists(out):
            ours = out.is_dir() and not out.is_symlink() and (out / saved.MANIFEST).is_file()
            if not asked.force or not ours:
                what = "give another --out" if asked.force or not ours else "give another --out, or --force"
                raise Unconvertible(f"{out} exists{'' if ours else ', and is none that this command wrote'}; {what}")
        try:
            directory, file = loading.find(asked.model)
        except OSError as error:
            raise Unconvertible(f"{asked.model} can't be read: {(error.strerror or str(error)).lower()}") from error
        if out.exists() and directory.samefile(out):
            raise Unconvertible(f"{out} is the model itself; give another --out")
        return None if file else directory

    def _changed(self, tokenizer: Any, model: Any) -> list[SurgeryReport]:
        """All operations, each proven; then what rounding cost."""
        asked = self.options
        own = next(one.dtype for one in model.parameters() if one.is_floating_point())
        name = str(own).removeprefix("torch.")
        self.found |= {"model": asked.model, "class": type(model).__name__, "dtype": name, "proven_in": "float64"}
        self.show(f"{asked.model}: {type(model).__name__}, {name}")
        trial = trial_of(model, None, tokenizer, asked.tokens, "convert")
        self.doing(f"asking the model, in {name}")
        gc.collect()  # what loading left behind holds every weight once more
        unchanged = proof.said(model, trial, own, write=True)
        self.doing("asking the model, in float64")
        pending, wide = Pending(model), torch.float64
        exact = before = proof.said(model, trial, wide, wide=pending)
        reports, inputs = [], [proof.cast(given, wide) for given in trial.inputs]
        for operation in asked.operations:
            report = self._operated(operation, model, pending, inputs, tokenizer)
            if report.done:
                self.doing(f"{operation}: asking the changed model, in float64")
                after = proof.said(model, trial, wide, wide=pending)
                proven = proof.compared(wide, before, after)
                report.differences["float64"] = proven
                if not proven.worst <= BAR:
                    raise SurgeryError(
                        f"{operation}: in float64 the outputs differ by {proven.worst:.1e} of the largest, more than "
                        f"{BAR:.0e}; nothing was written",
                        report,
                    )
                before = after
            reports.append(report)
        self._refuse_nothing(reports)
        self.doing(f"changing the weights, rounding them to {name}")
        pending.write()
        if broken := [n for n, one in model.named_parameters() if not bool(one.isfinite().all())]:
            raise OverflowError(f"{broken[0]} would outgrow {name}; give --dtype bfloat16 or float32")
        self.doing(f"asking the changed model, in {name}")
        rounded = proof.compared(own, unchanged, proof.said(model, trial, own, write=True), exact)
        self.found["operations"] = [report.to_dict() for report in reports]
        self.found["rounded"] = asdict(rounded)
        for report in reports:
            self.show("")
            self.show(report)
        self.show("\n" + _rounding(rounded))
        return reports

    def _operated(
        self, operation: str, model: nn.Module, pending: Pending, inputs: Any, tokenizer: Any
    ) -> SurgeryReport:
        asked = self.options
        options: dict[str, Any] = (
            {"kind": asked.kind, "seed": asked.seed} if operation == "rotate" else {"untie": asked.untie}
        )
        return operate(
            operation,
            model,
            keep=False,
            inputs=inputs,
            verify=False,
            tokenizer=tokenizer,
            tokens=asked.tokens,
            progress=lambda step: self.doing(f"{operation}: {step}"),
            pending=pending,
            **options,
        )

    def _refuse_nothing(self, reports: list[SurgeryReport]) -> None:
        """A rotation that was asked for and isn't there would be missed much later."""
        last = reports[-1]
        if not any(report.done for report in reports) or (last.operation == "rotate" and not last.done):
            raise Unconvertible(f"{self.options.model}: {last.summary()}")

    def _written(self, model: Any, source: Path | None, tokenizer: Any, reports: list[SurgeryReport]) -> None:
        """Beside the destination first, then renamed."""
        out = self.options.out
        folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        size = sum(one.nbytes for one in model.parameters())
        self.doing(f"writing {_human(size)}")
        try:
            if (free := shutil.disk_usage(out.parent).free) < size:
                raise OSError(errno.ENOSPC, f"it needs {_human(size)}, and {_human(free)} are free")
            folder.mkdir()
            saved.write(model, folder, {"rmsnorm": version(), **self.found}, source, tokenizer, self._readme(reports))
            saved.put(folder, out)
        except Exception as error:  # safetensors has an error of its own for a full disk
            reason = getattr(error, "strerror", None) or str(error)
            raise Unconvertible(f"{out} can't be written: {' '.join(reason.split())}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.found |= {"out": str(out), "bytes": sum(entry.stat().st_size for entry in out.iterdir())}
        self.show(f"{out}: {_human(self.found['bytes'])} in {len(list(out.iterdir()))} files")

    def _readme(self, reports: list[SurgeryReport]) -> str:
        """What a reader of the directory has to know."""
        words = " ".join(f"--{report.operation.replace('_', '-')}" for report in reports)
        proofs = "\n".join(f"    {line}" for report in reports for line in str(report).splitlines())
        return (
            f"## Changed by rmsnorm {version()}\n\n`rmsnorm convert {self.options.model} {words}` changed the norms "
            f"of this model, and not what it computes.\n{_loads(self.found['lacking'], 'this directory')}\n\n{proofs}\n"
        )


def _loads(lacking: dict[str, Any], where: str) -> str:
    if not lacking:
        return f"Stock transformers loads {where}: from_pretrained."
    what = {"norms": "RMSNorms in place of LayerNorms", "biases": "new biases", "centred": "centred arguments"}
    has = ", ".join(f"{words} ({len(lacking[key])})" for key, words in what.items() if lacking[key])
    return (
        f"Stock transformers can't load {where}: it has {has}, which {lacking['class']} doesn't know. Load it with "
        "rmsnorm.surgery.load(directory), from this package."
    )


def _rounding(one: Difference) -> str:
    """What the rounded model says, beside what its type costs the model that nobody changed."""
    text = f"Rounded to {one.dtype}, all of it: outputs differ by {one.worst:.1e} of the largest"
    if one.own:
        text += f"; {one.dtype} itself costs the unchanged model {max(one.own.values()):.1e} against float64"
    if one.loss is not None:
        text += f"; loss {one.loss:+.1e}"
    return text + (f"; {one.same_tokens} of {one.tokens} greedy tokens are the same." if one.tokens else ".")


def _human(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
