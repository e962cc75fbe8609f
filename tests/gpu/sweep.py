"""Times the kernels on the GPU that is here, ours and torch's, in units of a copy of the same tensor.

    python tests/gpu/sweep.py                          prints the table of docs/gpu.md
    python tests/gpu/sweep.py PARTIALS='(256, 256)'    with another constant of launch.py or backward.py

It is the device's time: nothing waits for Python (`rmsnorm bench --device cuda` has what a caller sees). Every time is
the median that `triton.testing.do_bench` finds, which empties the second-level cache before each call.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable

import torch
import triton
from triton.testing import do_bench

from rmsnorm.gpu import backward, launch

EPS = 1e-5
SHAPES = ((524288, 128), (65536, 1024), (65536, 2048), (32768, 4096), (16384, 8192), (8192, 16384), (4096, 32768))
DTYPES = (torch.bfloat16, torch.float32)


def microseconds(call: Callable[[], object]) -> float:
    return 1e3 * float(do_bench(call, warmup=5, rep=25, return_mode="median"))


def row(rows: int, columns: int, dtype: torch.dtype) -> str:
    x, grad, out = (torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(3))
    weight, shape, aten = torch.randn(columns, device="cuda", dtype=dtype), [columns], torch.ops.aten
    _, rstd = aten._fused_rms_norm(x, shape, weight, EPS)
    copy = microseconds(lambda: out.copy_(x))
    times = [
        microseconds(lambda: launch.forward(x, None, weight, 1, EPS, 0.0, False, True)),
        microseconds(lambda: aten._fused_rms_norm(x, shape, weight, EPS)),
        microseconds(lambda: backward.backward(grad, None, x, rstd, weight, 1, EPS, 0.0, True, True)),
        microseconds(lambda: aten._fused_rms_norm_backward(grad, x, shape, rstd, weight, [True, True])),
    ]
    speed = 2 * x.nbytes / copy / 1e6
    shown = (
        f"{rows}×{columns}",
        str(dtype)[6:],
        f"{copy:.0f} µs, {speed:.2f} TB/s",
        *(f"{t / copy:.2f}" for t in times),
    )
    return f"| {' | '.join(shown)} |"


def main() -> None:
    for setting in sys.argv[1:]:
        name, value = setting.split("=", 1)
        room = next((room for room in (launch, backward) if hasattr(room, name)), None)
        if room is None:
            raise SystemExit(f"{name} is no constant of launch.py or backward.py")
        setattr(room, name, ast.literal_eval(value))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}\n")
    print("| | | a copy | forward | torch's | backward | torch's |", "|" + "---|" * 7, sep="\n")
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            print(row(rows, columns, dtype), flush=True)


if __name__ == "__main__":
    main()
