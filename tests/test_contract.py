"""Proves that ``info().contract`` names the bits: one id on every CPU target, another one whenever they change."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rmsnorm
from rmsnorm import _native

# Of each id that there has been, the hash of what the kernels make of the probe below. Bits that change under an id
# fail here: count up kRevision in csrc/contract.h, add the new id with its hash, and write a line into CHANGELOG.md.
HASHES = {"69bc1ee090f1": "fe5ca6675587f6ea"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _native_only():
    if _native.why_not():
        pytest.skip("the contract is the kernels'")


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """By integers alone: no generator of random numbers is promised to stay as it is."""
    index = torch.arange(rows * columns, dtype=torch.int64).view(rows, columns) + 15_485_863 * seed
    return ((index * 1_103_515_245 + 12_345) % 2_147_483_647 % 20_011 - 10_005).double().div(2_503).to(dtype)


def probe() -> str:
    """The hash of outputs and gradients of every form, type and rounding order, in sizes that fill lanes and don't."""
    found = hashlib.sha256()

    def add(*tensors: Tensor) -> None:
        for tensor in tensors:
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())

    for dtype in DTYPES:
        for columns in (5, 129, 1027, 9001):
            rows = 300 if columns == 129 else 3  # several chunks of backward
            x, other, grad = (numbers(rows, columns, dtype, seed).requires_grad_() for seed in (1, 2, 3))
            w = (1 + numbers(1, columns, dtype, 4)[0] / 4).detach().requires_grad_()
            add(rmsnorm.rms_norm(x, columns, None, 1e-5), rmsnorm.layer_norm(x, (columns,), w, w))
            calls: list[Tensor | tuple[Tensor, ...]] = [
                rmsnorm.rms_norm(x, columns, w, 1e-5, casting_mode=mode, offset=0.5) for mode in ("torch", "llama")
            ]
            calls += [rmsnorm.gated_rms_norm(x, other, columns, w, 1e-5, norm_before_gate=b) for b in (True, False)]
            calls += rmsnorm.add_rms_norm(x, other, columns, w, 1e-5)[:1]
            calls += [
                rmsnorm.sandwich_rms_norm(x, other, columns, w, w, 1e-5),
                rmsnorm.rms_norm_add(x, other, columns, w),
            ]
            calls.append(rmsnorm.rms_norm(x, columns, w, 1e-5, offset=0.5, memory="lean"))
            calls += rmsnorm.add_rms_norm(x, other, columns, w, 1e-5, offset=0.5, memory="lean")[:1]
            heads, angle = x.view(1, -1, columns), numbers(rows, columns - 1, dtype, 6)
            calls.append(rmsnorm.heads_rms_norm_rope(heads, heads, angle, angle, w, None, 1e-5))
            beside = {"scale": other, "residual": other, "gate": w.expand(1, columns)}
            calls.append(rmsnorm.modulated_norm(x, columns, None, 1e-5, casting_mode="llama", **beside))
            calls += [rmsnorm.modulated_norm(x, columns, scale=w[None], shift=w[None], statistic="layer")]
            calls += [rmsnorm.gated_add(x, other, w[None]), rmsnorm.l2_norm(x, columns, w, 1e-5)]
            calls += [rmsnorm.rms_norm(x, columns, w, 1e-5, bias=w), rmsnorm.rms_norm(x, columns, w, 1e-5, partial=0.5)]
            calls.append(rmsnorm.add_rms_norm(x, other, columns, w, 1e-5, round_sum=False, return_rstd=True)[::2])
            for called in calls:
                outputs = called if isinstance(called, tuple) else (called,)
                for y in outputs:
                    # To the others zeros arrive: where nothing does, their part isn't computed.
                    arriving = [
                        grad.detach()[:, : t.shape[-1]].view(t.shape).to(t.dtype) if t is y else torch.zeros_like(t)
                        for t in outputs
                    ]
                    given = torch.autograd.grad(outputs, (x, w, other), arriving, retain_graph=True, allow_unused=True)
                    add(y, *(g for g in given if g is not None))
            if dtype is not torch.float64:
                add(*rmsnorm.quantised_rms_norm(x.detach(), columns, w.detach(), 1e-5))
            for scale in (2.0**-140, 2.0**120) if dtype is not torch.float16 else ():  # rows that are rescued
                add(rmsnorm.rms_norm(x.detach() * scale, columns, w.detach(), 0.0))
    return found.hexdigest()[:16]


def test_one_id_and_the_same_bits(native_target):
    contract = rmsnorm.info().contract
    assert contract in HASHES, f"{contract} is new: {_native.contract()}; its hash is {probe()}"
    assert probe() == HASHES[contract], "bits have changed under this id"


def test_the_changelog_names_it():
    assert f"`{rmsnorm.info().contract}`" in Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text()


def test_the_text_follows_the_constants():
    """It is computed: a number of the text is the kernel's own."""
    words = _native.contract()
    source = Path(__file__).parents[1].joinpath("csrc/kernel.h").read_text()
    flush = next(line for line in source.splitlines() if "kFlush =" in line).split("=")[1].strip(" ;")
    assert f"flush {flush}," in words
    assert "bf16 64 f16 64, block 4096 4096" in words  # what statistic.h says of the order


def test_without_kernels_there_is_none(python):
    result = python("import rmsnorm; print(rmsnorm.info().contract)", RMSNORM_NATIVE="0")
    assert result.stdout.strip() == "None", result.stderr
