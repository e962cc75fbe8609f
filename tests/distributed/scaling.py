"""The only file that knows what a norm puts on the wire: by formula, and as counted on ranks of this machine.

``make scaling`` writes the tables of docs/scaling.md; test_scaling.py checks that count and formula are equal, and
that the tables are current. The bytes on the loopback interface are measured by the command alone: other programs use
it, too.

A ring sends the least that a reduction of whole tensors can: of n ranks each sends (n-1)/n of the tensor to add it up,
and as much to hand out the sum. To gather a tensor each sends (n-1)/n of it; to cut it otherwise, (n-1)/n of its part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pool import Ranks, Wire, mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rmsnorm
from rmsnorm.bench.console import machine, mebibytes
from rmsnorm.bench.pages import replace_block, table

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
LABEL = "made by `make scaling`"
TOKENS, HIDDEN, RANKS = 8192, (4096, 8192, 16384), (8, 64, 512, 1024)
COUNTED = 2, 32, 1024  # batch, sequence, hidden
HEARD = 2, 65536, 64  # large messages: a header is nothing beside them
TOKENS_COUNTED = COUNTED[0] * COUNTED[1]
DTYPE, NUMBER = torch.bfloat16, 2

DATA, SEQUENCE, TENSOR, WHOLE, GATHERED = "data", "sequence", "tensor", "tensor, weight whole", "tensor, gathered"
DIMENSION = {DATA: 0, SEQUENCE: 1, TENSOR: 2, WHOLE: 2, GATHERED: 2}
CALLS = ("rms_norm", "add_rms_norm", "gated_rms_norm", "layer_norm")
CASES = [(call, split) for split in DIMENSION for call in CALLS if call == "rms_norm" or split != GATHERED]
Sent = tuple[int, int, int]  # bytes: forward, backward, to add up or gather the gradients of weight and bias
Collectives = list[tuple[str, int]]


def all_reduce(ranks: int, size: int) -> int:
    """What each rank sends."""
    return 2 * (ranks - 1) * size // ranks


def all_gather(ranks: int, size: int) -> int:
    """What each rank sends of a tensor of which each has a part; ``size`` is the whole."""
    return (ranks - 1) * size // ranks


def all_to_all(ranks: int, size: int) -> int:
    """What each rank sends to have other rows or columns of a tensor; ``size`` is the whole."""
    return (ranks - 1) * size // ranks**2


def formula(call: str, split: str, tokens: int, hidden: int, ranks: int) -> Sent:
    """What each rank sends for one call."""
    weights = NUMBER * hidden * (2 if call == "layer_norm" else 1)
    if split in (DATA, SEQUENCE):
        return 0, 0, all_reduce(ranks, weights)
    if split == GATHERED:
        activations = all_gather(ranks, NUMBER * tokens * hidden)
        return activations, activations, 0
    row = 16 if call == "layer_norm" else 4  # two fp64, or one fp32
    sums = all_reduce(ranks, row * tokens)
    return sums, sums, all_gather(ranks, weights) if split == WHOLE else 0


@dataclass(frozen=True)
class Count:
    """The collectives that one call was seen to start, on a rank."""

    ranks: int
    steps: tuple[Collectives, Collectives, Collectives]

    def sent(self) -> Sent:
        """What a ring sends for them."""
        first, second, third = (sum(self._sent(*one) for one in step) for step in self.steps)
        return first, second, third

    def _sent(self, name: str, size: int) -> int:
        if name == "all_reduce":
            return all_reduce(self.ranks, size)
        assert name == "all_gather_into_tensor", f"nothing here should {name}"
        return all_gather(self.ranks, size * self.ranks)


def count(call: str, split: str, ranks: int, sizes: tuple[int, ...] = COUNTED) -> Count | None:
    """On a rank: what it takes to call the norm, to differentiate it, and to have the weight's gradient whole."""
    here, shape = mesh(ranks), torch.Size(sizes)
    if here.get_coordinate() is None:
        return None
    placed = [Shard(DIMENSION[split])]
    alike = 2 if call in ("add_rms_norm", "gated_rms_norm") else 1
    kept = [Shard(0)] if split == TENSOR else [Replicate()]
    tensors = [(shape, placed)] * alike + [(shape[-1:], kept)] * (2 if call == "layer_norm" else 1)
    args = [
        distribute_tensor(torch.randn(s, dtype=DTYPE), here, p, src_data_rank=None).requires_grad_() for s, p in tensors
    ]
    norm: Callable[..., Any] = getattr(rmsnorm, call)
    with Wire() as forward:
        alikes = [t.redistribute(placements=[Replicate()]) if split == GATHERED else t for t in args[:alike]]
        outputs = norm(*alikes, shape[-1:], *args[alike:])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = tuple(y.redistribute(placements=placed) for y in outputs)  # where it isn't gathered, it is there
    grads = [torch.ones_like(y) for y in outputs]
    with Wire() as backward:
        found = torch.autograd.grad(outputs, args, grads)
    with Wire() as weights:
        for grad, weight in zip(found[alike:], args[alike:], strict=True):
            grad.redistribute(placements=weight.placements)  # as before an optimiser's step
    return Count(ranks, (forward.collectives, backward.collectives, weights.collectives))


