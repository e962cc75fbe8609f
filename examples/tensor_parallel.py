"""Trains a small LLaMA of transformers with tensor and sequence parallelism, its norms on rmsnorm, and checks it.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py    # gloo on CPUs; NCCL with a GPU each (untried)
    python examples/tensor_parallel.py                         # the same in one process

The matrices are split among the ranks by columns or rows, as in Megatron-LM. Between them each rank has some tokens of
each text, whole rows, so a norm has all that it needs: it sends nothing, and a row's output has the same bits as alone.

The first rank trains the same model again, alone and unsharded. Exit status 1 says that a loss of the two differs by
more than BOUND, or that a norm sent something; 2, that the model can't be split so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import rmsnorm

HIDDEN, LAYERS, BATCH, RATE = 128, 2, 4, 1e-3
# The ranks add in another order: a unit in the last place of such a loss is 4.8e-7, and AdamW, which divides by the
# size of a gradient, magnifies roundings. Measured on 2 and 4 ranks, two texts, eight draws of windows: 9.5e-7 in 20
# steps; 1.0e-5 in 40, as they grow. With norms whose weights get the gradient of one rank's tokens: 7e-5 in 12.
BOUND, MOST_STEPS = 5e-6, 20


def build(heads: int, context: int) -> torch.nn.Module:
    """The model, the same in each process: transformers' LLaMA, with each norm's forward on our kernels."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to download
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        max_position_embeddings=context,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    rmsnorm.patch(model)
    return model


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """Splits the model. Between its parts the hidden states are DTensors ``[batch, sequence, hidden]`` of this kind:"""
    tokens = Shard(1)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens, use_local_output=False),
        # A norm is named like any other module. The style replicates its weight, whose gradient is a partial sum.
        "model.layers.*.input_layernorm": SequenceParallel(),
        "model.layers.*.post_attention_layernorm": SequenceParallel(),
        "model.norm": SequenceParallel(),
        # Attention and MLP gather the tokens, and reduce-scatter their result: these are the collectives of a layer.
        "model.layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
        "model.layers.*.self_attn.k_proj": ColwiseParallel(),
        "model.layers.*.self_attn.v_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=tokens, use_local_output=False),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate()),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=tokens, use_local_output=False),
        # Each rank has the logits of some of the bytes; loss_parallel() computes the loss from those.
        "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False),
    }
    return parallelize_module(model, mesh, plan)


def batches(steps: int, context: int, device: torch.device) -> torch.Tensor:
    """The bytes of this file in random windows, ``[steps, batch, context + 1]``, the same in each process."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - context, (steps, BATCH, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].to(device)


def train(model: torch.nn.Module, windows: torch.Tensor) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for window in windows:
        logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        for parameter in model.parameters():
            # Partial sums are added up here, once. AdamW would do it too, but at each of its three uses of a gradient.
            if isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
    return losses


def collectives_of_norms(model: torch.nn.Module, window: torch.Tensor) -> dict[str, int]:
    """What the norms send, forward and backward, when each is run alone on what it gets in the model."""
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    hooks = [
        norm.register_forward_pre_hook(lambda norm, args: inputs.update({norm: args[0].detach()})) for norm in norms
    ]
    model(input_ids=window[:, :-1])
    for hook in hooks:
        hook.remove()
    with CommDebugMode() as counter:
        for norm, x in inputs.items():
            output = norm(x.requires_grad_())
            output.backward(torch.ones_like(output))
    return {str(name): count for name, count in counter.get_comm_counts().items()}


def refusal(options: argparse.Namespace, ranks: int) -> str | None:
    """Why the model can't be trained so, with the remedy, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed, whose LLaMA this is: pip install transformers"
    if not 1 <= options.steps <= MOST_STEPS:
        return f"--steps {options.steps}: the bound on the losses holds from 1 to {MOST_STEPS} steps"
    if options.heads < 1 or HIDDEN % (2 * options.heads):
        return f"--heads {options.heads}: it must divide {HIDDEN // 2}, half of the hidden size, as RoPE turns pairs"
    for size in ("heads", "context"):
        if (given := getattr(options, size)) < 1 or given % ranks:
            return f"--{size} {given}: {ranks} ranks can't share it evenly; let their number divide it"
    return None


def start(rank: int, ranks: int) -> torch.device:
    """Joins the other processes, if there are any. Returns the device of this one."""
    local, here = (int(os.environ.get(name, of_one)) for name, of_one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if torch.cuda.device_count() >= here:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # as torchrun sets it for several; such small matrices gain nothing from more
    alone = {} if ranks > 1 else {"store": dist.HashStore(), "rank": rank, "world_size": ranks}
    # Nobody waits longer than a minute for one that is missing, or dead.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=1), **alone)
    return device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="of training")
    parser.add_argument("--heads", type=int, default=8, help="of attention; the ranks must divide them")
    parser.add_argument("--context", type=int, default=128, help="bytes of each text; the ranks must divide them")
    options = parser.parse_args()
    rank, ranks = (int(os.environ.get(name, of_one)) for name, of_one in (("RANK", 0), ("WORLD_SIZE", 1)))
    if (problem := refusal(options, ranks)) is not None:
        if rank == 0:
            print(problem, file=sys.stderr)
        return 2
    device = start(rank, ranks)
    windows = batches(options.steps, options.context, device)
    model = build(options.heads, options.context).to(device)
    model = shard(model, init_device_mesh(device.type, (ranks,)))
    with loss_parallel():
        losses = train(model, windows)
    sent = collectives_of_norms(model, windows[0])
    dist.barrier()  # gloo aborts if a rank ends right after a message: pytorch/pytorch#179291
    dist.destroy_process_group()
    if rank > 0:
        return 0
    return compare(losses, train(build(options.heads, options.context).to(device), windows), sent, ranks, device.type)


def compare(sharded: list[float], alone: list[float], sent: dict[str, int], ranks: int, device: str) -> int:
    """Prints the losses, and what the norms sent. Returns the exit status."""
    print(f"LLaMA of {LAYERS} layers, tensor and sequence parallel on {ranks} {device} rank{'s' * (ranks > 1)}")
    print("step     sharded       alone  difference")
    apart = [ours - theirs for ours, theirs in zip(sharded, alone, strict=True)]
    for step, line in enumerate(zip(sharded, alone, apart, strict=True), 1):
        print("{:4}  {:10.7f}  {:10.7f}  {:10.1e}".format(step, *line))
    largest = max(map(abs, apart))
    print(f"largest difference: {largest:.1e}, at most {BOUND:.0e}")
    print(f"collectives of the {2 * LAYERS + 1} norms, forward and backward: {sent or 'none'}")
    return int(not largest <= BOUND or bool(sent))


if __name__ == "__main__":
    sys.exit(main())
