"""Times the host's work for a call on a GPU without one: ours in C++, the same through Python and Triton's launcher,
and an operator that does nothing.

    python benchmarks/launcher.py [--seconds 1.0]

A stand-in for the driver takes the launches (tests/gpu/driver.c), so tensors are the CPU's and nothing is computed.
What a real driver and torch's allocator for CUDA take comes on top of each column. Contenders take turns; what is
printed is the median of samples of calls, and the medians of the ratios round by round.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmsnorm import _form
from rmsnorm.bench.timing import measure
from rmsnorm.gpu import serve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import standin  # noqa: E402 - it is the tests'


def through_python(name: str) -> Callable[..., Any]:
    """The operator as it was before there was a launcher in C++."""
    _form.library.define(f"_today_{name}({schema_of(name)}")
    _form.library.impl(f"_today_{name}", serve.served()[name], "CPU")
    return operator("_today_", name)


def empty_operators(folder: Path, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Of the same arguments and results, for each of these: benchmarks/empty_operator.cpp."""
    source, library = ROOT / "benchmarks" / "empty_operator.cpp", folder / "empty.so"
    torchs = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = ["c++", *flags, "-isystem", str(torchs / "include"), str(source), "-o", str(library)]
    subprocess.run([*command, f"-L{torchs / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
    for name in names:
        _form.library.define(f"_empty_{name}({schema_of(name)}")
    torch.ops.load_library(library)
    return {name: operator("_empty_", name) for name in names}


def schema_of(name: str) -> str:
    return str(getattr(torch.ops.rmsnorm, name).default._schema).partition("(")[2]


def operator(prefix: str, name: str) -> Callable[..., Any]:
    return getattr(torch.ops.rmsnorm, prefix + name).default._op


def calls(rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x, other, grad = (torch.zeros(rows, columns, dtype=dtype) for _ in range(3))
    weight, rstd = torch.zeros(columns, dtype=dtype), torch.ones(rows, 1)
    norm = 1, 1e-6, 0.0
    return {
        "rms_norm": (x, weight, *norm, False),
        "rms_norm_forward": (x, weight, *norm, False),
        "rms_norm_backward": (grad, None, x, rstd, weight, *norm, True, True),
        "add_rms_norm": (x, other, weight, *norm, False),
        "gated_rms_norm": (x, other, weight, *norm, False, True, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    everyday = calls(1, 4096, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        made = standin.StandIn(Path(folder))
        empty = empty_operators(Path(folder), everyday)
        with standin.standing_in(made, patch), standin.nothing_compiled(patch):
            made.library.standin_record(0)
            print(f"torch {torch.__version__}, 1 x 4096 bfloat16, microseconds of the host's a call")
            print(f"{'':20} {'Python':>8} {'C++':>8} {'empty':>8} {'C++/Python':>11} {'C++/empty':>10}")
            for name, arguments in everyday.items():
                all_three = {"Python": through_python(name), "C++": standin.in_cpp(name), "empty": empty[name]}
                contenders = {key: functools.partial(one, *arguments) for key, one in all_three.items()}
                found = measure(contenders, seconds)
                middle = {key: 1e6 * times.median for key, times in found.items()}
                ratios = [found["C++"].ratio(found[other]) for other in ("Python", "empty")]
                print(
                    f"{name:20} {middle['Python']:8.2f} {middle['C++']:8.2f} {middle['empty']:8.2f} "
                    f"{ratios[0]:11.3f} {ratios[1]:10.2f}"
                )


if __name__ == "__main__":
    main()
