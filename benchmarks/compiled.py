"""SmolLM2-135M under torch.compile: time of the model patched ÷ time of the model as it is, both compiled.

    python benchmarks/compiled.py [--layers 4] [--dtypes float32,bfloat16] [--tokens 256] [--seconds 30] [--threads 2]

Two models take turns that have the very same weights: a copy of them lies in other pages, and decode is made of reading
them. All layers are alike, so a few of them stand for all; the table of embeddings, which is the head, too, is left as
large as it is. Both must say the same first.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Any

import torch
from processes import where
from torch._dynamo.utils import counters

import rmsnorm
from rmsnorm.bench.timing import human, measure
from rmsnorm.models import loading, workload


def models(dtype: torch.dtype, layers: int) -> dict[str, Any]:
    """Both, by their names."""
    plain = loading.load(loading.SMOLLM2, dtype)[1]
    if layers:
        plain.model.layers = plain.model.layers[:layers]
        plain.config.num_hidden_layers = layers
        plain.config.layer_types = (getattr(plain.config, "layer_types", None) or [])[:layers] or None
    patched = deepcopy(plain, {id(tensor): tensor for tensor in plain.parameters()})
    rmsnorm.patch(patched)
    return {"plain": plain, "patched": patched}


def race(dtype: str, layers: int, tokens: int, seconds: float) -> None:
    """One line for each kind of work."""
    both = models(getattr(torch, dtype), layers)
    size = both["plain"].get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, tokens), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled: dict[str, Any] = {name: torch.compile(model, dynamic=False) for name, model in both.items()}
    with torch.inference_mode():
        says = [model(ids, use_cache=False).logits.float() for model in compiled.values()]
    assert (says[0] - says[1]).abs().max() <= 0.05 * says[0].abs().max(), (
        f"{dtype}: the patched one says something else"
    )
    works = {name: workload.kinds(model, {"input_ids": ids}, writes=True) for name, model in compiled.items()}
    for kind in works["plain"]:
        calls = {name: work[kind].make() for name, work in works.items()}
        for call in calls.values():
            for _ in range(3):
                call()
        counters.clear()
        times = measure(calls, seconds)
        assert not counters["stats"]["unique_graphs"], f"{kind}: something was compiled while it was timed"
        speed = workload.Speed(times["plain"], times["patched"], 0)
        low, high = speed.ratio_quartiles
        fastest = speed.after.fastest / speed.before.fastest
        print(
            f"{kind}, {dtype}: {speed.ratio:.3f} ({low:.3f}–{high:.3f}), fastest {fastest:.3f}, "
            f"of {human(speed.before.median)}, {len(speed.before.seconds)} rounds",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the model; 0: all of them")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=256, help="that are read, and learnt from; a token follows them")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"{where()}; {asked.layers or 'all'} layers, {asked.tokens} tokens, {asked.threads} threads")
    for dtype in asked.dtypes.split(","):
        race(dtype, asked.layers, asked.tokens, asked.seconds)


if __name__ == "__main__":
    main()
