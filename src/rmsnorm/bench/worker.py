"""The only file that runs measurements in a process of their own, one for each thread count.

Every library then starts with the threads that it is given, and no pool is left over from another setting, to spin on
a core that somebody is timed on.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TypeVar, cast

T = TypeVar("T")
CORES = range(os.cpu_count() or 1)


def apart(
    threads: int,
    function: Callable[..., Iterator[T]],
    *arguments: object,
    variables: Mapping[str, str] | None = None,
) -> Iterator[T]:
    """Yields what ``function(*arguments)`` yields in a new process with so many threads, and these variables.

    Closing the iterator, by Ctrl-C or otherwise, ends the process.

    Raises:
        ArithmeticError: the function raised it there.
        RuntimeError: the process ended before its time; carries the last line that it said.
    """
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C goes to this process alone, which knows what to do about it.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **environment(threads), **(variables or {})},
            start_new_session=True,
        )
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump((threads, function, arguments), process.stdin)
            process.stdin.close()
            yield from _read(process.stdout)
            if process.wait():
                said.seek(0)
                last = (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise RuntimeError(f"the measuring process ended with {_status(process.returncode)}: {last}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def environment(threads: int) -> dict[str, str]:
    """What tells libraries their number of threads before they are imported; JAX listens to nothing else.

    torch's threads are bound to a core each. Unbound, one that slept may be woken on the core of the thread that spins
    while it waits for it: seen on a virtual machine with 2 cores, where calls of 9 µs then took 8 ms, each of them.

    glibc's allocator is settled: blocks below 32 MiB from its heap, which keeps what is freed. That is where its own
    adaptation ends up, but for a heap whose last block is freed: left alone, it may give the output of every call back
    to the system, and every call pays for its page faults again, or not, as the addresses fall. And it keeps no small
    blocks aside: glibc 2.36 cuts an aligned output out of a larger block, and where the two ends are kept, the block
    that comes back is too small for the next output, which goes to memory that no cache has. Seen in every second
    process: 512x4096 fp32 took 340 µs, and 220 into memory that is given; without the ends kept, 220 both ways.
    """
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(threads))
    variables |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    variables |= {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    if threads == 1:
        return {**variables, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    return {**variables, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


@contextmanager
def unbound() -> Iterator[None]:
    """Lets this thread, and those that a library makes meanwhile, run on every core: what a pool of its own expects."""
    if not hasattr(os, "sched_setaffinity"):  # Linux alone binds
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _read(stream: IO[bytes]) -> Iterator[T]:
    while True:
        try:
            item = pickle.load(stream)
        except EOFError:
            return
        if isinstance(item, ArithmeticError):
            raise item
        yield cast("T", item)


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def main() -> None:
    """Serves one ``apart``: results go to the standard output, what libraries print doesn't."""
    import torch

    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threads, function, arguments = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    try:
        for item in function(*arguments):
            pickle.dump(item, results)
            results.flush()
    except ArithmeticError as error:
        pickle.dump(error, results)
        results.flush()


if __name__ == "__main__":
    main()
