"""The only file that runs programs of several ranks, each a process that ends by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ABORTED = "terminate called without an active exception"
"""What C++ says when Python ends under a thread of gloo that still holds a tensor of a finished message. It is torch's
(2.13: pytorch/pytorch#179291), and a program can only make it rare: 3 of 115 runs of two ranks without a barrier at the
end, 1 of about 80 with one. Nothing that our tests ask for happens after that."""


def launched(command: list[str], seconds: float, cwd: Path | None = None, made: Path | None = None, **variables: str):
    """What came of it, with a thread a rank. Where torch aborted, it is started again, twice at most; what it ``made``,
    a folder, is removed before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    for _ in range(3):
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=environment, cwd=cwd
        )
        if ended.returncode == 0 or ABORTED not in ended.stderr:
            break
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    return ended
