"""What a training step of SmolLM2-135M keeps for backward, by who keeps it, and what it costs: as it is, patched with
residual adds fused, and with `memory="lean"`.

    python benchmarks/lean.py [--dtypes float32,bfloat16] [--tokens 128] [--seconds 30] [--threads 2]

A tensor that several keep counts once, for all of them together. Times are those of whole steps, taken in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import rmsnorm
from rmsnorm.bench.timing import measure
from rmsnorm.models import loading, workload
from rmsnorm.models.classes import switch


class Keepers(TorchFunctionMode):
    """Of each storage that is kept for backward its size, and which module's which function keeps it."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.sizes: dict[int, int] = {}
        self.names: dict[int, dict[str, None]] = defaultdict(dict)
        self.name = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.name = self.name, f"{_module()}.{function.__name__}"
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.name = before

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.given:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.names[storage.data_ptr()][self.name or f"{_module()}.apply"] = None
        return tensor

    def by_name(self) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for storage, size in self.sizes.items():
            found[", ".join(self.names[storage])] += size
        return dict(found)


def _module() -> str:
    """The class of the innermost module whose forward is running."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return "model"


def kept(model: nn.Module, call: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes by keepers."""
    keepers = Keepers(list(model.parameters()))
    with keepers, torch.autograd.graph.saved_tensors_hooks(keepers.pack, lambda tensor: tensor):
        output = call()  # alive until all are found: no address is used twice
    del output
    return keepers.by_name()


def show(dtype: torch.dtype, tokens: int, seconds: float) -> None:
    model, lean = (loading.load(loading.SMOLLM2, dtype)[1] for _ in range(2))
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}

    def loss(of: nn.Module) -> Callable[[], Tensor]:
        return lambda: workload.loss(of, inputs, writes=True)

    sides = {"unpatched": kept(model, loss(model))}
    reports = {
        "patched": rmsnorm.patch(model, fuse_add=inputs),
        "lean": rmsnorm.patch(lean, fuse_add=inputs, memory="lean"),
    }
    sides |= {"patched": kept(model, loss(model)), "lean": kept(lean, loss(lean))}
    print(f"\n{str(dtype).removeprefix('torch.')}, {tokens} tokens: MiB kept for backward")
    for name, report in reports.items():
        print(f"{name}: {report.summary()}")
    names = sorted(
        dict.fromkeys(name for side in sides.values() for name in side), key=lambda n: -sides["lean"].get(n, 0)
    )
    names = [name for name in names if any(side.get(name, 0) >= 2**17 for side in sides.values())]
    totals = {side: sum(found.values()) for side, found in sides.items()}
    for name, values in [
        *((name, [f.get(name, 0) for f in sides.values()]) for name in names),
        ("all", totals.values()),
    ]:
        print(f"{name:90}", *(f"{value / 2**20:9.2f}" if value else " " * 9 for value in values))
    print(f"{'÷ unpatched':90}", *(f"{value / totals['unpatched']:9.3f}" for value in totals.values()), flush=True)
    if not seconds:
        return
    turn = switch(model)

    def stepper(of: nn.Module, on: bool = True) -> Callable[[], object]:
        return lambda: (turn(on), workload.step(of, inputs, writes=True))  # type: ignore[func-returns-value]

    calls = {"unpatched": stepper(model, False), "patched": stepper(model), "lean": stepper(lean)}
    times = measure(calls, seconds)
    for one, other in (("lean", "patched"), ("lean", "unpatched"), ("patched", "unpatched")):
        speed = workload.Speed(times[other], times[one], tokens)
        low, high = speed.ratio_quartiles
        print(f"a step, {one} ÷ {other}: {speed.ratio:.3f} ({low:.3f}–{high:.3f}), {len(times[one].seconds)} turns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing for each type; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {rmsnorm.info().cpu_target}, {given.threads} threads")
    for dtype in given.dtypes.split(","):
        show(getattr(torch, dtype), given.tokens, given.seconds)


if __name__ == "__main__":
    main()