def counts(four: Ranks) -> dict[tuple[str, str, int], Count]:
    """Each case on the first two ranks, and on all four."""
    found = {}
    for ranks in (2, 4):
        for call, split in CASES:
            first, *others = filter(None, four.run(count, call, split, ranks))
            assert all(other == first for other in others), f"{call}, {split}: the ranks send different things"
            found[call, split, ranks] = first
    return found


def hear(call: str, split: str, ranks: int) -> int:
    """On a rank: the bytes that all ranks together put on the loopback interface; the least of a few times."""
    count(call, split, ranks, HEARD)  # connects
    least = []
    for _ in range(5):
        dist.barrier()
        before = _loopback()
        dist.barrier()
        count(call, split, ranks, HEARD)
        dist.barrier()
        least.append(_loopback() - before)
    return min(least)


def _loopback() -> int:
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def heard(four: Ranks) -> str:
    """The block of docs/scaling.md with what was on the interface."""
    rows = []
    for call, split in (("rms_norm", TENSOR), ("layer_norm", TENSOR), ("rms_norm", GATHERED)):
        for ranks in (2, 4):
            paper = ranks * sum(formula(call, split, HEARD[0] * HEARD[1], HEARD[2], ranks))
            there = four.run(hear, call, split, ranks)[0]
            rows.append([f"{split}: `{call}`", str(ranks), f"{paper:,}", f"{there:,}", f"{there / paper:.3f}"])
    batch, sequence, hidden = HEARD
    here = machine()
    return (
        f"The same for [{batch}, {sequence:,}, {hidden}], all ranks together, beside what this machine's loopback "
        f"interface sent, with headers and two barriers. {here['cpu']}, {here['cores']} cores, gloo, "
        f"torch {here['torch']}, {here['date'][:10]}.\n\n"
    ) + table(("", "ranks", "formula", "interface", "÷"), rows)


def _paper() -> Iterable[list[str]]:
    for hidden in HIDDEN:
        for ranks in RANKS:
            sizes = TOKENS, hidden, ranks
            weight = formula("rms_norm", DATA, *sizes)[2]
            ours, layer = (sum(formula(call, TENSOR, *sizes)) for call in ("rms_norm", "layer_norm"))
            gathered = sum(formula("rms_norm", GATHERED, *sizes))
            turned = 4 * all_to_all(ranks, NUMBER * TOKENS * hidden)
            cells = (0, weight, ours, layer, turned, gathered)
            yield [
                f"{hidden:,} on {ranks:,} ranks",
                *map(_size, cells),
                f"{turned / ours:,.0f}",
                f"{gathered / ours:,.0f}",
            ]


def _size(size: int) -> str:
    return mebibytes(size) if size else "0"


def _words(step: Collectives) -> str:
    return ", ".join(f"{name.removesuffix('_into_tensor')} {size:,}" for name, size in step) or "–"


def tables(found: dict[tuple[str, str, int], Count]) -> str:
    """The block of docs/scaling.md. Calls that send the same share a line."""
    lines: dict[tuple[str, ...], dict[str, None]] = {}
    for call, split, ranks in sorted(found, key=lambda case: CASES.index(case[:2])):
        one, paper = found[call, split, ranks], formula(call, split, TOKENS_COUNTED, COUNTED[2], ranks)
        cells = (*map(_words, one.steps), f"{sum(one.sent()):,}", f"{sum(paper):,}")
        title = "data or sequence" if split in (DATA, SEQUENCE) else split
        lines.setdefault((title, str(ranks), *cells), {})[f"`{call}`"] = None
    counted = [[f"{title}: {', '.join(calls)}", *cells] for (title, *cells), calls in lines.items()]
    batch, sequence, hidden = COUNTED
    return "\n".join(
        (
            f"What each rank sends for one norm, forward and backward, of {TOKENS:,} tokens in bf16. By formula.\n",
            table(
                (
                    "hidden size",
                    "data or sequence",
                    "its weight's gradient, per step",
                    "tensor: RMSNorm",
                    "tensor: LayerNorm",
                    "by all-to-all",
                    "by gathering",
                    "all-to-all ÷ RMSNorm",
                    "gathering ÷ RMSNorm",
                ),
                _paper(),
            ),
            f"Counted: the collectives of one call on [{batch}, {sequence}, {hidden}] in bf16 and the bytes that each "
            "takes in on a rank, then what a ring sends for them, and what the formula says. gloo, torch "
            f"{torch.__version__.partition('+')[0]}.\n",
            table(("", "ranks", "forward", "backward", "weight's gradient", "sent", "formula"), counted),
        )
    )


def main() -> None:
    """Writes the tables into docs/scaling.md."""
    with tempfile.TemporaryDirectory() as folder:
        four = Ranks(4, Path(folder))
        try:
            blocks = {LABEL: tables(counts(four)), f"interface: {LABEL}": heard(four)}
        finally:
            four.close()
    for label, text in blocks.items():
        replace_block(PAGE, label, text)
        print(text)


if __name__ == "__main__":
    main()
