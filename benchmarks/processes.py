"""The only file that runs a benchmark's cases in processes of their own: its own command again, for each run and number
of threads, whose lines it reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rmsnorm.bench import console, worker


def say(*values: Any) -> None:
    """What a process found, as one line."""
    print(json.dumps(values), flush=True)


def what_they_say(script: str, runs: int, threads: list[int]) -> Iterator[tuple[int, list[Any]]]:
    """The lines of all processes, each with its number of threads, which are shown as they come.

    The script is called with the arguments of this process and ``--one``, and settles the allocator as `rmsnorm bench`
    has it.
    """
    for _ in range(runs):
        for count in threads:
            command = [sys.executable, script, *sys.argv[1:], "--one"]
            environment = {**os.environ, **worker.environment(count)}
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout
                for line in process.stdout:
                    print(count, line, end="", file=sys.stderr, flush=True)
                    yield count, json.loads(line)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


def where() -> str:
    """The machine, before anything is timed on it."""
    here = console.machine()
    return (
        f"{here['cpu']}, {here['cores']} cores, CPU target {here['cpu_target']}, torch {here['torch']}, "
        f"{here['date'][:10]}, load average {here['load']:.0f} before"
    )


def tensors_of(result: Any) -> list[Tensor]:
    """Those of a call's result, however it packs them."""
    return [result] if isinstance(result, Tensor) else [t for one in result for t in tensors_of(one)]
