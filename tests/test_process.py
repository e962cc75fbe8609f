"""Proves that the library survives the life of a process: calls from many threads, changed thread counts, fork and
spawn after use, a second import.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest
import torch
from oracle import EPS, gains, incoming, same_bits, sample

import rmsnorm
from rmsnorm import RMSNorm, _native, add_rms_norm, rms_norm

SHAPES = [(1, 576), (130, 127), (513, 1027), (2048, 64)]


def work(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Forward, dx and dW of one problem; large enough, in part, for several threads."""
    x, weight = sample(rows, columns, dtype).requires_grad_(), gains(columns, dtype=dtype).requires_grad_()
    y, total = add_rms_norm(x, x * 0.5, columns, weight, EPS)
    grads = torch.autograd.grad((y, total), (x, weight), (incoming(rows, columns, dtype),) * 2)
    return [y.detach(), total.detach(), *grads]


def test_many_threads_at_once(threads):
    """Eight Python threads, each with another problem, while torch has two threads of its own."""
    threads(2)
    wanted = {shape: work(*shape) for shape in SHAPES}
    wrong: list[object] = []

    def loop(start: int) -> None:
        try:
            for i in range(12):
                shape = SHAPES[(start + i) % len(SHAPES)]
                if not all(map(same_bits, work(*shape), wanted[shape])):
                    wrong.append(shape)
        except Exception as error:  # a thread's exception is nobody's otherwise
            wrong.append(error)

    pool = [threading.Thread(target=loop, args=(i,)) for i in range(8)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_may_change(threads, dtype):
    """Forward, dx and dW have the same bits at 1, 2, 3 and 4 threads, in any order of asking."""
    results = {}
    for count in (2, 1, 4, 3, 1, 2):
        threads(count)
        for shape in SHAPES:
            results.setdefault(shape, []).append(work(*shape, dtype))
    for runs in results.values():
        assert all(all(map(same_bits, run, runs[0])) for run in runs[1:])


def test_targets_may_change_between_threads(restored_target):
    """The target is one for the process; switching it while others run changes no bit, as all targets agree."""
    wanted, wrong, stop = work(130, 127), [], threading.Event()

    def switch() -> None:
        while not stop.is_set():
            for name in _native.cpu_targets():
                _native.set_cpu_target("avx512" if name.startswith("avx512") else name)

    switcher = threading.Thread(target=switch)
    switcher.start()
    for _ in range(100):
        if not all(map(same_bits, work(130, 127), wanted)):
            wrong.append(1)
    stop.set()
    switcher.join()
    assert not wrong


class Rows(torch.utils.data.Dataset):
    """A dataset that normalises in the worker."""

    def __init__(self) -> None:
        self.norm = RMSNorm(64, EPS).requires_grad_(False)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.norm(sample(3, 64, torch.float32, seed=i))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
# Python warns of forking a process that has threads; DataLoader does it all the same, and that is what is tested.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_after_use(method):
    """Workers forked from a process that has used the kernels, and workers that start anew."""
    rows = Rows()
    wanted = torch.stack([rows[i] for i in range(8)])
    loader = torch.utils.data.DataLoader(
        rows, batch_size=4, num_workers=2, multiprocessing_context=multiprocessing.get_context(method)
    )
    assert same_bits(torch.cat(list(loader)), wanted)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork there")
def test_fork_keeps_the_chosen_kernels(python):
    """In a child of fork the kernels run on one thread after the parent's pool was in use, with the same bits."""
    program = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from test_process import work
from oracle import same_bits
torch.set_num_threads(2)
wanted = work(2048, 64)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if all(map(same_bits, work(2048, 64), wanted)) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = python(program.format(tests=str(__file__.rpartition("/")[0])))
    assert result.stdout.strip() == "0", result.stderr


def test_importing_twice(python):
    """A reload, and a second import, find the operators that the process has."""
    program = """
import importlib, torch, rmsnorm
x = torch.ones(2, 4)
first = rmsnorm.rms_norm(x, 4)
importlib.reload(rmsnorm)
assert rmsnorm.rms_norm(x, 4).equal(first)
for _ in range(2):
    exec('import rmsnorm')
print(rmsnorm.info().native, rmsnorm.rms_norm(x, 4).equal(first))
"""
    result = python(program)
    assert result.stdout.split() == [str(rmsnorm.info().native), "True"], result.stderr


def test_a_row_is_its_own(threads):
    """The row alone, in a batch, at 1 and at 2 threads, from any strides: same bits (contract, 3)."""
    x, weight = sample(257, 1027, torch.float32), gains(1027, dtype=torch.float32)
    threads(2)
    batch = rms_norm(x, 1027, weight, EPS)
    threads(1)
    for row in (0, 1, 15, 16, 17, 128, 256):
        assert same_bits(rms_norm(x[row], 1027, weight, EPS), batch[row])
        assert same_bits(rms_norm(x[row : row + 1].expand(3, -1), 1027, weight, EPS)[1], batch[row])
