"""Fixtures: the CPU targets in one process, the thread count, and a Python of its own for what happens at import."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings

from rmsnorm import _eager, _everyday, _handed, _native, _ops, functional, module
from rmsnorm.forms import gated, gated_ops, general, heads, in_place, l2, lean, modulated, quantised, sandwich

# Nothing that collecting tests makes is garbage, and looking for it takes a fifth of that time: 11.6 s, then 9.
gc.disable()

_FORMS = [room._served for room in (gated, general, modulated, quantised, sandwich)]
_FORMS += [general._served_add, modulated._added, sandwich._served_add, heads._normed, heads._turned]
_FORMS += [lean._norm, lean._added]
# What calls kernels past the dispatcher.
_STRAIGHT = [(form, "straight") for form in _FORMS] + [
    (room, "_straight") for room in (general, in_place, l2, modulated)
]
_STRAIGHT += [(general, "_add_straight"), (modulated, "_added_straight")]
_OPERATORS = (
    "rms_norm",
    "rms_norm_out",
    "rms_norm_forward",
    "rms_norm_backward",
    "add_rms_norm",
    "add_rms_norm_forward",
)

# `make test` draws the same problems each time. `make fuzz` (--hypothesis-profile=fuzz) draws new ones, remembers those
# that failed in .hypothesis/, and prints how to draw them again elsewhere.
_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "test", max_examples=300, derandomize=True, database=None, deadline=None, suppress_health_check=_slow
)
settings.register_profile("fuzz", max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=_slow)
settings.load_profile("test")


def _shared(item):
    """What a test's group shares: all that the test is given, but for the CPU target. None where there is no target."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    targets = [given[name] for name in ("target", "native_target") if name in given]
    return item.nodeid.replace(targets[0], "", 1) if targets else None


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(config, items):
    """The CPU targets of a test follow one another, in one process: they share its truth (remembered.py). Other tests
    are handed out eight at a time: when one ends, xdist looks through all groups that it has given. Heavy tests that
    are one of a kind take a minute or two, those of tables a few seconds: these come last, so that processes end
    together."""
    groups, counts, numbers, heavy = {}, Counter(), Counter(), Counter()
    for item in items:
        function = item.nodeid.partition("[")[0]
        heavy[function] += item.get_closest_marker("heavy") is not None
        each = 1 if item.get_closest_marker("heavy") else 8  # eight of those, and one process waits
        groups.setdefault((function, _shared(item) or (each, counts[function] // each)), []).append(item)
        counts[function] += 1
    for (function, _), group in groups.items():
        numbers[function] += 1
        for item in group:
            if config.pluginmanager.hasplugin("xdist") and item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(f"{function.split('/')[-1]}.{numbers[function]}"))
    items[:] = [item for key in sorted(groups, key=lambda key: heavy[key[0]]) for item in groups[key]]


def pytest_collection_finish():
    """For its logs dynamo times the guards of each graph, with caches emptied before: 24 ms of the 82 that a graph of
    two operators takes. Nobody reads it here. Where no test imports dynamo, it isn't imported for this. And what is
    there by now stays: no later collection of garbage walks over it."""
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *given: 0.0
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_warning_without_library(monkeypatch):
    """The one-time warning is test_errors.py's subject; elsewhere it would fail whichever test came first."""
    monkeypatch.setattr(_native, "warn_if_missing", lambda input: None)


@pytest.fixture
def restored_target():
    """Puts back the kernels that the process had."""
    before = _native.cpu_target()
    yield
    if before is not None:
        _native.set_cpu_target(before)


def _use(name: str) -> None:
    if not any(target.startswith(name) for target in _native.cpu_targets()):  # avx512bf16 answers to avx512
        pytest.skip(f"no {name} kernels here: {_native.why_not() or 'this CPU or this build lacks them'}")
    _native.set_cpu_target(name)
    assert _native.cpu_target().startswith(name)


@pytest.fixture(params=_native.KNOWN_TARGETS)
def native_target(request, restored_target):
    """Each CPU target that this machine has."""
    _use(request.param)
    return request.param


def _hand_to(monkeypatch, norm):
    monkeypatch.setattr(_handed, "norm", norm)
    for caller in (_everyday, functional, in_place, module):
        monkeypatch.setattr(caller, "_as_objects", norm)


@pytest.fixture
def hand_to(monkeypatch):
    """A call that puts another function in the place of the one in C++ that is handed tensors as objects."""
    return lambda norm: _hand_to(monkeypatch, norm)


@pytest.fixture
def handed(hand_to):
    """What each call of the function in C++ came to: whether it served."""
    served, norm = [], _handed.norm

    def watched(*given):
        results = norm(*given)
        served.append(results is not None)
        return results

    hand_to(watched)
    return served


def _without_straight(monkeypatch):
    for place, name in _STRAIGHT:
        monkeypatch.setattr(place, name, lambda *given: None)


@pytest.fixture
def straight(monkeypatch):
    """What each call of a kernel past the dispatcher came to: whether it served."""
    served = []

    def watched(kernel, *given):
        results = kernel(*given)
        served.append(results is not None)
        return results

    for place, name in _STRAIGHT:
        monkeypatch.setattr(place, name, partial(watched, getattr(place, name)))
    return served


@pytest.fixture
def without_straight(monkeypatch):
    """A call after which the dispatcher is asked."""
    return lambda: _without_straight(monkeypatch)


@pytest.fixture
def rstd_is_kept(monkeypatch):
    """Of a row or a few, too."""
    recorder = list(_handed.recorder)
    monkeypatch.setattr(_eager, "FEW", -1)
    _handed.recorder.clear()
    yield
    _handed.recorder[:] = recorder


@pytest.fixture(params=(*_native.KNOWN_TARGETS, "reference"))
def target(request, restored_target, monkeypatch):
    """Each CPU target that this machine has, and the plain torch definition in place of every operator."""
    if request.param == "reference":
        for name in _OPERATORS:
            monkeypatch.setattr(_ops, name, getattr(_ops, f"_{name}"))
        for name, default in (("rms_norm", ""), ("forward", "_forward"), ("backward", "_backward")):
            monkeypatch.setattr(gated_ops, name, gated_ops.GATED_RMS_NORM.defaults[default])
        for form in _FORMS:
            for name in ("operator", "plain", "forward", "backward"):
                default = form.made.defaults[f"_{name}" if name.endswith("ward") else ""]
                monkeypatch.setattr(form, name, default, raising=False)
        for asks in (functional, _everyday):
            monkeypatch.setattr(asks, "_native", False)
        _hand_to(monkeypatch, lambda *given: None)
        _without_straight(monkeypatch)
    else:
        _use(request.param)
    return request.param


@pytest.fixture
def everything_is_large():
    """A call that makes every tensor, or those of so many bytes, larger than the caches, as those above 24 MiB are."""
    before = _native.large_bytes()
    yield lambda least=1: _native.set_cache_bytes(3, least)
    _native.set_cache_bytes(3, before)


@pytest.fixture
def second_cache():
    """A call that makes a core's second cache as large as that: some loops are those of a machine that has 2 MiB."""
    before = (_native.cache_bytes() or [0, 0])[1]
    yield lambda size: _native.set_cache_bytes(2, size)
    if before:
        _native.set_cache_bytes(2, before)


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, unless a test sets another number with this fixture or is heavy: small parallel regions that wait
    for a core which something else has make the suite several times slower."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("heavy") is None:
        torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python():
    """Runs a program in a fresh interpreter, with none of our environment variables but those given."""

    def run(program: str, *, path: object = None, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RMSNORM_")}
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH", "")]))
        return subprocess.run(
            [sys.executable, "-c", program],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
