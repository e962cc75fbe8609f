"""Proves that ``rmsnorm convert`` needs no more memory than the model takes twice: the system counts, not we."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
import transformers

PROGRAM = """
import sys
from pathlib import Path
from rmsnorm.surgery.convert import Conversion, Options
Conversion(Options(sys.argv[1], Path(sys.argv[2]), ("fold", "rotate")), lambda what: None).run()
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


def peak(source: Path, out: Path) -> int:
    """Bytes of memory that a process had at its largest: weights, code, files that it mapped."""
    command = [sys.executable, "-c", PROGRAM, source, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    return 1024 * int(found.stdout)


def saved(place: Path, dtype: torch.dtype, **sizes: Any) -> int:
    """Writes a Llama with a tied head and gains, in files of 50 MB, and returns the bytes of its weights."""
    config = transformers.LlamaConfig(num_attention_heads=4, bos_token_id=0, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name:
                one.uniform_(0.5, 2.0)
    model.save_pretrained(place, max_shard_size="50MB")
    return sum(one.nbytes for one in model.parameters())


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process took")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_twice_and_no_more(tmp_path: Path, dtype: torch.dtype) -> None:
    """Beyond what a tiny model takes. In it are the head, which is untied, and a forward of 256 tokens: 50 MB here."""
    saved(tmp_path / "tiny", dtype, vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    size = saved(tmp_path / "large", dtype, **sizes)
    assert size > (200e6 if dtype is torch.float32 else 100e6)
    least = peak(tmp_path / "tiny", tmp_path / "a")
    assert peak(tmp_path / "large", tmp_path / "b") - least < 2 * size
