"""The only file that knows the folder of a study: its setting, an outcome per finished run, checkpoints, results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bench.export import replace
from .checkpoint import Refused
from .plan import Run, Setting
from .training import Outcome

SETTING, RUNS, CHECKPOINTS, TIMING = "setting.json", "runs", "checkpoints", "timing.json"


class Folder:
    """A folder that holds, or will hold, the runs of one setting."""

    def __init__(self, path: Path, setting: Setting, *, resume: bool) -> None:
        """Opens or makes it; changes nothing in a folder that it refuses.

        Raises:
            Refused: it holds something else, or something, and nobody said to go on with it.
        """
        self.path, self.setting = path, setting
        file = path / SETTING
        if path.exists() and not path.is_dir():
            raise Refused(f"{path} is not a directory; give another --out")
        if path.is_dir() and any(path.iterdir()):
            if not file.exists():
                raise Refused(f"{path} is not empty and holds no study; give another --out")
            if difference := setting.differs(self._read(file, "give another --out")):
                raise Refused(f"{path} holds a study of another configuration: {difference}; give another --out")
            if not resume:
                raise Refused(f"{path} holds a study already; go on with it by --resume, or give another --out")
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():  # first: a folder without it is refused, and this one may run out of room
            replace(file, json.dumps(setting.to_json(), indent=1))
        for part in (RUNS, CHECKPOINTS):
            (path / part).mkdir(exist_ok=True)

    @staticmethod
    def _read(file: Path, remedy: str) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Refused(f"{file} is damaged; {remedy}")
        return found

    def outcomes(self) -> Iterator[Outcome]:
        """Those of the runs that are over.

        Raises:
            Refused: a file is damaged.
        """
        remedy = "remove it, and the run is made again"
        for file in sorted((self.path / RUNS).glob("*.json")):
            try:
                yield Outcome(**self._read(file, remedy))
            except TypeError:
                raise Refused(f"{file} is damaged; {remedy}") from None

    def checkpoint(self, run: Run) -> Path:
        """Where an unfinished run is kept."""
        return self.path / CHECKPOINTS / f"{run.name}.safetensors"

    def keep(self, outcome: Outcome) -> None:
        """Writes the outcome, then drops the checkpoint."""
        run = outcome.trained.run
        replace(self.path / RUNS / f"{run.name}.json", json.dumps(outcome.to_json()))
        self.checkpoint(run).unlink(missing_ok=True)

    def timing(self) -> dict[str, Any] | None:
        """The step times, if they have been measured."""
        file = self.path / TIMING
        return self._read(file, "remove it, and the steps are timed again") if file.exists() else None

    def keep_timing(self, timing: dict[str, Any]) -> None:
        replace(self.path / TIMING, json.dumps(timing, indent=1))
