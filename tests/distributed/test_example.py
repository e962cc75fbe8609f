"""Proves that the example does what its page says, as a user runs it: equal losses, norms that send nothing."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from launched import launched
from pool import mesh

pytestmark = pytest.mark.xdist_group("distributed")  # one process has the ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel.py"
LOSSES = re.compile(r"^ +\d+ +(\d+\.\d+) +(\d+\.\d+) +-?\d\.\de[+-]\d\d$", re.MULTILINE)
BOUND = 5e-6  # ten units in the last place of a loss; the example argues it


@pytest.mark.heavy
def test_two_ranks_under_torchrun():
    """The command of README. No rank waits for another longer than a minute; the limit here is for a slow machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    ended = launched(command, 240)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "on 2 cpu ranks" in ended.stdout
    losses = [(float(sharded), float(alone)) for sharded, alone in LOSSES.findall(ended.stdout)]
    assert len(losses) == 12
    assert max(abs(sharded - alone) for sharded, alone in losses) <= BOUND
    assert losses[0][0] - losses[-1][0] > 1.0, "it learns"
    assert "collectives of the 5 norms, forward and backward: none" in ended.stdout
    assert "Warning" not in ended.stderr


def train(steps: int) -> tuple[list[float], list[float], dict[str, int]]:
    """On a rank: the losses, sharded and alone, and what the norms send."""
    example = runpy.run_path(str(EXAMPLE))
    build, windows = example["build"], example["batches"](steps, 128, "cpu")
    model = example["shard"](build(8, 128), mesh(4))
    with example["loss_parallel"]():
        sharded = example["train"](model, windows)
    sent = example["collectives_of_norms"](model, windows[0])
    return sharded, example["train"](build(8, 128), windows), sent


@pytest.mark.heavy
def test_four_ranks(ranks):
    for sharded, alone, sent in ranks.run(train, 3):
        assert max(abs(ours - theirs) for ours, theirs in zip(sharded, alone, strict=True)) <= BOUND
        assert sent == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--heads", "8"], "--heads 8: 3 ranks can't share it evenly"),
        (["--heads", "7"], "--heads 7: it must divide 64"),
        (["--steps", "0"], "--steps 0: the bound on the losses holds from 1 to 20 steps"),
    ],
)
def test_bad_input_is_one_line(options, words, monkeypatch, capsys):
    """Said by the first of the ranks, before it waits for the others, who aren't even there."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(words)
