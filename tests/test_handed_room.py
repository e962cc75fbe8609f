"""Proves what comes of a call past the dispatcher (src/rmsnorm/_handed.py) when its results get no room, or another."""

import ctypes
import sys

import pytest
import torch

import rmsnorm
from rmsnorm import _form, _handed, _native, _ops
from rmsnorm.forms import modulated_ops

pytestmark = pytest.mark.skipif(not _native.cpu_targets() or not _handed._functions, reason="nothing is handed over")
X = torch.linspace(-2.0, 3.0, 12).view(3, 4)
EMPTY = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", _handed._empty)
GIVEN = 4, 1e-6, 0.0, False, None, None, None


@pytest.fixture
def norm_with(monkeypatch):
    """The function, of a torch that makes tensors by another one."""

    def made(empty):
        objects = tuple(empty if one is EMPTY else one for one in _handed._OBJECTS)
        assert empty in objects
        monkeypatch.setattr(_handed, "_OBJECTS", objects)
        return _handed._made()[0]

    yield made
    monkeypatch.undo()
    assert _handed._made()


@pytest.mark.parametrize("failing", [1, 2])
def test_no_room(norm_with, failing):
    """Of an output, or of the sum beside it: Python's error, and the first one is no longer there."""
    made, asked = [], []

    def empty(*given):
        asked.append(given)
        if len(asked) == failing:
            raise MemoryError
        made.append(EMPTY(*given))
        return made[-1]

    norm = norm_with(empty)
    before = sys.getrefcount(X)
    with pytest.raises(MemoryError):
        norm(1, *GIVEN, X, X, None)
    assert [sys.getrefcount(one) for one in made] == [3] * (failing - 1)  # of the list, the loop, and the argument
    assert sys.getrefcount(X) == before
    output, sum = norm(1, *GIVEN, X, X, None)
    assert torch.equal(sum, X + X)
    assert torch.equal(output, _ops.rms_norm(X + X, None, 1, 1e-6, 0.0, False))


OTHERS = {
    "transposed": lambda sizes: torch.full(sizes[::-1], 7.0).t(),
    "another size": lambda sizes: torch.full((sizes[0], sizes[1] - 1), 7.0),
    "another type": lambda sizes: torch.full(sizes, 7.0, dtype=torch.float64),
}


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("other", OTHERS)
def test_room_that_is_not_what_was_asked_for(norm_with, other, failing):
    """It isn't written to, and the operator is asked."""
    made = []

    def empty(sizes, strides, dtype):
        made.append(OTHERS[other](sizes) if len(made) == failing - 1 else EMPTY(sizes, strides, dtype))
        return made[-1]

    norm = norm_with(empty)
    assert norm(1, *GIVEN, X, X, None) is None
    assert len(made) == 2
    assert (made[failing - 1] == 7).all()


def test_no_room_for_an_output_alone(norm_with):
    def empty(*given):
        raise MemoryError

    with pytest.raises(MemoryError):
        norm_with(empty)(0, *GIVEN, X, None, None)


CALLS = {
    "handed": lambda x, row: rmsnorm.rms_norm(x, 4096, row, 1e-6),
    "straight": lambda x, row: rmsnorm.rms_norm(x, 4096, row, 1e-6, bias=row),
}


@pytest.mark.parametrize(("rows", "times"), [(8, 0), (9, 1)])
@pytest.mark.parametrize("way", CALLS)
def test_from_a_size_on_other_threads_run(monkeypatch, way, rows, times):
    """The lock is let go of for more than 32768 elements, and taken again."""
    seen, hand, names = [], _handed._hand, _handed._FUNCTIONS.split()
    let_go = ctypes.PYFUNCTYPE(ctypes.c_void_p)(lambda: seen.append("let go") or 7)
    take = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(lambda state: seen.append(f"take {state}"))

    def handed(table, given):
        given = [*given]
        for name, function in (("PyEval_SaveThread", let_go), ("PyEval_RestoreThread", take)):
            given[names.index(name)] = ctypes.cast(function, ctypes.c_void_p).value
        return hand(table, given)

    x, row = torch.ones(rows, 4096), torch.ones(4096)
    with monkeypatch.context() as patch:
        patch.setattr(_handed, "_hand", handed)
        assert _handed._made()
    try:
        CALLS[way](x, row)
    finally:
        _handed._made()
    assert seen == ["let go", "take 7"] * times


def test_arguments_too_many_or_few():
    kernel = _handed.straight("gated_add", modulated_ops.GATED_ADD.schemas[""], gate="s")
    given = None, X, X, X, False
    assert torch.equal(kernel(*given), X + X * X)
    for wrong in (given[:-1], (*given, None), given[:1], ()):
        assert kernel(*wrong) is None


def test_a_kernel_that_refuses_leaves_operators_as_they_are():
    """What has no kernel, here a weight of fp64, is met past the dispatcher: nothing is returned there, and an operator
    that is called next has tensors for results that nobody asked for, not None."""
    made = next(one for one in _form.registered if one.form.name == "quantised_rms_norm")
    kernel = _handed.straight(made.form.name, made.schemas[""])
    options = 1e-6, 0.0, False, False, False, False
    assert kernel((4,), X, None, None, X[0].double(), *options) is None
    found = made.plain(X, None, None, None, 1, *options)
    assert all(isinstance(one, torch.Tensor) for one in found)
    assert found[2].numel() == 0
    assert kernel((4,), X, None, None, None, *options)[2] is None
