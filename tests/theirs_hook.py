"""What theirs.py puts into the processes of transformers' tests: it patches their models, and records outcomes.

A plugin (``pytest -p theirs_hook``) records. ``hook()`` patches: one line at the head of the unpacked tests/__init__.py
calls it, so that the processes which their tests start have it as well. Nothing is patched in a process that has not
been told to by the environment.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

HOW = "RMSNORM_THEIRS"  # "plain", "patched" or "fused"
RECORD = "RMSNORM_THEIRS_RECORD"  # the file without its suffix: .json for outcomes, .models for what was patched


def hook() -> None:
    """Patches every ``PreTrainedModel`` at the end of its outermost ``__init__``, and what ``from_pretrained`` made.

    ``post_init`` would not do: classes may add modules after it. A model that is being loaded is on the device meta
    when ``__init__`` ends, with no values to ask its norms about; hence ``from_pretrained`` as well.
    """
    if os.environ.get(HOW, "plain") == "plain":
        return
    from transformers import modeling_utils

    base = modeling_utils.PreTrainedModel
    if "theirs" in vars(base):
        return
    base.theirs = True
    building: set[int] = set()
    before = base.__init_subclass__.__func__

    def init_subclass(cls: type, **kwargs: Any) -> None:
        before(cls, **kwargs)
        init = vars(cls).get("__init__")
        if init is None:
            return

        @functools.wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            outermost = id(self) not in building
            building.add(id(self))
            try:
                init(self, *args, **kwargs)
            finally:
                if outermost:
                    building.discard(id(self))
            if outermost:
                _patch(self)

        cls.__init__ = wrapped  # type: ignore[misc]

    base.__init_subclass__ = classmethod(init_subclass)
    load = base.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        _patch(loaded[0] if isinstance(loaded, tuple) else loaded)  # output_loading_info=True
        return loaded

    base.from_pretrained = classmethod(from_pretrained)


def _patch(model: Any) -> None:
    import rmsnorm

    report = rmsnorm.patch(model, fuse=os.environ[HOW] == "fused")
    with open(os.environ[RECORD] + ".models", "a") as record:
        left = [f"{entry.cls}: {entry.reason}" for entry in report.skipped]
        entry = {"cls": type(model).__name__, "patched": len(report.patched), "fused": len(report.fused), "left": left}
        record.write(json.dumps(entry) + "\n")


_outcomes: dict[str, str] = {}
_why: dict[str, str] = {}
_WORSE = {"skipped": 0, "passed": 1, "failed": 2}


def pytest_runtest_logreport(report: Any) -> None:
    """The worst of a test's phases and subtests."""
    if report.when != "call" and report.outcome == "passed":
        return
    before = _outcomes.get(report.nodeid, report.outcome)
    _outcomes[report.nodeid] = max(before, report.outcome, key=_WORSE.__getitem__)
    if report.outcome != "passed":
        _why.setdefault(report.nodeid, str(report.longrepr)[-3000:])


def pytest_sessionfinish(session: Any) -> None:
    """Writes them, once: not in the workers of xdist."""
    if not hasattr(session.config, "workerinput") and RECORD in os.environ:
        Path(os.environ[RECORD] + ".json").write_text(json.dumps({"outcomes": _outcomes, "why": _why}, indent=1))
