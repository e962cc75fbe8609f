"""The only file that runs trainings beside each other: worker processes here, and ranks of ``torchrun`` anywhere.

A run has one thread and depends on nothing but its setting, its rate and its seed. So neither the number of workers
nor that of ranks changes a bit of the results; they change when these are there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from .._extras import hush
from . import plan
from .checkpoint import Refused
from .corpus import Corpus
from .folder import Folder
from .plan import Run
from .training import Outcome, train

TOLD_EVERY = 5  # steps
Hear = Callable[[Run, int], None]


class Lost(Exception):
    """A worker ended before its time."""


def carry_out(folder: Folder, arms: list[str], corpus: Corpus, jobs: int, done: list[Outcome], hear: Hear) -> None:
    """Makes every run that the plan asks for, and appends the outcomes to ``done``.

    Args:
        done: the outcomes that there are; those of this call are added as they come.
        jobs: worker processes; 1 means this one.
        hear: is told a run and how many of its steps are done.

    Raises:
        OSError: something can't be written.
        Refused: a checkpoint can't be used.
        Lost: a worker was killed.
    """

    def todo() -> list[Run]:
        trained = [outcome.trained for outcome in done]
        return [run for arm in arms for run in plan.wanted(folder.setting, arm, trained)]

    if jobs == 1:
        while runs := todo():
            run = runs[0]
            outcome = train(folder.setting, run, corpus, folder.checkpoint(run), lambda step: hear(run, step))  # noqa: B023
            folder.keep(outcome)
            done.append(outcome)
            hear(run, folder.setting.steps)
        return
    with _workers(jobs, folder, corpus) as idle:
        busy: dict[Connection, Run] = {}
        while (runs := [run for run in todo() if run not in busy.values()]) or busy:
            while runs and idle:
                connection = idle.pop()
                busy[connection] = runs.pop(0)
                connection.send(busy[connection])
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                message = _receive(ready, busy[ready])
                if isinstance(message, Outcome):
                    folder.keep(message)
                    done.append(message)
                    hear(busy.pop(ready), folder.setting.steps)
                    idle.append(ready)
                else:
                    hear(busy[ready], message)


def _receive(connection: Connection, run: Run) -> Any:
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        raise Lost(f"the worker of {run.name} was killed; --resume goes on from its checkpoint") from None
    if isinstance(message, BaseException):
        raise message
    return message


@contextmanager
def _workers(count: int, folder: Folder, corpus: Corpus) -> Iterator[list[Connection]]:
    """So many processes and a connection to each; they end when this is left, however it is left."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
    processes, connections = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, folder, corpus), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        yield list(connections)
    finally:
        for process in processes:
            process.terminate()
        for process, connection in zip(processes, connections, strict=False):
            process.join()
            connection.close()


def _serve(connection: Connection, folder: Folder, corpus: Corpus) -> None:
    """The life of a worker: a run comes in, steps and an outcome go out. It ends with the one who asks."""
    hush()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the main process decides

    def tell(step: int) -> None:
        if step % TOLD_EVERY == 0:
            connection.send(step)

    try:
        while True:
            run = connection.recv()
            try:
                connection.send(train(folder.setting, run, corpus, folder.checkpoint(run), tell))
            except (OSError, Refused) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


class Ranks:
    """The processes that ``torchrun`` started; one, if it started none."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0

    def __enter__(self) -> Ranks:
        if self.count > 1:
            from torch import distributed

            distributed.init_process_group("gloo", timeout=timedelta(days=7))
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.count > 1 and kind is None:
            from torch import distributed

            # gloo's threads drop a message's tensors after whoever waits for it has gone on: where Python ends first,
            # the process aborts (torch 2.13, 3 of 115 runs; pytorch/pytorch#179291). A barrier leaves them the time.
            distributed.barrier()
            distributed.destroy_process_group()

    def share(self, arms: tuple[str, ...]) -> list[str]:
        """The arms of this rank."""
        return list(arms[self.rank :: self.count])

    def gather(self, mine: Any) -> list[Any]:
        """What each rank has, on every rank."""
        if self.count == 1:
            return [mine]
        from torch import distributed

        everybody: list[Any] = [None] * self.count
        distributed.all_gather_object(everybody, mine)
        return everybody
